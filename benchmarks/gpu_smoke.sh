#!/usr/bin/env bash
# A CUDA machine for half an hour, used in four pieces that end within ten minutes each:
#
#   bash benchmarks/gpu_smoke.sh PIECE OUT        PIECE is 1, 2, 3 or 4; records and logs go to OUT
#
# Without a network, put the missing wheels into .whl/ first (README, "On a GPU"): they are installed beside Python's
# own packages, into a temporary folder. PYTHON names the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
piece=${1:?which piece: 1, 2, 3 or 4}
out=${2:?a folder for the records}
python=${PYTHON:-python3}
status=0
mkdir -p "$out" || exit 2
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

suite() { # PART SECONDS
    "$python" benchmarks/gpu_suite.py --part "$1" --budget "$2" --out "$out" || status=1
}

case $piece in
1) # does it work at all?
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
    # Recovery is in the suite too, and there it leaves a record.
    timeout -k 5 110 "$python" -m pytest -m gpu -W default tests/gpu --ignore tests/gpu/test_recovery.py 2>&1 |
        tee "$out/tests.log" || status=1
    suite parity 150
    suite recovery 80
    suite compiled 170
    ;;
2) suite caps 380 ;;
3) suite peers 380 ;;
4)
    suite ratio 130
    suite disktier 220
    ;;
*) echo "no piece $piece: 1, 2, 3 or 4" >&2 && exit 2 ;;
esac
exit $status
