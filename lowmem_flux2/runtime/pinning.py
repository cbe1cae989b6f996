"""How much host memory may be page-locked, and what that is worth."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.units import format_bytes


@dataclass(slots=True)
class Pinning:
    """What may be page-locked, and what copies are worth with and without it, as the plan has it.

    One for a run: all its stages and attempts share it, so that a refusal is told once.
    """

    limit_bytes: int
    pinned_bytes_per_s: float
    pageable_bytes_per_s: float
    is_told: bool = False

    @staticmethod
    def of(plan: Plan) -> Pinning:
        hardware = plan.hardware
        return Pinning(plan.limits.pinnable_bytes, hardware.h2d_pinned_bytes_per_s, hardware.h2d_pageable_bytes_per_s)

    def warning(self, size_bytes: int, failure: str) -> str | None:
        """One line about memory that could not be pinned; None where that was told before."""
        if self.is_told:
            return None
        self.is_told = True
        pinned, pageable = self.pinned_bytes_per_s, self.pageable_bytes_per_s
        return (
            f"could not pin {format_bytes(size_bytes)} ({failure}): copying from pageable memory instead, planned at "
            f"{pageable / 1e9:.1f} GB/s in place of {pinned / 1e9:.1f} GB/s, so {pinned / pageable:.1f} times slower; "
            "raise the memlock limit (ulimit -l)"
        )
