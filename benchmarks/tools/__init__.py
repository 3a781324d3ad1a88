"""Commands around the benchmarks: the run on a GPU, and what it takes along."""
