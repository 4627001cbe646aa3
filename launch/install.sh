#!/usr/bin/env bash
# Installs this clone in .venv on a fresh worker: uv fetches itself and Python 3.12, since TPU VM images have an older one.
#
#   bash launch/install.sh [--dry-run] [EXTRAS]        EXTRAS of setup.py, say tpu,data,gcs (default) or cuda13,data,gcs
set -euo pipefail
script=${BASH_SOURCE[0]}
dry_run=""
case ${1:-} in
  -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$script"; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
case ${1:-} in
  -* | *[!a-z0-9,-]*) echo "error: EXTRAS are names of setup.py with commas between, say tpu,data,gcs; not '$1'. See --help." >&2; exit 2 ;;
esac

run() { if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

cd "$(dirname "$script")/.."
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || run sh -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
run uv venv --quiet --allow-existing --python 3.12 .venv
run uv pip install --quiet --python .venv/bin/python -e ".[${1:-tpu,data,gcs}]"
run .venv/bin/python -c "import jaxvlm, jax; print('jaxvlm', jaxvlm.__version__, 'with jax', jax.__version__)"
