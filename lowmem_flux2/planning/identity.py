"""Which machine this is: what a calibration and a report are true for, and for no other."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Identity:
    """One compute device in its host.

    Attributes:
        cpu: the CPU's model name.
        threads: that torch computes with, where the CPU computes; 0 where a GPU does.
        gpu: the card's name as NVML prints it; "" on a CPU.
        gpu_id: first 12 hex digits of the SHA-256 of the card's UUID: tells two alike cards apart, names neither.
    """

    cpu: str
    threads: int
    gpu: str = ""
    gpu_id: str = ""

    def __str__(self) -> str:
        if self.gpu:
            return f"{self.gpu} ({self.gpu_id}) with {self.cpu}"
        return f"{self.cpu}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def slug(self) -> str:
        """A file name that no other machine has: readable words and a digest."""
        words = re.sub(r"[^a-z0-9]+", "-", (self.gpu or f"{self.cpu} {self.threads}").lower()).strip("-")
        digest = hashlib.sha256("\n".join((self.cpu, str(self.threads), self.gpu, self.gpu_id)).encode()).hexdigest()
        return f"{words[:48].strip('-')}-{digest[:8]}"


def hashed_uuid(uuid: str) -> str:
    """``Identity.gpu_id`` of a card's UUID."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:12]


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """As ``/proc/cpuinfo`` names it, else as Python's ``platform`` does."""
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def compute_threads() -> int:
    """OMP_NUM_THREADS, which torch follows, else the CPUs that this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
