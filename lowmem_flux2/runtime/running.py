"""What only a run needs to know, as against a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Running:
    """Where a run computes, where its weights may come from, and what it may do when memory runs out.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        cache: folder of prepared weights and of the prompt cache.
        prompt_cache_bytes: what the prompt cache may take on disk; 0 for none.
        offline: never touch the network.
        may_prepare: quantize weights that are not prepared.
        allow_format_change: the recovery ladder may end with smaller weight formats.
    """

    device: str
    cache: Path
    prompt_cache_bytes: int
    offline: bool = False
    may_prepare: bool = True
    allow_format_change: bool = False
