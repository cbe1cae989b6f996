"""What one stage is predicted to cost: bytes on either side of the link, and seconds of each lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bottleneck = Literal["compute", "link", "disk", "load"]


@dataclass(frozen=True, slots=True)
class StageCost:
    """Predicted cost of one stage. Sizes in bytes, times in seconds.

    ``host_bytes`` counts everything resident in RAM that is not pinned: Python and libraries (``process_bytes``), the
    pageable arena (``host_pageable_bytes``), what loading passes through, the stage's results, and on ``device=cpu``
    the resident weights, slots and activations too.
    ``activation_bytes`` includes the format's transient, and the conditioning weights where they need more than what
    comes after them; ``workspace_bytes`` is what kernels hold at the peak beside tensors. ``time_s`` is ``load_s +
    run_s``, from a cold page cache. While the stage runs, three lanes work, at the same time where they can:
    ``compute_s``, ``copy_s`` (streamed blocks to the device) and ``read_s`` (streamed blocks from disk). ``expand_s``
    is the part of ``compute_s`` that expands quantized weights; ``waiting_s`` is the part of ``run_s`` that computes
    nothing; ``rounds`` are the passes over the blocks.
    """

    resident_bytes: int = 0
    slot_bytes: int = 0
    activation_bytes: int = 0
    workspace_bytes: int = 0
    margin_bytes: int = 0
    context_bytes: int = 0
    host_pinned_bytes: int = 0
    host_bytes: int = 0
    host_pageable_bytes: int = 0
    process_bytes: int = 0
    disk_bytes: int = 0
    h2d_bytes: int = 0
    load_s: float = 0.0
    run_s: float = 0.0
    time_s: float = 0.0
    compute_s: float = 0.0
    expand_s: float = 0.0
    copy_s: float = 0.0
    read_s: float = 0.0
    waiting_s: float = 0.0
    rounds: int = 1
    fidelity_error: float = 0.0
    fidelity_provenance: str = ""
    on_host: bool = False

    @property
    def bottleneck(self) -> Bottleneck:
        """What most of the stage's time goes to: a shorter one of the others would win less."""
        busy: dict[Bottleneck, float] = {
            "compute": self.compute_s,
            "link": self.copy_s,
            "disk": self.read_s,
            "load": self.load_s,
        }
        return max(busy, key=lambda kind: busy[kind])

    @property
    def peak_vram_bytes(self) -> int:
        """Device memory of our process, CUDA context included; 0 on ``device=cpu``."""
        if self.on_host:
            return 0
        weights = self.resident_bytes + self.slot_bytes
        return self.context_bytes + weights + self.activation_bytes + self.workspace_bytes + self.margin_bytes

    @property
    def peak_ram_bytes(self) -> int:
        """Anonymous + shared + pinned memory; file-backed pages (page cache) are not in it."""
        return self.host_pinned_bytes + self.host_bytes
