#!/usr/bin/env bash
# Installs this clone in .venv on a fresh worker: uv fetches itself and Python 3.12, since TPU VM images have an older one.
#
#   bash launch/install.sh [EXTRAS]        EXTRAS of setup.py, say tpu,data (default) or cuda13,data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
  -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  -* | *[!a-z0-9,-]*) echo "error: EXTRAS are names of setup.py with commas between, say tpu,data; not '$1'." >&2; exit 2 ;;
esac
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python -e ".[${1:-tpu,data}]"
.venv/bin/python -c 'import jaxvlm, jax; print(f"jaxvlm {jaxvlm.__version__}, jax {jax.__version__} on", __import__("socket").gethostname())'
