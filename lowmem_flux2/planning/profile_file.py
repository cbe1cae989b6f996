"""The TOML file of a hardware profile: its tables, what is wrong with one (file, line, key), and writing one.

Every number needs a source text under ``[sources]``. Optional keys, which calibration writes, fall back on what
``hardware`` assumes; ``[calibration]`` says when and on which machine a file was measured.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from lowmem_flux2.errors import ProfileError, UsageError
from lowmem_flux2.units import MIB, format_bytes, parse_bytes

MAX_TFLOPS = 1e4  # 1e16 FLOP/s: ten times an H100's bf16 peak; more is a slip of the unit
MAX_BYTES_PER_S = 1e13
CLASS_NEEDS: Mapping[str, tuple[int, int]] = {"fp16": (7, 0), "int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}
"""Least CUDA compute capability whose tensor cores have the class; fp32 runs everywhere."""

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
Ratio = Annotated[float, Field(gt=0, le=100, strict=True)]
Milliseconds = Annotated[float, Field(ge=0, le=1e6, strict=True)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuTable(_Table):
    nvml_names: Annotated[tuple[Text, ...], Field(min_length=1)]
    compute_capability: Capability
    sms: Annotated[int, Field(gt=0, le=1000, strict=True)] | None = None
    boost_mhz: Annotated[float, Field(gt=0, le=10_000, strict=True)] | None = None
    vram: Size
    vram_reserve: Size
    context: Size
    allocator_overhead: Size | None = None


class MatmulTable(_Table):
    """Dense peaks in TFLOP/s (TOP/s for int8)."""

    fp32: Tflops
    fp16: Tflops | None = None
    bf16: Tflops | None = None
    fp8: Tflops | None = None
    int8: Tflops | None = None


class ComputeTable(_Table):
    """``*_fraction``: share of the peak that is achieved; ``convolution_share``: of the achieved matmul rate."""

    attention_tflops: Tflops
    matmul_fraction: Fraction
    attention_fraction: Fraction
    block_overhead_us: Annotated[float, Field(gt=0, le=1e6, strict=True)]
    convolution_share: Ratio | None = None
    convolution_copies: Annotated[float, Field(ge=0, le=100, strict=True)] | None = None
    layer_overheads: Ratio | None = None
    stage_setup_ms: Milliseconds | None = None
    first_pass_ms: Milliseconds | None = None


class MemoryTable(_Table):
    """The compute device's own memory: peak rate of reads and writes together, and what operators achieve of it."""

    bandwidth: Rate
    fraction: Fraction


class ExpandTable(_Table):
    """Memory traffic a second while weights of a format are expanded; ``planning.expansion`` says what counts."""

    int8: Rate | None = None
    int6: Rate | None = None
    fp8: Rate | None = None
    nf4: Rate | None = None
    nf4_mixed: Annotated[Rate | None, Field(alias="nf4-mixed")] = None
    int4: Rate | None = None
    gguf: Rate | None = None


class LinkTable(_Table):
    h2d_pinned: Rate
    h2d_pageable: Rate


class HostTable(_Table):
    ram: Size
    pinnable: Size | None = None
    pin: Rate
    libraries: Size | None = None
    cuda: Size | None = None


class DiskTable(_Table):
    """``load_share``: what loading weights reaches of the read rate."""

    read: Rate
    load_share: Ratio | None = None


class CalibrationTable(_Table):
    """When and where a calibration was made; ``planning.identity`` has the machine's fields."""

    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    cpu: Text
    threads: Annotated[int, Field(ge=0, le=100_000, strict=True)]
    gpu: str = ""
    gpu_id: str = ""


class ProfileFile(_Table):
    schema_version: Literal[1]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: Text
    device: Literal["cuda", "cpu"]
    gpu: GpuTable | None = None
    matmul_tflops: MatmulTable
    compute: ComputeTable
    memory: MemoryTable | None = None
    expand: ExpandTable | None = None
    link: LinkTable
    host: HostTable
    disk: DiskTable
    calibration: CalibrationTable | None = None
    sources: dict[str, Text]


