"""What this machine has, for ``--profile auto``: NVML for the card, psutil and cgroups for RAM. Never imports torch.

Rates are not measured here. A machine that ``calibrate`` has measured gets its own, from the cache folder; else a known
card gets its profile's, an unknown one those of the nearest known card, scaled by its core count. Sizes, and without a
calibration the PCIe link, are read from the machine each time.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowmem_flux2.errors import ProfileError, UsageError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.hardware import (
    CLASS_NEEDS,
    Hardware,
    Profile,
    list_profiles,
    load_profile,
    read_profile,
    with_value,
)
from lowmem_flux2.planning.identity import Identity, compute_threads, cpu_model, hashed_uuid
from lowmem_flux2.planning.nvml import NvmlCard, read_nvml, visible_cards
from lowmem_flux2.units import GIB, MIB, format_bytes

VRAM_TOLERANCE = 0.10  # NVML's total is up to a few per cent under the nominal size (ECC, firmware)
PCIE4_X16_BYTES_PER_S = 25e9  # pinned copies in practice; each generation doubles it, each lane takes 1/16
PAGEABLE_SHARE, PAGEABLE_MOST_BYTES_PER_S = 0.4, 9e9  # of the pinned rate; the staging copy in host memory caps it
LOCK_LIMIT_DEFAULT_SHARE = 0.13  # systemd's and distributions' default RLIMIT_MEMLOCK: 8 MiB or an eighth of RAM
BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CGROUP_MOUNT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Host:
    """RAM and CPU: ``ram_bytes`` that we may use, ``pinnable_bytes`` of it, and the flags of ``/proc/cpuinfo``."""

    ram_bytes: int
    pinnable_bytes: int
    cpu_flags: frozenset[str]
    cpu: str = field(default_factory=cpu_model)
    threads: int = field(default_factory=compute_threads)


# --- the card ---


def hardware_of(card: NvmlCard, host: Host, *, calibrated: bool = True) -> Hardware:
    """``Hardware`` of a card in this host: its calibration's rates, the matching profile's, or the nearest card's."""
    measured = calibration_of(identity_of(card, host)) if calibrated else None
    if measured is not None:
        return _in_host(_in_slot(measured.hardware, card), host)
    profiles = [read_profile(name) for name in list_profiles()]
    known = [profile for profile in profiles if profile.hardware.device == "cuda"]
    match = next((profile for profile in known if _matches(profile, card)), None)
    profile = match or min(known, key=lambda candidate: _distance(candidate, card))
    found = match.hardware if match else _derived(profile, card)
    return _in_host(_on_link(_in_slot(found, card), card), host)


def _in_slot(found: Hardware, card: NvmlCard) -> Hardware:
    """The same with the memory that this card has, and what others hold of it now."""
    others = max(card.total_bytes - card.free_bytes - card.own_bytes, 0)
    reserve = min(found.context_bytes + others, max(card.total_bytes - MIB, 0))
    provenance = dict(found.provenance)
    provenance["vram_bytes"] = f"NVML: total memory of {card.name}"
    provenance["vram_reserve_bytes"] = f"context + {format_bytes(others)} that driver and others hold now (NVML)"
    provenance["compute_capability"] = "NVML"
    return replace(
        found,
        vram_bytes=card.total_bytes,
        vram_reserve_bytes=reserve,
        context_bytes=min(found.context_bytes, reserve),
        compute_capability=card.compute_capability,
        provenance=provenance,
    )


def _plain(name: str) -> str:
    """Card name without the vendor, which older drivers leave out."""
    return name.casefold().removeprefix("nvidia ").strip()


def _likeness(profile: Profile, card: NvmlCard) -> float:
    """1.0 for the same name, else how alike the most alike name is."""
    return max(difflib.SequenceMatcher(None, _plain(name), _plain(card.name)).ratio() for name in profile.nvml_names)


def _vram_gap(profile: Profile, card: NvmlCard) -> float:
    return abs(card.total_bytes - profile.hardware.vram_bytes) / profile.hardware.vram_bytes


