"""Measures this machine for ``lowmem-flux2 calibrate``: which measurements, in which order, within which time.

One that fails is reported, and the others go on. Microbenchmarks give the rates; what no benchmark of one operation
shows (setting a stage up, its first pass, the overhead of a block) comes from runs of the embedded model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowmem_flux2.errors import RunError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.detect import available_ram_bytes, find_card
from lowmem_flux2.planning.hardware import ALLOCATOR_OVERHEAD_BYTES, Hardware
from lowmem_flux2.planning.job import Machine
from lowmem_flux2.planning.nvml import NvmlCard
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.planning.sources import EMBEDDED, resolve_model
from lowmem_flux2.report import Report
from lowmem_flux2.runtime import measurements, transfers
from lowmem_flux2.runtime.device import (
    allocator_use,
    host_use,
    release_memory,
    synchronize,
    torch_device,
)
from lowmem_flux2.runtime.engine import Engine
from lowmem_flux2.runtime.measurements import Bench, Decoded, Reading
from lowmem_flux2.runtime.observer import Silent
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.units import MIB, format_bytes

PROMPT, STEPS, MOST_RUNS = "a large red circle in the center on a blue background", 8, 5
TOKENIZER_BYTES = 41 * MIB
"""RAM of a tokenizer and the configs, which the libraries' figure includes. Assumed: the embedded ones are tiny."""


@dataclass(slots=True)
class Measured:
    """What was measured.

    Attributes:
        readings: the numbers that are a field of ``Hardware`` as they are.
        decoded: the VAE's decoder, for the share that it reaches of the matmul rate.
        runs: reports of the embedded model in this process, the first with kernels cold; for the overheads.
        failures: a line for each measurement that gave nothing.
    """

    readings: list[Reading] = field(default_factory=list)
    decoded: Decoded | None = None
    runs: list[Report] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        """The reading of a field, if there is one."""
        return next((reading.value for reading in self.readings if reading.field == name), None)


@dataclass(frozen=True, slots=True)
class _Step:
    """One measurement: what it is called, its share of the time, and what it adds."""

    label: str
    weight: float
    take: Callable[[], Sequence[Reading]]