def _keys_of(annotation: object) -> tuple[str, ...]:
    """Keys of a field that is a table (or an optional one); none for a plain value."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(
        field.alias or key
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, _Table)
        for key, field in kind.model_fields.items()
    )


_KEYS = {"": tuple(ProfileFile.model_fields)} | {
    name: keys for name, field in ProfileFile.model_fields.items() if (keys := _keys_of(field.annotation))
}
"""Table name -> its keys; "" is the top level."""


def numbers_of(parsed: ProfileFile) -> list[str]:
    """Dotted keys of the file that carry a number, in file order: each needs a source."""
    tables = ((name, getattr(parsed, name)) for name in _KEYS if name not in ("", "calibration"))
    present = [
        f"{name}.{key}"
        for name, table in tables
        if table is not None
        for key in table.model_dump(by_alias=True, exclude_unset=True)
    ]
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
        if parsed.calibration is None:  # the core counts by which unknown cards are derived from a known one
            yield from ((f"gpu.{key}", "missing") for key in ("sms", "boost_mhz") if getattr(gpu, key) is None)
    if gpu is None and host.cuda is not None:
        yield "host.cuda", "what CUDA takes, in a profile without a [gpu] table"
    if host.pinnable is not None and host.pinnable > host.ram:
        yield "host.pinnable", f"{format_bytes(host.pinnable)} is more than ram {format_bytes(host.ram)}"
    if link.h2d_pageable > link.h2d_pinned:
        yield "link.h2d_pageable", "faster than h2d_pinned"
    numbers = numbers_of(parsed)
    yield from (
        (key, f'no source: add "{key}" = "..." under [sources]') for key in numbers if key not in parsed.sources
    )
    for key in parsed.sources:
        if key not in numbers:
            yield f"sources.{key}", f"a source for a number that is not there{nearest(key, numbers)}"


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


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unknown(key: str) -> str:
    """Message for a key that no table has: where it belongs, or the nearest one."""
    table, _, leaf = key.rpartition(".")
    homes = [f"[{home}]" for home, keys in _KEYS.items() if leaf in keys and home not in ("", table)]
    if homes:
        return f"unknown key; it belongs in {' or '.join(homes)}"
    return f"unknown key{nearest(leaf, _KEYS.get(table, ()))}"


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


def read_file(path: Path) -> ProfileFile:
    """Read and check a profile file.

    Raises:
        ProfileError: unreadable, or contents that are wrong: ``file:line: key: what`` for each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot read the profile: {error}") from None
    return parse_file(text, path)


def parse_file(text: str, path: Path) -> ProfileFile:
    """Check the text of a profile; ``path`` is what messages call it. Raises ProfileError as ``read_file``."""
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
    return parsed


# --- writing ---


def size_text(size_bytes: int) -> str:
    """A size as the file has it: whole MiB, rounded down, so that no budget grows by being written."""
    return f"{size_bytes // MIB} MiB" if size_bytes >= 10 * MIB else f"{size_bytes} B"


def rate_text(bytes_per_s: float) -> str:
    """A rate to four digits."""
    unit, factor = ("GB/s", 1e9) if bytes_per_s >= 1e9 else ("MB/s", 1e6) if bytes_per_s >= 1e6 else ("B/s", 1)
    return f"{max(round(bytes_per_s / factor, 3), 0.001):g} {unit}"


def file_text(tables: Mapping[str, Mapping[str, object]]) -> str:
    """The TOML text of tables of plain values; "" is the top level. None is left out, a key with a dot in it quoted."""
    lines: list[str] = []
    for name, table in tables.items():
        kept = {key: value for key, value in table.items() if value is not None}
        if name and kept:
            lines += ["", f"[{name}]"]
        for key, value in kept.items():
            quoted = json.dumps(key) if "." in key else key
            lines.append(f"{quoted} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "")
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