def _matches(profile: Profile, card: NvmlCard) -> bool:
    return _likeness(profile, card) == 1.0 and _vram_gap(profile, card) <= VRAM_TOLERANCE


def _distance(profile: Profile, card: NvmlCard) -> tuple[bool, int, float, float]:
    """Sort key, nearest first: not newer than the card, then capability, then name, then VRAM."""
    known, own = profile.hardware.compute_capability or (0, 0), card.compute_capability
    gap = abs(10 * (known[0] - own[0]) + known[1] - own[1])
    return known > own, gap, -_likeness(profile, card), _vram_gap(profile, card)


def _cores_per_sm(capability: tuple[int, int]) -> int:
    """FP32 cores in an SM: 64 on Volta, Turing and A100, else 128."""
    return 64 if capability in {(6, 0), (7, 0), (7, 2), (7, 5), (8, 0)} else 128


def _derived(profile: Profile, card: NvmlCard) -> Hardware:
    """An unknown card: the profile's rates times the ratio of SMs, less the classes that the card lacks."""
    near, ratio, how = profile.hardware, 1.0, "unscaled"
    if card.cuda_cores:
        sms = card.cuda_cores / _cores_per_sm(card.compute_capability)
        ratio, how = sms / profile.sms, f"x {sms:g} / {profile.sms} SMs"
    rates = {
        kind: rate * ratio
        for kind, rate in near.matmul_flops_per_s.items()
        if card.compute_capability >= CLASS_NEEDS.get(kind, (0, 0))
    }
    compute = {f"matmul_flops_per_s.{kind}" for kind in rates} | {"attention_flops_per_s"}
    provenance = {
        field: f"derived from {near.name}{f', {how}' if field in compute else ''}: {source}"
        for field, source in near.provenance.items()
        if field in compute or not field.startswith("matmul_flops_per_s.")
    }
    slug = re.sub(r"[^a-z0-9]+", "-", _plain(card.name).removeprefix("geforce ")).strip("-")
    return replace(
        near,
        name=f"{slug}-{round(card.total_bytes / GIB)}gb",
        matmul_flops_per_s=rates,
        attention_flops_per_s=min(near.attention_flops_per_s * ratio, max(rates.values())),
        provenance=provenance,
    )


def _on_link(found: Hardware, card: NvmlCard) -> Hardware:
    """The same with the PCIe link that card and slot have together, where NVML says."""
    if not card.pcie_generation or not card.pcie_width:
        return found
    pinned = PCIE4_X16_BYTES_PER_S * 2.0 ** (card.pcie_generation - 4) * card.pcie_width / 16
    link = f"NVML: PCIe {card.pcie_generation} x{card.pcie_width}"
    provenance = dict(found.provenance)
    provenance["h2d_pinned_bytes_per_s"] = f"{link}, about 80 % of nominal, assumption"
    provenance["h2d_pageable_bytes_per_s"] = f"{link}: {PAGEABLE_SHARE:g} x pinned, at most 9 GB/s, assumption"
    return replace(
        found,
        h2d_pinned_bytes_per_s=pinned,
        h2d_pageable_bytes_per_s=min(PAGEABLE_SHARE * pinned, PAGEABLE_MOST_BYTES_PER_S),
        provenance=provenance,
    )


# --- the host ---


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """A memory cgroup that holds us: its limit, use, and the file cache in that use, which the kernel gives back."""

    limit_bytes: int
    used_bytes: int
    cache_bytes: int


