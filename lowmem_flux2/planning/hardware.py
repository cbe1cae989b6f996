"""Hardware profiles: what a machine has and how fast it is, read from ``profiles/*.toml``.

A profile stores peaks as a spec sheet gives them, the fraction achieved in practice, and a source for every number.
``Hardware`` carries the product: **every rate in it is achievable** (peak x fraction), so planning multiplies nothing
again. On a calibrated machine the fraction is 1.0 and the numbers are measured.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from lowmem_flux2.errors import ProfileError, UsageError
from lowmem_flux2.units import format_bytes, parse_bytes

MAX_TFLOPS = 1e4  # 1e16 FLOP/s: ten times an H100's bf16 peak; more is a slip of the unit
MAX_BYTES_PER_S = 1e13
CLASS_NEEDS: Mapping[str, tuple[int, int]] = {"fp16": (7, 0), "int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}
"""Least CUDA compute capability whose tensor cores have the class; fp32 runs everywhere."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device with its host, as planning sees it: bytes, seconds, and achievable rates (peak x fraction).

    Attributes:
        name: profile name, for example ``rtx-3060-12gb``.
        device: ``cuda`` or ``cpu``.
        compute_capability: of the CUDA device; None on a CPU.
        vram_bytes: device memory as the driver reports it; 0 on a CPU.
        vram_reserve_bytes: part of it that weights and activations cannot have: CUDA context, what the driver keeps,
            display and other processes; 0 on a CPU. Less than ``vram_bytes`` on a GPU.
        context_bytes: the CUDA context alone, the part of the reserve that our own process uses; 0 on a CPU.
        ram_bytes: RAM that we may use: the machine's total or the cgroup limit, whichever is less.
        pinnable_bytes: RAM that may be page-locked; 0 on a CPU, where nothing is pinned.
        pin_bytes_per_s: rate at which host memory is allocated page-locked.
        h2d_pinned_bytes_per_s: host to device copy from pinned memory; on a CPU a memory copy.
        h2d_pageable_bytes_per_s: the same from pageable memory.
        disk_read_bytes_per_s: sequential read, page cache cold.
        matmul_flops_per_s: FLOP/s of large dense matmuls per compute class (fp32, fp16, bf16, fp8, int8), accumulating
            in fp32 (int32 for int8); a class that the device lacks is absent.
        attention_flops_per_s: FLOP/s of scaled dot product attention at the device's main 16-bit class.
        block_overhead_s: host and launch overhead of a transformer block in one pass; matters for tiny models only.
        provenance: field (``matmul_flops_per_s.bf16`` for a class) -> where the number is from.
    """

    name: str
    device: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None
    vram_bytes: int
    vram_reserve_bytes: int
    context_bytes: int
    ram_bytes: int
    pinnable_bytes: int
    pin_bytes_per_s: float
    h2d_pinned_bytes_per_s: float
    h2d_pageable_bytes_per_s: float
    disk_read_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]
    attention_flops_per_s: float
    block_overhead_s: float
    provenance: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile file: its ``Hardware``, where it lies, and what only listing and detection need."""

    title: str
    nvml_names: tuple[str, ...]  # as nvidia-smi prints them; empty on a CPU
    sms: int  # streaming multiprocessors; 0 on a CPU
    hardware: Hardware
    path: Path


# --- the TOML file ---

_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?)?B")
_RATE = re.compile(r"(?P<size>.*B)/s")


def _size(value: object) -> int:
    """Bytes of ``"12 GiB"``; a unit is required, and it is bytes (``GB``), not bits (``Gb``)."""
    if not isinstance(value, str) or not _SIZE.fullmatch(value.strip()):
        raise ValueError(f'{value!r} is not a size with a unit: write for example "12 GiB"')
    try:
        return parse_bytes(value)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _rate(value: object) -> float:
    """Bytes per second of ``"25 GB/s"``."""
    match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or not _SIZE.fullmatch(match["size"]):
        raise ValueError(f'{value!r} is not a rate with a unit: write for example "25 GB/s"')
    rate = float(_size(match["size"]))
    if rate > MAX_BYTES_PER_S:
        raise ValueError(f"{value!r} is impossibly fast: more than 10 TB/s")
    return rate


