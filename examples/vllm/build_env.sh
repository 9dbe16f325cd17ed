#!/usr/bin/env bash
# Build an environment with vLLM for a CPU, apart from this project's own, and print what inference.vllm.python names.
#
#   bash examples/vllm/build_env.sh DIR
#
# vLLM brings pins of its own, and inference is a process of its own, so the two never meet in one environment. Only
# packages from the configured index are used, at the versions of pins.txt; torch is the one that `uv sync` of this
# project has fetched already. Started again, it brings an environment up to date, which takes a second.
set -euo pipefail
usage="usage: bash examples/vllm/build_env.sh DIR"
target=${1:?$usage}
here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)

mkdir -p "$target"
target=$(cd "$target" && pwd)
if ! [ -x "$target/bin/python" ]; then
  uv venv --quiet --allow-existing --project "$repository" "$target"
fi
# From outside the repository, or uv would apply this project's constraints to vLLM's environment.
cd /
uv pip install --quiet --python "$target/bin/python" --no-deps --compile-bytecode --requirements "$here/pins.txt"
uv pip install --quiet --python "$target/bin/python" --no-deps --editable "$repository"
echo "$target/bin/python"