def cgroup_memory(proc_cgroup: Path = PROC_CGROUP, mount: Path = CGROUP_MOUNT) -> tuple[CgroupMemory, ...]:
    """Every limited memory cgroup from our own up to the root, v1 and v2. Empty without a limit, or off Linux."""
    try:
        entries = [line.split(":", 2) for line in proc_cgroup.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        return ()
    levels: list[CgroupMemory] = []
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            levels += _walk(mount / "memory", path, *files)
        elif not controllers:
            for root in (mount, mount / "unified"):
                levels += _walk(root, path, "memory.max", "memory.current", "inactive_file")
    return tuple(levels)


def _walk(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[CgroupMemory]:
    """Limited cgroups on the way from ``path`` up to ``root``.

    A container sees its host's path but its own mount: folders that are not there are passed over, and the mount's root
    then holds the container's limit.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        limit_bytes = _number(folder / limit)
        if limit_bytes is not None and limit_bytes < 1 << 60:  # v1 says "no limit" as 2^63 less a page
            yield CgroupMemory(limit_bytes, _number(folder / used) or 0, _stat(folder / "memory.stat", cache))


def _number(path: Path) -> int | None:
    """The integer in a file; None for ``max`` or no such file."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _stat(path: Path, key: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.isdigit():
                return int(value)
    return 0


def ram_limit_bytes() -> int:
    """RAM that this process may ever use: the machine's total or the tightest cgroup limit, whichever is less."""
    import psutil

    return min([psutil.virtual_memory().total, *(level.limit_bytes for level in cgroup_memory())])


def available_ram_bytes() -> int:
    """RAM that this process could take now without swapping: what the kernel calls available, and what every cgroup's
    limit leaves above its use (file cache not counted), whichever is least."""
    import psutil

    left = (level.limit_bytes - level.used_bytes + level.cache_bytes for level in cgroup_memory())
    return max(min([psutil.virtual_memory().available, *left]), 0)


def pinnable_limit_bytes(ram_bytes: int, lock_limit_bytes: int | None, *, root: bool) -> int:
    """RAM that may be page-locked: half of it, or RLIMIT_MEMLOCK where someone raised that on purpose and it is less.

    NVIDIA's driver pins pages itself, unbound by RLIMIT_MEMLOCK, and the limit of a plain login (8 MiB or an eighth of
    RAM) is a distribution's default: honouring it would turn pinned streaming off on nearly every desktop. So a limit
    at or under those defaults counts as none, as does root's (None: unlimited). Zero is nobody's default: who set it
    wants nothing locked, and nothing is, for root either.
    """
    half = ram_bytes // 2
    default = max(8 * MIB, int(ram_bytes * LOCK_LIMIT_DEFAULT_SHARE))
    if lock_limit_bytes == 0:
        return 0
    if root or lock_limit_bytes is None or lock_limit_bytes <= default:
        return half
    return min(half, lock_limit_bytes)


def _lock_limit_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of the first CPU; empty where there is no ``/proc/cpuinfo``."""
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def read_host() -> Host:
    """RAM, pinnable RAM and CPU flags of this machine."""
    ram_bytes = ram_limit_bytes()
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return Host(ram_bytes, pinnable_limit_bytes(ram_bytes, _lock_limit_bytes(), root=root), _cpu_flags())


def _in_host(found: Hardware, host: Host) -> Hardware:
    provenance = dict(found.provenance) | {"ram_bytes": "this machine's RAM, cgroup limits included"}
    if found.device == "cuda":
        provenance["pinnable_bytes"] = "half of RAM, or RLIMIT_MEMLOCK where it is set and less"
    pinnable_bytes = host.pinnable_bytes if found.device == "cuda" else 0
    return replace(found, ram_bytes=host.ram_bytes, pinnable_bytes=pinnable_bytes, provenance=provenance)


def _cpu(host: Host, *, calibrated: bool) -> Hardware:
    """This CPU's calibration, else the ``cpu`` profile without bf16 where the CPU only emulates it; in this host."""
    measured = calibration_of(identity_of(None, host)) if calibrated else None
    if measured is not None:
        return _in_host(measured.hardware, host)
    found = _in_host(load_profile("cpu"), host)
    if "amx_bf16" in host.cpu_flags:
        how = "oneDNN's AMX kernels lay out anew what a convolution makes, too (torch 2.13, bf16 and fp16, 2026-11-27)"
        found = with_value(found, "convolution_copies", 2.0, how)
    if host.cpu_flags & BF16_CPU_FLAGS:
        return found
    rates = {kind: rate for kind, rate in found.matmul_flops_per_s.items() if kind != "bf16"}
    sources = {field: text for field, text in found.provenance.items() if field != "matmul_flops_per_s.bf16"}
    return replace(found, matmul_flops_per_s=rates, provenance=sources)


# --- calibrations ---


def identity_of(card: NvmlCard | None, host: Host) -> Identity:
    """This machine with a card, or computing on its CPU (None)."""
    if card is None:
        return Identity(host.cpu, host.threads)
    return Identity(host.cpu, 0, card.name, hashed_uuid(card.uuid))


def calibration_path(identity: Identity) -> Path:
    """Where ``calibrate`` keeps the measurements that ``--profile auto`` takes.

    In the cache folder, whatever ``--cache-dir`` says of prepared weights: 'plan' and 'generate' must find the same.
    """
    return cache_folder() / "calibrations" / f"{identity.slug}.toml"


def calibration_of(identity: Identity) -> Profile | None:
    """The calibration of this very machine; None where there is none.

    Raises:
        ProfileError: there is one that is wrong, or another machine's under this machine's name.
    """
    path = calibration_path(identity)
    if not path.exists():
        return None
    remedy = "; measure again with 'lowmem-flux2 calibrate --force', or remove the file"
    try:
        found = read_profile(path)
    except ProfileError as error:
        raise ProfileError(f"{error}{remedy}") from None
    if found.identity != identity or found.hardware.device != ("cuda" if identity.gpu else "cpu"):
        raise ProfileError(f"{path}: made on another machine ({found.identity}), this is {identity}{remedy}")
    return found


# --- both ---


def find_card(device: str, cards: Sequence[NvmlCard] | None = None) -> NvmlCard | None:
    """The card that ``device`` means: ``auto`` (the first visible GPU, else none), ``cpu``, ``cuda`` or ``cuda:1``.

    Args:
        cards: GPUs to choose from instead of those that NVML reports under ``CUDA_VISIBLE_DEVICES``.

    Raises:
        UsageError: not such a device, or a GPU asked for that is not there.
    """
    wanted = re.fullmatch(r"auto|cpu|cuda(?::(?P<index>\d+))?", device)
    if wanted is None:
        raise UsageError(f"{device!r} is not a device: write auto, cpu, cuda or cuda:1")
    if device == "cpu":
        return None
    if cards is None:
        cards = visible_cards(read_nvml(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    index = int(wanted["index"] or 0)
    if index < len(cards):
        return cards[index]
    if device == "auto":
        return None
    seen = ", ".join(f"cuda:{number} {card.name}" for number, card in enumerate(cards)) or "no NVIDIA GPU was found"
    raise UsageError(f"{device} is not there ({seen}); `lowmem-flux2 doctor` says why, `--device cpu` does without")


def detect(
    device: str = "auto",
    *,
    cards: Sequence[NvmlCard] | None = None,
    host: Host | None = None,
    calibrated: bool = True,
) -> Hardware:
    """``Hardware`` of this machine for ``--profile auto``.

    Args:
        device, cards: as ``find_card`` takes them.
        host: RAM and CPU instead of this machine's.
        calibrated: take this machine's calibration where there is one; False is what is assumed without it.

    Raises:
        UsageError: not such a device, or a GPU asked for that is not there.
        ProfileError: a calibration of this machine that cannot be used.
    """
    card = find_card(device, cards)
    host = host or read_host()
    return _cpu(host, calibrated=calibrated) if card is None else hardware_of(card, host, calibrated=calibrated)


def identify(device: str = "auto") -> Identity | None:
    """Which machine this is, computing on ``device``; None for a GPU that NVML does not see."""
    try:
        return identity_of(find_card(device), read_host())
    except UsageError:
        return None