def _capability(value: object) -> tuple[int, int]:
    """``"8.6"`` -> (8, 6)."""
    match = re.fullmatch(r"(\d+)\.(\d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is not a compute capability: write for example "8.6", in quotes')
    return int(match[1]), int(match[2])


Size = Annotated[int, BeforeValidator(_size)]
Rate = Annotated[float, BeforeValidator(_rate)]
Capability = Annotated[tuple[int, int], BeforeValidator(_capability)]
Tflops = Annotated[float, Field(gt=0, le=MAX_TFLOPS, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuTable(_Table):
    nvml_names: Annotated[tuple[Text, ...], Field(min_length=1)]
    compute_capability: Capability
    sms: Annotated[int, Field(gt=0, le=1000, strict=True)]
    boost_mhz: Annotated[float, Field(gt=0, le=10_000, strict=True)]
    vram: Size
    vram_reserve: Size
    context: Size


class MatmulTable(_Table):
    """Dense peaks in TFLOP/s (TOP/s for int8)."""

    fp32: Tflops
    fp16: Tflops | None = None
    bf16: Tflops | None = None
    fp8: Tflops | None = None
    int8: Tflops | None = None


class ComputeTable(_Table):
    """``*_fraction``: share of the peak that is achieved; the overhead in microseconds."""

    attention_tflops: Tflops
    matmul_fraction: Fraction
    attention_fraction: Fraction
    block_overhead_us: Annotated[float, Field(gt=0, le=1e6, strict=True)]


class LinkTable(_Table):
    h2d_pinned: Rate
    h2d_pageable: Rate


class HostTable(_Table):
    ram: Size
    pinnable: Size | None = None
    pin: Rate


class DiskTable(_Table):
    read: Rate


class ProfileFile(_Table):
    schema_version: Literal[1]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: Text
    device: Literal["cuda", "cpu"]
    gpu: GpuTable | None = None
    matmul_tflops: MatmulTable
    compute: ComputeTable
    link: LinkTable
    host: HostTable
    disk: DiskTable
    sources: dict[str, Text]


def _keys_of(annotation: object) -> tuple[str, ...]:
    """Keys of a field that is a table (or an optional one); none for a plain value."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(
        key for kind in kinds if isinstance(kind, type) and issubclass(kind, _Table) for key in kind.model_fields
    )


_KEYS = {"": tuple(ProfileFile.model_fields)} | {
    name: keys for name, field in ProfileFile.model_fields.items() if (keys := _keys_of(field.annotation))
}
"""Table name -> its keys; "" is the top level."""


def _numbers(parsed: ProfileFile) -> list[str]:
    """Dotted keys of the file that carry a number, in file order: each needs a source."""
    tables = ((name, getattr(parsed, name)) for name in _KEYS if name)
    present = [f"{name}.{key}" for name, table in tables if table is not None for key in table.model_fields_set]
    order = [f"{name}.{key}" for name in _KEYS for key in _KEYS[name]]
    return sorted(set(present) - {"gpu.nvml_names"}, key=order.index)


def _contradictions(parsed: ProfileFile) -> Iterator[tuple[str, str]]:
    """(key, message) for values that are well-formed alone but impossible together."""
    gpu, host, link = parsed.gpu, parsed.host, parsed.link
    if (parsed.device == "cuda") != (gpu is not None):
        yield "device", '"cuda" needs a [gpu] table' if gpu is None else '"cpu" has no [gpu] table'
    if gpu is not None:
        if gpu.vram_reserve >= gpu.vram:
            yield "gpu.vram_reserve", f"{format_bytes(gpu.vram_reserve)} is not less than vram {format_bytes(gpu.vram)}"
        if gpu.context > gpu.vram_reserve:
            yield "gpu.context", "more than vram_reserve, which includes it"
        for kind, least in CLASS_NEEDS.items():
            if getattr(parsed.matmul_tflops, kind) is not None and gpu.compute_capability < least:
                have, need = (".".join(map(str, pair)) for pair in (gpu.compute_capability, least))
                yield f"matmul_tflops.{kind}", f"compute capability {have} has no {kind} tensor cores ({need} or later)"
        if host.pinnable is None:
            yield "host.pinnable", "missing"
    if host.pinnable is not None and host.pinnable > host.ram:
        yield "host.pinnable", f"{format_bytes(host.pinnable)} is more than ram {format_bytes(host.ram)}"
    if link.h2d_pageable > link.h2d_pinned:
        yield "link.h2d_pageable", "faster than h2d_pinned"
    numbers = _numbers(parsed)
    yield from (
        (key, f'no source: add "{key}" = "..." under [sources]') for key in numbers if key not in parsed.sources
    )
    for key in parsed.sources:
        if key not in numbers:
            yield f"sources.{key}", f"a source for a number that is not there{_nearest(key, numbers)}"


_FIELD_KEYS = {
    "compute_capability": "gpu.compute_capability",
    "vram_bytes": "gpu.vram",
    "vram_reserve_bytes": "gpu.vram_reserve",
    "context_bytes": "gpu.context",
    "ram_bytes": "host.ram",
    "pinnable_bytes": "host.pinnable",
    "pin_bytes_per_s": "host.pin",
    "h2d_pinned_bytes_per_s": "link.h2d_pinned",
    "h2d_pageable_bytes_per_s": "link.h2d_pageable",
    "disk_read_bytes_per_s": "disk.read",
    "block_overhead_s": "compute.block_overhead_us",
}


def _hardware(parsed: ProfileFile) -> Hardware:
    gpu, host, compute, sources = parsed.gpu, parsed.host, parsed.compute, parsed.sources
    peaks: dict[str, float] = parsed.matmul_tflops.model_dump(exclude_none=True)

    def achieved(peak: str, share: str) -> str:
        fraction = getattr(compute, share)
        return sources[peak] + (f"; x {fraction:g} achievable ({sources[f'compute.{share}']})" if fraction < 1 else "")

    provenance = {field: sources.get(key, "none on a CPU") for field, key in _FIELD_KEYS.items()}
    for kind in peaks:
        provenance[f"matmul_flops_per_s.{kind}"] = achieved(f"matmul_tflops.{kind}", "matmul_fraction")
    provenance["attention_flops_per_s"] = achieved("compute.attention_tflops", "attention_fraction")
    return Hardware(
        name=parsed.name,
        device=parsed.device,
        compute_capability=gpu.compute_capability if gpu else None,
        vram_bytes=gpu.vram if gpu else 0,
        vram_reserve_bytes=gpu.vram_reserve if gpu else 0,
        context_bytes=gpu.context if gpu else 0,
        ram_bytes=host.ram,
        pinnable_bytes=(host.pinnable or 0) if gpu else 0,
        pin_bytes_per_s=host.pin,
        h2d_pinned_bytes_per_s=parsed.link.h2d_pinned,
        h2d_pageable_bytes_per_s=parsed.link.h2d_pageable,
        disk_read_bytes_per_s=parsed.disk.read,
        matmul_flops_per_s={kind: peak * 1e12 * compute.matmul_fraction for kind, peak in peaks.items()},
        attention_flops_per_s=compute.attention_tflops * 1e12 * compute.attention_fraction,
        block_overhead_s=compute.block_overhead_us * 1e-6,
        provenance=provenance,
    )


# --- errors with file, line and key ---

_HEADER = re.compile(r"\s*\[+\s*(?P<table>[^\[\]]+?)\s*\]+\s*(#.*)?")
_ASSIGNMENT = re.compile(r"""\s*(?P<key>"[^"]*"|'[^']*'|[\w.\-]+)\s*=""")


def find_line(text: str, key: str) -> int:
    """1-based line that sets the dotted ``key``, else the header of its table, else 1."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            table = header["table"].replace('"', "")
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            name = assignment["key"].strip("\"'")
            lines.setdefault(f"{table}.{name}" if table else name, number)
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unknown(key: str) -> str:
    """Message for a key that no table has: where it belongs, or the nearest one."""
    table, _, leaf = key.rpartition(".")
    homes = [f"[{home}]" for home, keys in _KEYS.items() if leaf in keys and home not in ("", table)]
    if homes:
        return f"unknown key; it belongs in {' or '.join(homes)}"
    return f"unknown key{_nearest(leaf, _KEYS.get(table, ()))}"


def _failure(path: Path, text: str, problems: list[tuple[str, str]]) -> ProfileError:
    found = sorted((find_line(text, key), f"{key}: {what}") for key, what in problems)
    return ProfileError("\n".join(f"{path}:{line}: {message}" for line, message in found))


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    found = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        match item["type"]:
            case "extra_forbidden":
                what = _unknown(key)
            case "missing":
                what = "missing"
            case "value_error":
                what = item["msg"].removeprefix("Value error, ")
            case _:
                what = f"{item['msg']} (found {item['input']!r})"
        found.append((key, what))
    return found


def profiles_dir() -> Path:
    """Folder of the shipped profiles: inside the package when installed from a wheel, else the repository's."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "profiles", package.parent / "profiles"):
        if folder.is_dir():
            return folder
    raise ProfileError(f"no profiles beside {package}: the installation is incomplete; reinstall lowmem-flux2")


def list_profiles() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in profiles_dir().glob("*.toml")))


