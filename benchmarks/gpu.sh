#!/usr/bin/env bash
# What `make gpu` does, on a machine with a CUDA GPU: build, the whole suite, compute-sanitizer, the benchmarks with
# every peer that is installed. Needs a Python ($PYTHON) with a CUDA torch >= 2.11, triton, cmake, ninja, and what
# tests/requirements.txt and benchmarks/requirements.txt list; downloads nothing. Each step's log goes to $RESULTS (default
# benchmarks/results/<GPU name>/run); a failed step does not stop the later ones, and makes the exit status non-zero.
# STEPS chooses some of them.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-"build info resources suite memcheck racecheck bench"}
export M2F_CUDA=on PYTHONPATH=. PYTHONUNBUFFERED=1

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())') || {
  echo "make gpu: $PYTHON sees no CUDA device through torch" >&2
  exit 2
}
slug=$(echo "$gpu" | tr '[:upper:]' '[:lower:]' | sed 's/[^a-z0-9]\+/-/g; s/^-//; s/-$//')
RESULTS=${RESULTS:-benchmarks/results/$slug/run}
mkdir -p "$RESULTS"

arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')

step_build() { M2F_CUDA_ARCHS=${M2F_CUDA_ARCHS:-$arch} "$PYTHON" setup.py -q build_ext --inplace && cat build/temp.*/cmake/build.log; }
step_info() { "$PYTHON" -m m2f_kernels.info && nvidia-smi && git rev-parse HEAD; }
step_resources() { "$PYTHON" -m benchmarks.static_cuda --archs "$arch" --check --output "$RESULTS/resources.md" && cat "$RESULTS/resources.md" && "$PYTHON" -m benchmarks.static --check --archs "$arch"; }
step_suite() { "$PYTHON" -m pytest tests -m "not slow" -q --durations=10; }
step_memcheck() { compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest tests/ops -m "cuda and not slow" -k sanitize -q; }
step_racecheck() { compute-sanitizer --tool racecheck --error-exitcode 1 "$PYTHON" -m pytest tests/ops -m "cuda and not slow" -k sanitize -q; }
step_bench() { "$PYTHON" -m benchmarks.run --device cuda; }

failed=()
for step in $STEPS; do
  echo "== $step"
  start=$SECONDS
  if "step_$step" >"$RESULTS/$step.log" 2>&1; then
    state=passed
  else
    state=FAILED
    failed+=("$step")
  fi
  echo "   $state in $((SECONDS - start)) s"
  tail -n 15 "$RESULTS/$step.log" | sed 's/^/   /'
done
echo "results in $RESULTS; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
