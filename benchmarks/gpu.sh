#!/usr/bin/env bash
# What `make gpu` does, on a machine with a CUDA GPU: build, resource reports, the whole suite, CUDA graphs,
# compute-sanitizer, and the benchmarks with every peer that is installed, first what the report's first page needs,
# then all shapes. Needs a Python ($PYTHON) with a CUDA torch >= 2.11, triton, cmake, ninja, and what
# tests/requirements.txt and benchmarks/requirements.txt list; downloads nothing.
#
# Everything goes to one folder, $OUTPUT/<GPU> (default benchmarks/results/<GPU>): reports, and in run/ each step's log
# and summary.md. A step that fails or takes longer than $STEP_SECONDS does not stop the later ones, and makes the exit
# status 1. STEPS chooses some of them.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-"requirements build info kernels resources triton_resources suite graphs memcheck racecheck bench bench_full"}
STEP_SECONDS=${STEP_SECONDS:-3600}
# Processes of the suite, where pytest-xdist is installed. An illegal access spoils the tests after it in its process only.
WORKERS=${WORKERS:-8}
export M2F_CUDA=on PYTHONPATH=. PYTHONUNBUFFERED=1

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())') || {
  echo "make gpu: $PYTHON sees no CUDA device through torch" >&2
  exit 2
}
slug=$("$PYTHON" -c 'from benchmarks import facts; print(facts.device_slug("cuda"))') || {
  echo "make gpu: $PYTHON cannot import the benchmarks; are tests/requirements.txt and benchmarks/requirements.txt installed?" >&2
  exit 2
}
export ARCH=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export slug WORKERS OUTPUT=${OUTPUT:-benchmarks/results}
export LOGS=$OUTPUT/$slug/run
mkdir -p "$LOGS"

# What is installed in another version than the tests were written for: a failure may be that version's. Fails for the
# tests' bounds; of the benchmarks' exact versions it only says which others are here.
step_requirements() {
  "$PYTHON" - tests/requirements.txt benchmarks/requirements.txt <<'EOF'
import sys
from importlib import metadata
from pathlib import Path
from packaging.requirements import Requirement

unmet = 0
for path in sys.argv[1:]:
    for line in Path(path).read_text().splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or not wanted.specifier.contains(found, prereleases=True):
            print(f"{path}: expected {wanted}; got {found}")
            unmet += path.startswith("tests/")
print(f"{unmet} requirements of the tests are not met")
sys.exit(unmet > 0)
EOF
}
step_build() { M2F_CUDA_ARCHS=${M2F_CUDA_ARCHS:-$ARCH} "$PYTHON" setup.py -q build_ext --inplace && cat build/temp.*/cmake/build.log; }
step_info() { "$PYTHON" -m m2f_kernels.info && nvidia-smi && { git rev-parse HEAD || echo "${M2F_COMMIT:-no git checkout}"; }; }
step_kernels() { "$PYTHON" -m benchmarks.kernels --output "$OUTPUT/$slug/kernels.md"; }
step_resources() { "$PYTHON" -m benchmarks.static_cuda --archs "$ARCH" --check --output "$LOGS/cuda_resources.md"; }
step_triton_resources() { "$PYTHON" -m benchmarks.static --archs "$ARCH" --check --output "$LOGS/triton_resources.md"; }
step_suite() {
  local parallel=""
  "$PYTHON" -c "import xdist" 2>/dev/null && parallel="-n $WORKERS"
  # Named one by one: a run that is cut off has no summary.
  "$PYTHON" -m pytest tests -m "not slow" -v --durations=10 $parallel
}
step_graphs() { "$PYTHON" -m pytest tests -m "cuda and not slow" -k "graph" -q -rs; }
sanitizer() { compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -m pytest "$2" -m "cuda and not slow" -k sanitize -q; }
step_memcheck() { sanitizer memcheck tests/ops; }
# CUDA C++ only: shared memory of Triton's kernels is the compiler's, and where a layout repeats a vector several threads
# store it; and attention is compared with PyTorch's, whose kernels on Hopper are reported too.
step_racecheck() { sanitizer racecheck tests/ops/test_ms_deform_attn_cuda.py; }
step_bench() { "$PYTHON" -m benchmarks.run --device cuda --output "$OUTPUT"; }
step_bench_full() { "$PYTHON" -m benchmarks.run --device cuda --full --output "$OUTPUT"; }
for name in $(compgen -A function step_) sanitizer; do export -f "${name?}"; done

{
  echo "# make gpu on $gpu"
  echo
  echo "| step | state | seconds | last line |"
  echo "|---|---|---:|---|"
} >"$LOGS/summary.md"
failed=()
for step in $STEPS; do
  echo "== $step"
  start=$SECONDS
  timeout --kill-after=30 "$STEP_SECONDS" bash -c "set -uo pipefail; step_$step" >"$LOGS/$step.log" 2>&1
  code=$?
  case $code in
    0) state=passed ;;
    124 | 137) state="FAILED: longer than $STEP_SECONDS s" ;;
    127) state="FAILED: command not found" ;;
    *) state="FAILED with $code" ;;
  esac
  [ $code -eq 0 ] || failed+=("$step")
  echo "   $state in $((SECONDS - start)) s"
  tail -n 15 "$LOGS/$step.log" | sed 's/^/   /'
  last=$(grep -v '^[[:space:]]*$' "$LOGS/$step.log" | tail -n 1 | tr '|' '/' | cut -c 1-160)
  echo "| $step | $state | $((SECONDS - start)) | $last |" >>"$LOGS/summary.md"
done
echo "results in $OUTPUT/$slug, logs and summary.md in $LOGS; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
