#!/usr/bin/env bash
# Builds one wheel, as pip does for a user, and runs the same file under several Pythons and versions of torch, in fresh
# environments. Outside CI: a torch wheel with CUDA is gigabytes. Arguments: PYTHON:TORCH pairs; `newest` is a version.
#
#   bash tests/packaging/wheel_matrix.sh python3.11:2.13.0 python3.12:2.11.0 python3.13:newest
#
# WHEEL=FILE takes a wheel that is built already, for example the one that auditwheel repaired.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- python3.11:2.13.0 python3.12:2.11.0 python3.13:newest
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

wheel=${WHEEL:+$(realpath "$WHEEL")}
if [ -z "$wheel" ]; then
  "${1%%:*}" -m venv "$work/build"
  "$work/build/bin/pip" wheel -q --no-deps -w "$work" .
  wheel=$(ls "$work"/*.whl)
fi
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes, sha256 $(sha256sum "$wheel" | cut -c1-16)"

for pair in "$@"; do
  python=${pair%%:*} torch=${pair##*:}
  venv=$work/venv
  rm -rf "$venv"
  "$python" -m venv "$venv"
  requirement="torch==$torch"
  [ "$torch" != newest ] || requirement=torch
  "$venv/bin/pip" install -q "$requirement"
  start=$SECONDS
  "$venv/bin/pip" install -q "$wheel"
  echo "--- $("$venv/bin/python" --version), torch $torch; the wheel installed in $((SECONDS - start)) s"
  (cd "$work" && "$venv/bin/python" "$OLDPWD/tests/packaging/smoke.py")
done
