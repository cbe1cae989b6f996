"""GPUs as NVML describes them, without CUDA: what they are, and who uses them. Never imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_flux2.errors import UsageError


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process on a card. ``used_bytes`` is None where the driver does not say (Windows, containers)."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class NvmlCard:
    """One GPU as NVML describes it.

    Attributes:
        name: as ``nvidia-smi`` prints it.
        uuid: ``GPU-...``, as ``CUDA_VISIBLE_DEVICES`` takes it.
        total_bytes, free_bytes: device memory now; the difference includes what the driver keeps.
        compute_capability: (major, minor).
        own_bytes: the part in use by this very process (its CUDA context and allocations).
        cuda_cores: None where the driver does not say.
        pcie_generation, pcie_width: best link of card and slot together; None where the driver does not say.
    """

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    own_bytes: int = 0
    cuda_cores: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None


@contextmanager
def _session() -> Iterator[Any]:
    """pynvml, initialised and shut down again; None without NVML, driver or GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield None
        return
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def read_nvml() -> tuple[NvmlCard, ...]:
    """Every GPU in NVML's (PCI bus) order; empty without NVML, driver or GPU. NVML is shut down before it returns."""
    cards = []
    with _session() as nvml:
        if nvml is None:
            return ()
        with suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetCount()):
                with suppress(nvml.NVMLError):  # a card that cannot be queried (lost, no permission) is not usable
                    cards.append(_read_card(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
    return tuple(cards)


def card_processes(uuid: str) -> tuple[CardProcess, ...]:
    """Who else has memory on the card, most first; empty where NVML does not say."""
    found: dict[int, CardProcess] = {}
    with _session() as nvml:
        if nvml is None:
            return ()
        for listing in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            with suppress(nvml.NVMLError):
                for process in listing(nvml.nvmlDeviceGetHandleByUUID(uuid)):
                    if process.pid != os.getpid():
                        found[process.pid] = CardProcess(
                            process.pid, _process_name(nvml, process.pid), process.usedGpuMemory
                        )
    return tuple(sorted(found.values(), key=lambda process: -(process.used_bytes or 0)))


def _process_name(nvml: Any, pid: int) -> str:
    with suppress(nvml.NVMLError, UnicodeDecodeError):
        return Path(_text(nvml.nvmlSystemGetProcessName(pid)).partition(" ")[0]).name
    return "unknown"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read_card(nvml: Any, handle: Any) -> NvmlCard:
    def optional(query: Callable[[Any], int]) -> int | None:
        with suppress(nvml.NVMLError):  # older drivers and some cards lack it
            return query(handle) or None
        return None

    own_bytes = 0
    with suppress(nvml.NVMLError):
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        own_bytes = sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return NvmlCard(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=(major, minor),
        own_bytes=own_bytes,
        cuda_cores=optional(nvml.nvmlDeviceGetNumGpuCores),
        pcie_generation=optional(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=optional(nvml.nvmlDeviceGetMaxPcieLinkWidth),
    )


def visible_cards(cards: Sequence[NvmlCard], mask: str | None) -> tuple[NvmlCard, ...]:
    """The cards that CUDA will see under ``CUDA_VISIBLE_DEVICES=mask`` (None: unset), in CUDA's order.

    Indices are taken in NVML's order, which is CUDA's under ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` and on machines with one
    kind of card. As in CUDA, the first entry that names no card ends the list.
    """
    if mask is None:
        return tuple(cards)
    chosen = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.startswith("MIG-"):
            raise UsageError("MIG slices are not detected: pass --profile with a TOML file whose vram is the slice's")
        if re.fullmatch(r"\d+", entry):
            found = [cards[int(entry)]] if int(entry) < len(cards) else []
        else:
            found = [card for card in cards if entry and card.uuid.startswith(entry)]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)