def read_profile(name_or_path: str | Path) -> Profile:
    """Read and check a shipped profile by name, or a TOML file by path.

    A text is a path where it ends in ``.toml`` or has a folder in it: a file named like a profile never shadows it.

    Raises:
        ProfileError: unknown name, unreadable file, or contents that are wrong: ``file:line: key: what`` for each.
    """
    name = str(name_or_path)
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and not (path.suffix == ".toml" or path.name != name):
        names = list_profiles()
        if name not in names:
            hint = _nearest(name.lower(), names) or "; `lowmem-flux2 profiles list` shows them"
            raise ProfileError(f"unknown profile {name!r}{hint}")
        path = profiles_dir() / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot read the profile: {error}") from None
    try:
        parsed = ProfileFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = at[1] if at else text.count("\n") + 1
        raise ProfileError(f"{path}:{line}: not TOML: {error}") from None
    except ValidationError as error:
        raise _failure(path, text, _problems(error)) from None
    if problems := list(_contradictions(parsed)):
        raise _failure(path, text, problems)
    gpu = parsed.gpu
    return Profile(parsed.title, gpu.nvml_names if gpu else (), gpu.sms if gpu else 0, _hardware(parsed), path)


def load_profile(name_or_path: str) -> Hardware:
    """``Hardware`` of a shipped profile (by name) or of a TOML file (by path). Raises ProfileError."""
    return read_profile(name_or_path).hardware


def check_profile(path: str | Path) -> Hardware:
    """Check a profile file, whatever it is called; its ``Hardware`` when it is right. Raises ProfileError."""
    return read_profile(Path(path)).hardware
