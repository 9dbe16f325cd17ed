#!/usr/bin/env bash
# The peers of benchmarks/peers, in an environment of their own: bash benchmarks/peers/build_env.sh DIR
# The same torch and transformers as ours, so that a ratio compares the programs and not two builds of torch.
set -euo pipefail
target=${1:?usage: build_env.sh DIR}
uv venv --quiet --allow-existing --python "${PYTHON:-3}" "$target"
uv pip install --quiet --compile-bytecode --python "$target/bin/python" \
  "trl==1.16.*" "torch==2.13.0" "transformers==5.19.0" "datasets==5.2.0" "accelerate>=1.12,<2"
