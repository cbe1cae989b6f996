#!/usr/bin/env bash
# setup-venv.sh VENV REQUIREMENT: make a virtual environment and install this checkout into it, editable.
# Without an NVIDIA GPU a CPU build of torch is taken where one can be had: the usual Linux build brings 3 GB of CUDA.
set -euo pipefail
venv=$1 requirement=$2

fail() { echo "setup: $*" >&2; exit 1; }

if [ ! -x "$venv/bin/python" ]; then
    python=
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1 || echo missing)); install one"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks the venv module; on Debian and Ubuntu: apt install python3-venv"
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "could not create $venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        echo "setup: NVIDIA GPU found: installing the usual torch"
        "${pip[@]}" install torch || fail "torch could not be installed"
    else
        echo "setup: no NVIDIA GPU: installing a CPU build of torch"
        "${pip[@]}" install --no-index --no-deps torch==2.13.0 2>/dev/null ||
            "${pip[@]}" install --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu 'torch>=2.7' 2>/dev/null ||
            "${pip[@]}" install torch || fail "torch could not be installed: is there a network?"
    fi
fi
echo "setup: installing $requirement"
# The torch that is there stays: a newer one from the index could be a build of another kind.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$venv/bin/python" -c "from importlib.metadata import version; print('torch==' + version('torch').split('+')[0])" >"$constraints"
"${pip[@]}" install --constraint "$constraints" --editable "$requirement" || fail "installing $requirement failed; the reason is above"
