# Sourced by setup.sh and wheel.sh, in the root of the checkout: whether the CUDA engines are built
# (CUDA: ON or OFF), and what CMake is told about it (cuda_flags).
#
#   CUTLOSS_CUDA                ON, OFF (unset: ON where nvcc is found)
#   CUTLOSS_CUDA_ARCHITECTURES  what to compile for, as "80;90" (unset: the list in cmake/CutlossCuda.cmake)
#   CUDACXX                     nvcc, where it is neither in PATH nor in /usr/local/cuda/bin

CUDA_HEADERS=.venv/cuda

# A setting of this call, or else of an earlier one: a build stays what it is until something else is
# asked for. Empty is the default again; `make clean` forgets all.
recall() { # name
  local kept=build/settings/$1
  if [[ -n ${!1:-} ]]; then
    mkdir -p build/settings
    printf '%s\n' "${!1}" >"$kept"
  elif [[ -v $1 ]]; then
    rm -f "$kept"
  elif [[ -f $kept ]]; then
    printf -v "$1" %s "$(<"$kept")"
    say "$1=${!1}, as before ($1= for the default)"
  fi
}

find_nvcc() {
  local candidate
  for candidate in "${CUDACXX:-}" nvcc /usr/local/cuda/bin/nvcc; do
    if [[ -n $candidate ]] && command -v "$candidate"; then return; fi
  done
}

has_cublaslt() { # nvcc
  echo '#include <cublasLt.h>' | "$1" -x cu -E - >/dev/null 2>&1
}

# Header files alone: of cuBLASLt (the library is opened at run time, torch brings it along) and of
# CUTLASS. The wheels that hold them are downloaded, unpacked in part, and deleted.
install_cuda_headers() { # nvcc
  local stamp=$CUDA_HEADERS/stamp want wheels=$CUDA_HEADERS/wheels names=(nvidia-cutlass)
  want="$(sha256sum scripts/requirements-cuda.txt) $1"
  if [[ -f $stamp && $(<$stamp) == "$want" ]]; then return; fi
  has_cublaslt "$1" || names+=(nvidia-cublas)
  say "fetching the headers of ${names[*]} into $CUDA_HEADERS (cuBLAS's wheel is large)"
  rm -rf $CUDA_HEADERS
  mkdir -p $wheels
  local name
  for name in "${names[@]}"; do
    .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d $wheels \
      "$(grep "^$name==" scripts/requirements-cuda.txt)"
  done
  .venv/bin/python scripts/unpack.py $CUDA_HEADERS $wheels/*.whl \
    cutlass_library/source/include=cutlass nvidia/cu13/include=cublas
  rm -rf $wheels
  printf '%s\n' "$want" >$stamp
}

settle_cuda() {
  local nvcc=""
  CUDA=${CUTLOSS_CUDA:-ON}
  if [[ $CUDA == ON ]]; then nvcc=$(find_nvcc); fi
  if [[ -z $nvcc ]]; then
    [[ ${CUTLOSS_CUDA:-} != ON ]] || die "CUTLOSS_CUDA=ON, but there is no nvcc: set CUDACXX to it"
    [[ $CUDA == OFF ]] || say "no CUDA engines: nvcc was not found (set CUDACXX to it)"
    CUDA=OFF
    cuda_flags=(-DCUTLOSS_CUDA=OFF)
    return
  fi
  install_cuda_headers "$nvcc"
  export CUDACXX=$nvcc
  cuda_flags=(-DCUTLOSS_CUDA=ON -DCUTLASS_INCLUDE_DIR="$PWD/$CUDA_HEADERS/cutlass")
  if [[ -d $CUDA_HEADERS/cublas ]]; then
    cuda_flags+=(-DCUBLASLT_INCLUDE_DIR="$PWD/$CUDA_HEADERS/cublas")
  fi
  cuda_flags+=(-DCUTLOSS_CUDA_ARCHITECTURES="${CUTLOSS_CUDA_ARCHITECTURES:-}")
  say "CUDA engines with $nvcc, for ${CUTLOSS_CUDA_ARCHITECTURES:-every architecture}"
}
