# Sourced by setup.sh and wheel.sh, in the root of the checkout, after the Python packages: the oneDNN
# that cutloss is built with (onednn_flags for CMake).
#
#   dnnl_DIR  the folder of another oneDNN's CMake files (dnnl-config.cmake): nothing is fetched then

ONEDNN=.venv/onednn

install_onednn() {
  local stamp=$ONEDNN/stamp wheels=$ONEDNN/wheels want
  want="$(sha256sum scripts/requirements-onednn.txt)"
  if [[ -f $stamp && $(<$stamp) == "$want" ]]; then return; fi
  say "fetching oneDNN into $ONEDNN (scripts/requirements-onednn.txt)"
  rm -rf $ONEDNN
  mkdir -p $wheels
  .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d $wheels \
    -r scripts/requirements-onednn.txt
  local data
  data=$(.venv/bin/python -m zipfile -l $wheels/onednn_cpu_gomp-*.whl |
    grep -o '^[^ ]*\.data/data' | sort -u) # all of the list is read: whoever writes it must not fail
  .venv/bin/python scripts/unpack.py $ONEDNN $wheels/*.whl "$data/lib=lib" \
    "${data/onednn_cpu/onednn_devel_cpu}/lib=lib" "${data/onednn_cpu/onednn_devel_cpu}/include=include"
  rm -rf $wheels
  printf '%s\n' "$want" >$stamp
}

settle_onednn() {
  if [[ -n ${dnnl_DIR:-} ]]; then
    onednn_flags=(-Ddnnl_DIR="$dnnl_DIR")
    return
  fi
  install_onednn
  onednn_flags=(-Ddnnl_DIR="$PWD/$ONEDNN/lib/cmake/dnnl")
}
