#!/usr/bin/env bash
# gpu_smoke.py with wheels that the machine lacks:
#
#   bash benchmarks/gpu_smoke.sh --out OUT [--budget SECONDS]      as gpu_smoke.py, which says how to use 900 s of a card
#
# Without a network, put the missing wheels into .whl/ first (README, "On a GPU"): they are installed beside Python's
# own packages, into a temporary folder. PYTHON names the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" benchmarks/gpu_smoke.py "$@"
