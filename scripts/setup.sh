#!/usr/bin/env bash
# Sets up all that a checkout of cutloss needs, and nothing twice: system packages (Debian and
# Ubuntu), Python packages in .venv, the PyTorch operators, the `cutloss` command in .venv/bin.
# With --packages the packages alone, for what needs no operators.
#
#   PYTHON          the interpreter that .venv is made with (python3)
#   CUTLOSS_WERROR  ON: the compiler's warnings are errors, until it is OFF
#   JOBS            compilations at a time (one for each processor)
#
# Where nvcc and a GPU are found the CUDA engines are built too, for that GPU; scripts/cuda.sh has
# their settings, and scripts/onednn.sh that of another oneDNN.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUILD=build/release

say() { printf '== %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

source scripts/cuda.sh
source scripts/onednn.sh

# --- system packages ---------------------------------------------------------------------------
# package  |  how to see that it is not needed (empty: ask dpkg)  |  why
system_packages() {
  cat <<'LIST'
g++|command -v c++|the C++20 compiler
cmake|command -v cmake|configures the build
ninja-build|command -v ninja|runs the build
libopenblas-openmp-dev||OpenBLAS: matrix products in fp64
libhwy-dev||Highway: vector instructions chosen at run time
libgtest-dev||GoogleTest: the C++ tests
python3||the Python package
python3-venv|"$PYTHON" -c 'import ensurepip, venv'|makes .venv
LIST
}

installed() { # package, test
  if [[ -n $2 ]] && eval "$2" >/dev/null 2>&1; then return 0; fi
  dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed
}

install_system_packages() {
  local missing=() package test why
  while IFS='|' read -r package test why; do
    [[ $package == python3 ]] && test='command -v "$PYTHON"'
    if ! installed "$package" "$test"; then
      say "missing: $package ($why)"
      missing+=("$package")
    fi
  done < <(system_packages)
  if ((${#missing[@]} == 0)); then return; fi
  command -v apt-get >/dev/null ||
    die "this is not Debian or Ubuntu: install the packages above by your system's means"
  local sudo=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      die "run as root, or install sudo, or have root run: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  say "apt-get install ${missing[*]}"
  "${sudo[@]}" apt-get update -q
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# --- Python packages ---------------------------------------------------------------------------
# A step is done again when what it depends on has changed; its stamp says what it was done with.
up_to_date() { [[ -f $1 && $(<"$1") == "$2" ]]; }

install_python_packages() {
  if [[ ! -x .venv/bin/pip ]]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      die "Python 3.10 or later is needed, $PYTHON is $("$PYTHON" -V); set PYTHON to another"
    say "making .venv with $("$PYTHON" -V)"
    "$PYTHON" -m venv .venv
  fi
  local stamp=.venv/requirements.stamp want
  want=$(sha256sum scripts/requirements.txt)
  if up_to_date $stamp "$want"; then return; fi
  say "installing Python packages into .venv (scripts/requirements.txt)"
  .venv/bin/python -m pip install -q --disable-pip-version-check -r scripts/requirements.txt
  printf '%s\n' "$want" >$stamp
}

# --- the package -------------------------------------------------------------------------------
build_operators() {
  say "building the PyTorch operators in $BUILD"
  local log
  log=$(cmake --preset release ${CUTLOSS_WERROR:+-DCUTLOSS_WERROR=$CUTLOSS_WERROR} \
    "${onednn_flags[@]}" "${cuda_flags[@]}" 2>&1) ||
    die "CMake could not configure the build:"$'\n'"$log"
  cmake --build $BUILD --target cutloss_torch -j "${JOBS:-$(nproc)}"
}

# Editable: the Python files are used from where they lie, with the library just built. The
# installation holds a list of them, so that it is made anew where one came, went or moved.
install_package() {
  local stamp=.venv/package.stamp want
  want="$(sha256sum pyproject.toml include/cutloss/version.h) $PWD
$(find python/cutloss -name '*.py' | sort | sha256sum)"
  if up_to_date $stamp "$want"; then return; fi
  say "installing the package into .venv (editable)"
  SKBUILD_WHEEL_CMAKE=0 .venv/bin/python -m pip install -q --disable-pip-version-check \
    --no-build-isolation --no-deps -e .
  printf '%s\n' "$want" >$stamp
}

install_system_packages
install_python_packages
settle_onednn
if [[ ${1:-} == --packages ]]; then exit; fi
for setting in CUTLOSS_CUDA CUTLOSS_CUDA_ARCHITECTURES CUDACXX; do recall $setting; done
build_for_gpus_here
settle_cuda
build_operators
install_package
say "ready: .venv/bin/cutloss"
