#!/usr/bin/env bash
# Runs the operators' tests with the CPU library in build/sanitize/lib (`make sanitize`), then fuzzes it in each
# instruction set, then the CUDA kernels on the host. Any report of a sanitizer ends the run. Leaks are not looked for:
# Python keeps what it likes. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
library=$PWD/build/sanitize/lib/libm2f_cpu.so
grep -q __asan_report "$library" || { echo "$library is not instrumented"; exit 1; }
export M2F_LIBRARIES=${library%/*}
# Reports go to files: the process ends before pytest would show what it captured.
report=$PWD/build/sanitize/report
rm -f "$report".*
trap 'cat "$report".* 2>/dev/null || true' EXIT
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:log_path=$report
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$report
runtime="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"

run() {
  LD_PRELOAD="$runtime" "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider -r fE "$@"
}

# Without the one test of a whole process's peak memory: what AddressSanitizer keeps of freed memory counts in it.
run tests/ops tests/nn tests/test_threads_and_forks.py -k "not three_hundred_targets"
for capability in baseline avx2 avx512; do
  echo "fuzzing the $capability kernels"
  M2F_CPU_CAPABILITY=$capability run tests/fuzz --ignore=tests/fuzz/test_cuda_on_host.py
done
# Without the tests that throw out of a fiber on purpose: AddressSanitizer takes its stack for the thread's.
M2F_CUDA_ON_HOST_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g" \
  run tests/cuda_on_host tests/fuzz/test_cuda_on_host.py -k "not finds_mistakes"
