"""The benchmark of each operator, with its peers."""