class Calibrator:
    """One calibration of one device.

    Args:
        device_name: ``cpu``, ``cuda`` or ``cuda:1``.
        hardware: what is assumed of it now: which compute classes there are.
        folder: on the disk to measure.
        budget_s: about how long all measurements may take; importing the libraries comes on top.
        on_step: told what is measured, with its number and how many there are, before each.
    """

    def __init__(
        self,
        device_name: str,
        hardware: Hardware,
        folder: Path,
        budget_s: float,
        on_step: Callable[[str, int, int], None] = lambda label, number, total: None,
    ) -> None:
        self._name = device_name
        self._hardware = hardware
        self._folder = folder
        self._budget_s = budget_s
        self._on_step = on_step
        self._measured = Measured()

    @torch.no_grad()
    def run(self) -> Measured:
        """Take every measurement that the time allows.

        Raises:
            UsageError: this torch finds no such device.
        """
        host_before, card_before = host_use().anonymous_bytes, find_card(self._name)
        self._add("libraries_host_bytes", host_before + TOKENIZER_BYTES, "anonymous RAM with the libraries imported")
        device = torch_device(self._name)
        dtype = compute_dtype(Selection(), self._hardware)
        if device.type == "cuda":
            _touch(device)
            added = max(host_use().anonymous_bytes - host_before, 0)
            self._add("cuda_host_bytes", added, "anonymous RAM added by CUDA and its libraries")
        free = available_ram_bytes() if card_before is None else card_before.free_bytes
        bench = Bench(device, dtype, measurements.hidden_size(device, free))
        steps = self._steps(bench, card_before)
        end, left = time.perf_counter() + self._budget_s, sum(step.weight for step in steps)
        for number, step in enumerate(steps, start=1):
            self._on_step(step.label, number, len(steps))
            bench.slice_s = (end - time.perf_counter()) * step.weight / left
            left -= step.weight
            if bench.slice_s <= 0:
                self._measured.failures.append(f"{step.label}: no time left; give more with --seconds")
                continue
            try:
                self._measured.readings += step.take()
            except Exception as error:  # whatever a driver or library throws: the other measurements go on
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._measured.failures.append(f"{step.label}: {reason}")
            release_memory(device)
        self._apply_block_share()
        return self._measured

    def _steps(self, bench: Bench, card: NvmlCard | None) -> list[_Step]:
        """In order: the embedded model first, while kernels are cold; the context last, when all have been loaded.

        What convolutions hold comes early: it counts peaks anew, and the allocator's is of all that follows.
        """
        main, rates = bench.dtype, self._hardware.matmul_flops_per_s
        others = [kind for kind in rates if kind != main]
        steps = [
            _Step("the embedded model", 8, lambda: self._embedded(bench)),
            _Step("a convolution's copies", 1, lambda: [measurements.convolution_copies(bench)]),
            *(_Step(f"matmul {kind}", 5 if kind == main else 3, _matmul(bench, kind)) for kind in (main, *others)),
            _Step("attention", 3, lambda: [measurements.attention(bench)]),
            _Step("memory", 1, lambda: [measurements.memory(bench)]),
            _Step("expanding weights", 4, lambda: measurements.expansions(bench)),
            _Step("a whole block", 4, lambda: self._block(bench)),
            _Step("the VAE's decoder", 6, lambda: self._decode(bench)),
            _Step("copies", 3, lambda: transfers.copies(bench)),
            _Step("disk", 6, lambda: transfers.disk(bench, self._folder)),
        ]
        if card is not None:
            steps.append(_Step("context and allocator", 1, lambda: self._device_memory(bench.device, card)))
        return steps

    # ----------------------------------------------------------------------------------------------- measurements

    def _add(self, name: str, value: float, how: str) -> None:
        self._measured.readings.append(Reading(name, value, how))

    def _embedded(self, bench: Bench) -> list[Reading]:
        machine = Machine(self._hardware, self._hardware.name, detected=True, device=self._name)
        running = Running(self._name, cache_folder(), prompt_cache_bytes=0, offline=True)
        engine = Engine.of(resolve_model(EMBEDDED), machine, Selection(), running, Silent())
        end = time.perf_counter() + bench.slice_s
        while len(self._measured.runs) < MOST_RUNS:
            start = time.perf_counter()
            made = engine.generate(PROMPT, num_inference_steps=STEPS, seed=0, output_type="pt")
            self._measured.runs.append(made.report)
            now = time.perf_counter()
            if len(self._measured.runs) > 1 and now + (now - start) > end:
                break
        return []

    def _block(self, bench: Bench) -> list[Reading]:
        rates = [self._measured.value(name) for name in (f"matmul_flops_per_s.{bench.dtype}", "attention_flops_per_s")]
        if None in rates:
            raise RunError("needs the matmul and the attention rate, which were not measured")
        return [measurements.block_share(bench, rates[0] or 1, rates[1] or 1)]

    def _decode(self, bench: Bench) -> list[Reading]:
        self._measured.decoded = measurements.decode(bench)
        return []

    def _device_memory(self, device: torch.device, before: NvmlCard) -> list[Reading]:
        """The context: what the driver counts for us beyond what the allocator holds. Workspaces: what stays in it."""
        release_memory(device)
        use, now = allocator_use(device), find_card(self._name)
        assert now is not None
        ours, how = now.own_bytes, "NVML's figure for this process"
        if not ours:  # in a container NVML knows processes by numbers that are not ours
            ours, how = before.free_bytes - now.free_bytes, "memory that went while this process ran (NVML)"
        overhead = use.peak_reserved_bytes - use.peak_allocated_bytes + use.allocated_bytes
        kept = max(overhead, ALLOCATOR_OVERHEAD_BYTES)
        words = f"{format_bytes(overhead)} reserved beyond tensors at the peak, and in workspaces"
        if kept > overhead:
            words += f"; {format_bytes(kept)} kept as assumed, for kernels that were not run"
        readings = [Reading("allocator_overhead_bytes", kept, words)]
        if ours > use.reserved_bytes:
            context = ours - use.reserved_bytes
            readings.append(Reading("context_bytes", context, f"{how}, less what the allocator holds"))
        return readings

    def _apply_block_share(self) -> None:
        """Matmul rates as a plan may count on them: times what a whole block reaches."""
        share = next((reading for reading in self._measured.readings if reading.field == "block_share"), None)
        if share is None:
            return
        self._measured.readings = [
            Reading(one.field, one.value * share.value, f"{one.how}; {share.how}")
            if one.field.startswith("matmul_flops_per_s.")
            else one
            for one in self._measured.readings
            if one is not share
        ]


def _matmul(bench: Bench, kind: str) -> Callable[[], Sequence[Reading]]:
    return lambda: [measurements.matmul(bench, kind)]


def _touch(device: torch.device) -> None:
    """Initialise CUDA with its matmul and convolution libraries."""
    picture = torch.ones(1, 8, 16, 16, device=device)
    torch.nn.functional.conv2d(picture, torch.ones(8, 8, 3, 3, device=device))
    picture[0, 0] @ picture[0, 1]
    synchronize(device)
