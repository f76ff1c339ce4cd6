#!/usr/bin/env bash
# Lays out the C++ sources with the pinned clang-format; with --check only says what differs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FORMAT=.venv/bin/clang-format
[[ -x $FORMAT ]] || { echo "format: $FORMAT is missing: run scripts/setup.sh" >&2; exit 1; }

mapfile -t sources < <(git ls-files '*.h' '*.cpp' '*.cc' '*.cu' '*.cuh')
if [[ ${1:-} == --check ]]; then
  $FORMAT --dry-run --Werror "${sources[@]}" || {
    echo "format: run \`make format\`" >&2
    exit 1
  }
  echo "format: ${#sources[@]} files are laid out as .clang-format says"
else
  $FORMAT -i "${sources[@]}"
fi
