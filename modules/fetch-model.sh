#!/bin/sh
# Brings one model to a path of its own and verifies it, as the units of modules/models.nix do: fetch-model SOURCE TARGET SHA256...
# For units and scripts that are not rendered by the modules; `pascaline` must be on PATH. Exit codes: `pascaline --help`.
set -eu
if [ $# -lt 3 ]; then
  echo "usage: fetch-model SOURCE TARGET SHA256..." >&2
  exit 2
fi
source=$1 target=$2
shift 2
digests=$(IFS=,; echo "$*")
exec pascaline models add "$(basename -- "$target" .gguf)" "$source" --sha256="$digests" --target="$target" --replace
