#!/usr/bin/env bash
# Fetches nvcc of CUDA 13 and what it takes into .venv/cuda-toolkit (270 MB), where scripts/cuda.sh
# finds it: for a machine that has no CUDA toolkit, without root. NVIDIA's Python packages have it,
# pinned in scripts/requirements-cuda-toolkit.txt. After scripts/setup.sh --packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLKIT=.venv/cuda-toolkit
wheels=$TOOLKIT/wheels
want=$(sha256sum scripts/requirements-cuda-toolkit.txt)

if [[ ! -f $TOOLKIT/stamp || $(<$TOOLKIT/stamp) != "$want" ]]; then
  echo "== fetching the CUDA toolkit into $TOOLKIT (scripts/requirements-cuda-toolkit.txt)"
  rm -rf $TOOLKIT
  mkdir -p $wheels
  .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d $wheels \
    -r scripts/requirements-cuda-toolkit.txt
  .venv/bin/python scripts/unpack.py $TOOLKIT $wheels/*.whl \
    nvidia/cu13/{bin=bin,include=include,lib=lib,nvvm=nvvm}
  rm -rf $wheels
  # As NVIDIA's installer lays it out: nvcc and CMake look for it there.
  chmod +x $TOOLKIT/bin/* $TOOLKIT/nvvm/bin/*
  ln -s lib $TOOLKIT/lib64
  ln -s libcudart.so.13 $TOOLKIT/lib/libcudart.so
  mkdir -p $TOOLKIT/targets/x86_64-linux
  ln -s ../../include ../../lib $TOOLKIT/targets/x86_64-linux/
  printf '%s\n' "$want" >$TOOLKIT/stamp
fi
$TOOLKIT/bin/nvcc --version | sed -n 's/^Cuda compilation tools, /== nvcc in .venv\/cuda-toolkit\/bin: /p'
