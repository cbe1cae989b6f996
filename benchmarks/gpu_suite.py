"""What the engine does on a CUDA card, with random full-size weights made there: no download, no checkpoint.

    python benchmarks/gpu_suite.py --part parity caps --out results
    python benchmarks/gpu_suite.py --device cpu --tiny --part all --out results     # does it work? toys, on a CPU

    parity     (a) streamed equals resident bit for bit, in each weight format, at full block sizes
    caps       (b) dev, klein-9b and klein-4b at 1024 x 1024 under caps of 24 to 4 GiB, predicted beside measured
    ratio      (c) step time streamed over step time resident
    peers      (d) the same work through diffusers' group, model and sequential offload
    recovery   (e) a real out of memory in each stage
    disktier   (f) weights on disk, read past the page cache
    compiled   (g) blocks compiled one by one, streamed

Each part prints a line a case and one JSON line at its end, keeps to its time (--budget), and keeps its record in
OUT/<machine>-<part>.json, written after every case; called again it goes on where it was. What a case prints beyond
that is in the .log beside the record. A capped run proves memory, never bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from gpu.record import Record, record_path  # noqa: E402
from gpu.supervise import Card, Supervisor  # noqa: E402

from lowmem_flux2.errors import LowMemFlux2Error  # noqa: E402
from lowmem_flux2.planning.detect import read_nvml, visible_cards  # noqa: E402
from lowmem_flux2.planning.job import AUTO, Machine, resolve_machine  # noqa: E402
from lowmem_flux2.version import __version__  # noqa: E402

BUDGET_S = {
    "parity": 300.0,
    "caps": 460.0,
    "ratio": 300.0,
    "peers": 460.0,
    "recovery": 150.0,
    "disktier": 300.0,
    "compiled": 240.0,
}
"""Part -> seconds, all within eight minutes, start and end included."""


def main() -> int:
    arguments = parse(None)
    if arguments.channel is not None:
        return _work(arguments)
    parts = list(BUDGET_S) if arguments.part == ["all"] else arguments.part
    try:
        machine = resolve_machine(arguments.profile, arguments.device)
        done = [run_part(part, arguments, machine) for part in parts]
    except LowMemFlux2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if all(part["passed"] for part in done) else 1


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """The options; None takes those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=(*BUDGET_S, "all"), required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the records are")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--profile", default=AUTO, help="auto, a profile's name or a TOML file, as for 'plan'")
    parser.add_argument("--tiny", action="store_true", help="toy widths: does the suite work?")
    parser.add_argument("--budget", type=float, help="seconds for each part, instead of its own")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="only these cases")
    parser.add_argument("--scratch", type=Path, help="for weights on disk, up to 40 GiB; default: a temporary folder")
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def _work(arguments: argparse.Namespace) -> int:
    from gpu.running import Bench
    from gpu.worker import work

    bench = Bench(arguments.device, arguments.tiny, arguments.profile, arguments.scratch, arguments.out)
    return work(arguments.part[0], bench, arguments.channel)


def run_part(part: str, arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Run one part; its summary. ``passed`` says whether every case is on record and reached its goal."""
    start = time.monotonic()
    budget = arguments.budget or BUDGET_S[part]
    cards = visible_cards(read_nvml(), None) if machine.hardware.device == "cuda" else ()
    about: dict[str, Any] = {
        "part": part,
        "version": __version__,
        "machine": machine.hardware.name,
        "tiny": arguments.tiny,
        "cards": [asdict(card) for card in cards],
        "hardware": asdict(machine.hardware),
    }
    record = Record.open(record_path(arguments.out, machine.hardware.name, part), about)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as temporary:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--device", arguments.device]
        command += ["--profile", arguments.profile, "--out", str(arguments.out)]
        command += ["--scratch", str(arguments.scratch or temporary), *(["--tiny"] if arguments.tiny else [])]
        log = record.path.with_suffix(".log")
        supervisor = Supervisor(command, record, _card(arguments.device), log, start + budget, arguments.only)
        supervisor.run()
    counts: dict[str, int] = {}
    for case in record.cases:
        counts[case["status"]] = counts.get(case["status"], 0) + 1
    summary = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - start,
        "budget_s": budget,
        "cut_short": supervisor.cut_short,
        "counts": counts,
        "missed": record.missed,
    }
    record.write(**summary, **supervisor.about)
    named = {"part": part, "machine": machine.hardware.name, **summary}
    print(json.dumps(named), flush=True)
    passed = not supervisor.cut_short and not record.missed and not set(counts) & {"failed", "crashed"}
    return {**named, "passed": passed}


def _card(device: str) -> Card:
    """The card that ``device`` means."""
    if device == "cpu":
        return Card(None)
    import os

    cards = visible_cards(read_nvml(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    index = int(device.partition(":")[2] or 0)
    return Card(cards[index].uuid if index < len(cards) else None)


if __name__ == "__main__":
    sys.exit(main())
