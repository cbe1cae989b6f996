"""The process that runs cases: says which there are, then takes names from stdin and answers with results."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from importlib import metadata
from typing import Any

import torch

from gpu.case import Case
from gpu.record import DOES_NOT_FIT, FAILED, OUT_OF_MEMORY, RAN
from gpu.running import Bench
from lowmem_flux2.errors import DoesNotFit, RunError
from lowmem_flux2.runtime.device import torch_device

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes")


def work(part: str, bench: Bench, channel: int) -> int:
    """Answer on the file descriptor ``channel``, a JSON line each. Ends after a failure: its leavings are unknown."""
    _die_with_parent()
    _ = bench.machine  # read before this process holds anything of the card
    cases: list[Case] = importlib.import_module(f"gpu.{part}").cases(bench)
    _say(
        channel,
        {
            "cases": [
                {"name": case.name, "guess_s": case.guess_s, "timeout_s": case.timeout_s, "alone": case.alone}
                for case in cases
            ],
            "versions": _versions(),
            "card": _card(bench),
        },
    )
    of_name = {case.name: case for case in cases}
    for line in sys.stdin:
        answer = _run(of_name[line.strip()], bench)
        _say(channel, answer)
        if answer["status"] == FAILED:
            return 1
    return 0


def _run(case: Case, bench: Bench) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        answer = {"status": RAN, **case.run(bench)}
    except DoesNotFit as error:
        answer = {
            "status": DOES_NOT_FIT,
            "stage": error.stage,
            "resource": error.resource,
            "needed_bytes": error.needed_bytes,
            "available_bytes": error.available_bytes,
            "line": str(error).partition("\n")[0],
        }
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):  # a peer's
            answer = {"status": OUT_OF_MEMORY, "line": line}
        elif type(error) is RunError:  # ours, on the last rung of the ladder
            answer = {"status": OUT_OF_MEMORY, "met": False, "line": line}
        else:
            answer = {"status": FAILED, "error": "".join(traceback.format_exception(error)), "line": line}
    answer["seconds"] = time.perf_counter() - start
    gc.collect()
    if torch_device(bench.device).type == "cuda":
        torch.cuda.empty_cache()
    return answer


def _say(channel: int, answer: dict[str, Any]) -> None:
    with os.fdopen(channel, "wb", closefd=False) as file:
        file.write((json.dumps(answer) + "\n").encode())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.partition(" ")[0], "cuda": torch.version.cuda}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _card(bench: Bench) -> dict[str, Any] | None:
    """What the runtime says of the card; making the context here keeps that out of the first case."""
    device = torch_device(bench.device)
    if device.type != "cuda":
        return None
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    seen = torch.cuda.get_device_properties(device)
    return {
        "name": seen.name,
        "total_bytes": seen.total_memory,
        "multiprocessors": seen.multi_processor_count,
        "compute_capability": [seen.major, seen.minor],
        "context_bytes_assumed": bench.machine.hardware.context_bytes,
    }


def _die_with_parent() -> None:
    """On Linux, end when the parent does, however it ends: an orphan would hold the card (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
