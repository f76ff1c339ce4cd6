#!/usr/bin/env bash
# Builds and runs all tests, after scripts/setup.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUILD=build/release
LOG=$BUILD/ctest.log
JOBS=${JOBS:-$(nproc)}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # tests/CMakeLists.txt says why

echo "== building the C++ tests in $BUILD"
cmake --build $BUILD -j "$JOBS"

echo "== C++ tests"
result=0
ctest --test-dir $BUILD -j "$JOBS" --quiet --output-on-failure --output-log $PWD/$LOG || result=$?
if ((result == 0)); then
  grep -E 'tests passed|Total Test time|\(Skipped\)' $LOG
else
  grep -vE '^ *(Start +[0-9]+:|[0-9]+/[0-9]+ .* Passed )' $LOG
fi

echo "== Python tests"
.venv/bin/python -m pytest -q "$@" || result=$?
exit $result
