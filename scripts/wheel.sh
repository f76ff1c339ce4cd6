#!/usr/bin/env bash
# Builds dist/cutloss-*.whl: the package with every shared library that another machine may lack.
# After scripts/setup.sh --packages; the settings of scripts/cuda.sh hold, those of this call: a wheel
# is for other machines, whatever this checkout was last built for. No GPU is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
die() {
  printf 'wheel: %s\n' "$*" >&2
  exit 1
}
source scripts/cuda.sh
source scripts/onednn.sh
recall CUDACXX
settle_cuda
settle_onednn

BUILT=build/wheel
rm -rf $BUILT dist/cutloss-*.whl
mkdir -p $BUILT

say "building the wheel"
settings=()
for flag in "${onednn_flags[@]}" "${cuda_flags[@]}"; do settings+=(-C "cmake.define.${flag#-D}"); done
CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} .venv/bin/python -m pip wheel -q \
  --disable-pip-version-check --no-build-isolation --no-deps -w $BUILT "${settings[@]}" .

# Into the wheel: oneDNN, OpenBLAS, Highway and what they need. Not into it: PyTorch; and libgomp,
# of which a process must have one, torch's own, whose plain name a copy here would not have.
say "bundling shared libraries"
report=$(PATH=$PWD/.venv/bin:$PATH auditwheel repair --strip --exclude libgomp.so.1 \
  --exclude 'libtorch*' --exclude 'libc10*' -w dist $BUILT/*.whl 2>&1) || die "$report"

say "trying it, away from this checkout"
ls -sh dist/*.whl
.venv/bin/python scripts/check_wheel.py dist/*.whl
if [[ $CUDA == ON ]]; then say "CUDA code for ${CUTLOSS_CUDA_ARCHITECTURES:-every architecture}"; fi
