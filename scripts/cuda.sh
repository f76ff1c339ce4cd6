# Sourced by setup.sh and wheel.sh, in the root of the checkout: whether the CUDA engines are built
# (CUDA: ON or OFF), and what CMake is told about it (cuda_flags).
#
#   CUTLOSS_CUDA                ON, OFF (unset: ON where nvcc is found; in a checkout's own build only
#                               where there is a GPU too, or an architecture is asked for)
#   CUTLOSS_CUDA_ARCHITECTURES  what to compile for, as "80;90" (unset: the list in
#                               cmake/CutlossCuda.cmake; in a checkout's own build the GPUs that are
#                               here, or that list where CUTLOSS_CUDA=ON and there are none)
#   CUDACXX                     nvcc (unset: the one that scripts/cuda_toolkit.sh has fetched, that of
#                               PATH, or that of /usr/local/cuda/bin)

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
  local fetched=$PWD/.venv/cuda-toolkit/bin/nvcc
  for candidate in "${CUDACXX:-}" "$fetched" nvcc /usr/local/cuda/bin/nvcc; do
    if [[ -n $candidate ]] && command -v "$candidate"; then return; fi
  done
}

has_cublaslt() { # nvcc
  echo '#include <cublasLt.h>' | "$1" -x cu -E - >/dev/null 2>&1
}

nvcc_release() { # nvcc; 13.0
  "$1" --version | sed -n 's/^.* release \([0-9.]*\),.*$/\1/p'
}

# Header files alone: of cuBLASLt (the library is opened at run time, torch brings it along) and of
# CUTLASS. The wheels that hold them are downloaded, unpacked in part, and deleted.
install_cuda_headers() { # nvcc
  local stamp=$CUDA_HEADERS/stamp want wheels=$CUDA_HEADERS/wheels names=(nvidia-cutlass) release
  release=$(nvcc_release "$1")
  want="$(sha256sum scripts/requirements-cuda.txt) $1 $release"
  if [[ -f $stamp && $(<$stamp) == "$want" ]]; then return; fi
  if ! has_cublaslt "$1"; then
    case $release in
      13.*) names+=(nvidia-cublas) ;;
      12.*) names+=(nvidia-cublas-cu12) ;;
      *) die "$1 is of CUDA ${release:-?}, whose cublasLt.h is not there: install its cuBLAS" \
        "development files, or set CUDACXX to the nvcc of CUDA 13" ;;
    esac
  fi
  say "fetching the headers of ${names[*]} into $CUDA_HEADERS (cuBLAS's wheel is large)"
  rm -rf $CUDA_HEADERS
  mkdir -p $wheels
  local name
  for name in "${names[@]}"; do
    .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d $wheels \
      "$(grep "^$name==" scripts/requirements-cuda.txt)"
  done
  .venv/bin/python scripts/unpack.py $CUDA_HEADERS $wheels/*.whl \
    cutlass_library/source/include=cutlass nvidia/cu13/include=cublas nvidia/cublas/include=cublas
  rm -rf $wheels
  printf '%s\n' "$want" >$stamp
}

# A line for each kind of GPU in this machine, named as nvcc names it: 90. No lines where there is no
# GPU, or no driver that knows of one.
gpus_here() {
  { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
    sed -nE 's/^ *([0-9]+)\.([0-9]+) *$/\1\2/p' | sort -un
}

can_compile_for() { # nvcc, architecture: cuda/library needs Turing or newer
  (($2 >= 75)) && [[ " $("$1" --list-gpu-code | tr '\n' ' ')" == *" sm_$2 "* ]]
}

# What a checkout's build takes where nothing was asked for: code for the GPUs that are here and for
# no others, which would take most of the time. After `recall`, which keeps only what was asked for.
build_for_gpus_here() {
  if [[ ${CUTLOSS_CUDA:-} == OFF || -n ${CUTLOSS_CUDA_ARCHITECTURES:-} ]]; then return; fi
  local gpus nvcc gpu targets=() why="nvidia-smi names no GPU here"
  gpus=$(gpus_here)
  nvcc=$(find_nvcc)
  if [[ -n $gpus && -z $nvcc ]]; then return; fi # settle_cuda says that there is no nvcc
  for gpu in $gpus; do
    if can_compile_for "$nvcc" "$gpu"; then
      targets+=("$gpu-real")
    else
      say "no CUDA code for the GPU with sm_$gpu: it is older than sm_75, or $nvcc does not know it"
      why="none of the GPUs here can be compiled for"
    fi
  done
  if ((${#targets[@]} > 0)); then
    CUTLOSS_CUDA_ARCHITECTURES=$(IFS=';' && printf %s "${targets[*]}")
  elif [[ ${CUTLOSS_CUDA:-} != ON ]]; then
    say "no CUDA engines: $why (CUTLOSS_CUDA=ON builds them all the same, for every architecture)"
    CUTLOSS_CUDA=OFF
  fi
}

# CMake keeps the compiler that a folder was first configured with, whatever CUDACXX says later.
forget_other_compilers() { # nvcc
  local cache kept
  for cache in build/*/CMakeCache.txt; do
    [[ -f $cache ]] || continue
    kept=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$cache")
    if [[ -n $kept && $kept != "$1" && $kept != *NOTFOUND ]]; then
      say "${cache%/*} is built anew: it was for $kept"
      rm -rf "$cache" "${cache%/*}/CMakeFiles"
    fi
  done
}

settle_cuda() {
  local nvcc=""
  CUDA=${CUTLOSS_CUDA:-ON}
  if [[ $CUDA == ON ]]; then nvcc=$(find_nvcc); fi
  if [[ -z $nvcc ]]; then
    local remedy="set CUDACXX to it, or fetch it with scripts/cuda_toolkit.sh"
    [[ ${CUTLOSS_CUDA:-} != ON ]] || die "CUTLOSS_CUDA=ON, but there is no nvcc: $remedy"
    [[ $CUDA == OFF ]] || say "no CUDA engines: nvcc was not found ($remedy)"
    CUDA=OFF
    cuda_flags=(-DCUTLOSS_CUDA=OFF)
    return
  fi
  install_cuda_headers "$nvcc"
  forget_other_compilers "$nvcc"
  export CUDACXX=$nvcc
  cuda_flags=(-DCUTLOSS_CUDA=ON -DCUTLASS_INCLUDE_DIR="$PWD/$CUDA_HEADERS/cutlass")
  if [[ -d $CUDA_HEADERS/cublas ]]; then
    cuda_flags+=(-DCUBLASLT_INCLUDE_DIR="$PWD/$CUDA_HEADERS/cublas")
  fi
  cuda_flags+=(-DCUTLOSS_CUDA_ARCHITECTURES="${CUTLOSS_CUDA_ARCHITECTURES:-}")
  say "CUDA engines with $nvcc, for ${CUTLOSS_CUDA_ARCHITECTURES:-every architecture}"
}
