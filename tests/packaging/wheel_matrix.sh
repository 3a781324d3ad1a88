#!/usr/bin/env bash
# Builds one wheel and runs the same file under several Pythons and torch versions, in fresh environments.
# Outside CI: a torch wheel with CUDA is gigabytes. Arguments: PYTHON:TORCH pairs.
#
#   bash tests/packaging/wheel_matrix.sh python3.11:2.13.0 python3.12:2.11.0
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- python3.11:2.13.0 python3.12:2.11.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

first=${1%%:*}
"$first" -m venv "$work/build"
"$work/build/bin/pip" install -q torch==2.13.0 'setuptools>=77' numpy cmake ninja 2>/dev/null
PATH="$work/build/bin:$PATH" "$work/build/bin/pip" wheel -q --no-build-isolation --no-deps -w "$work" . 2>/dev/null
wheel=$(ls "$work"/*.whl)
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes, sha256 $(sha256sum "$wheel" | cut -c1-16)"

for pair in "$@"; do
  python=${pair%%:*} torch=${pair##*:}
  venv=$work/venv
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q "torch==$torch" "$wheel" 2>/dev/null
  echo "--- $("$venv/bin/python" --version), torch $torch"
  (cd "$work" && "$venv/bin/python" "$OLDPWD/tests/packaging/smoke.py")
done
