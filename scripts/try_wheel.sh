#!/usr/bin/env bash
# Tries a wheel as a user has it: in a new environment, with PyTorch from the package index and with
# nothing of this checkout on its path. Checks it (scripts/check_wheel.py), then runs tests that take
# about a minute.
#
#   scripts/try_wheel.sh dist/cutloss-*.whl
#
#   PYTHON  the interpreter that makes the environment (python3)
#   TORCH   the PyTorch that pip is asked for (as scripts/requirements.txt has it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TESTS=(project/test_import project/test_needs loss/test_functional loss/test_heads
  logits/test_cross_entropy compat/test_torch_compat losses/test_token_loss cli/test_doctor)

(($# == 1)) && [[ -f $1 ]] || {
  printf 'try_wheel: one wheel is wanted, got: %s\n' "$*" >&2
  exit 2
}
wheel=$(realpath "$1")
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
unset PYTHONPATH
torch=${TORCH:-$(grep '^torch==' scripts/requirements.txt)}

echo "== a new environment with $torch"
"${PYTHON:-python3}" -m venv "$away/venv"
python=$away/venv/bin/python
grep -v '^torch==' scripts/requirements.txt >"$away/constraints.txt"
pip=("$python" -m pip -q --disable-pip-version-check install -c "$away/constraints.txt")
"${pip[@]}" "$torch" numpy pytest hypothesis

echo "== the wheel by itself"
"$python" scripts/check_wheel.py "$wheel"

echo "== installed, with tests that lie elsewhere"
"${pip[@]}" "$wheel"
mkdir "$away/tests"
cp -r tests/python "$away/tests" # where the copy of pyproject.toml says that they are
cp pyproject.toml "$away"
cd "$away"
"$python" -I -c '
import sys, cutloss
found = cutloss.__file__
sys.exit(0 if found.startswith(sys.prefix) else f"cutloss was imported from {found}")'
"$away/venv/bin/cutloss" doctor --shape 64,32,1000 >doctor.txt || {
  cat doctor.txt
  exit 1
}
files=("${TESTS[@]/#/tests/python/}")
files=("${files[@]/%/.py}") # tests/python/project/test_import.py, ...
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} "$python" -I -m pytest -q -c pyproject.toml \
  -p no:cacheprovider "${files[@]}"
