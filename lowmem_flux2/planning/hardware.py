"""Hardware profiles: what a machine has and how fast it is, read from ``profiles/*.toml``.

A profile stores peaks as a spec sheet gives them, the fraction achieved in practice, and a source for every number.
``Hardware`` carries the product: **every rate in it is achievable** (peak x fraction), so planning multiplies nothing
again. On a calibrated machine the fraction is 1.0 and the numbers are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lowmem_flux2.errors import ProfileError
from lowmem_flux2.planning.identity import Identity
from lowmem_flux2.planning.profile_file import (
    CLASS_NEEDS,
    ProfileFile,
    file_text,
    find_line,
    nearest,
    rate_text,
    read_file,
    size_text,
)
from lowmem_flux2.units import MIB

__all__ = [
    "CLASS_NEEDS",
    "Hardware",
    "Profile",
    "check_profile",
    "find_line",
    "list_profiles",
    "load_profile",
    "profile_text",
    "profiles_dir",
    "read_profile",
    "value_of",
    "with_value",
]

CONVOLUTION_SHARE = 0.5
CONVOLUTION_COPIES = 2.0
LAYER_OVERHEADS = 1.0
LOAD_SHARE = 1.0
STAGE_SETUP_S = 0.02
FIRST_PASS_S = 0.0
LIBRARIES_HOST_BYTES = 360 * MIB
CUDA_HOST_BYTES = 600 * MIB
ALLOCATOR_OVERHEAD_BYTES = 64 * MIB
MEMORY_BYTES_PER_S = 144e9
ASSUMED: Mapping[str, str] = {
    "convolution_share": "assumption, to be calibrated",
    "convolution_copies": "assumption, to be calibrated: tensor cores take channels last (NVIDIA, Convolutional Layers "
    "User's Guide, 'Tensor Layouts in Memory'), and are given the other layout",
    "layer_overheads": "assumption, to be calibrated: a layer has as many launches as a block",
    "load_share": "assumption, to be calibrated: loading reads as fast as the disk",
    "stage_setup_s": "15 to 30 ms measured for the model shapes on a 2-core AMD EPYC, 2026-11-23",
    "first_pass_s": "assumption, to be calibrated: the first pass takes as long as any other",
    "libraries_host_bytes": "319 MiB anonymous with torch 2.13 CPU, diffusers 0.42.1 and transformers 5.23 imported "
    "(measured 2026-11-23), and 41 MiB for tokenizer and configs, an assumption",
    "cuda_host_bytes": "assumption, to be calibrated",
    "allocator_overhead_bytes": "assumption, to be calibrated: cuBLAS and cuDNN workspaces are 8 to 32 MiB each",
    "memory_bytes_per_s": "assumption, to be calibrated: the slowest shipped card's",
}
"""Where the default of each field comes from that no shipped profile sets."""


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
        convolution_share: what the VAE's decoder reaches of the matmul rate of its compute dtype.
        convolution_copies: tensors that a convolution's kernel holds besides, in 16 bits: what it is given, laid out
            anew (1), and what it makes (2).
        layer_overheads: overhead of a text encoder layer in one pass, in block overheads.
        load_share: what loading weights (through the page cache, converted) reaches of the disk's read rate.
        stage_setup_s: reading configs and building a stage's modules, before any weight is read.
        first_pass_s: what the first pass of a stage takes longer: kernels chosen and loaded, libraries set up.
        libraries_host_bytes: RAM of Python with the libraries, before any weight is read.
        cuda_host_bytes: RAM that CUDA adds to it once it is initialised; not counted on a CPU.
        allocator_overhead_bytes: device memory for library workspaces and what the allocator holds beyond tensors.
        memory_bytes_per_s: what operators reach of reading and writing the compute device's memory.
        expand_bytes_per_s: the same while weights of a format are expanded (``expansion.TRAFFIC`` says what counts);
            a format that is absent takes ``memory_bytes_per_s``.
        calibrated: date (2026-11-24) of the measurements on this machine; "" for a profile that was not measured here.
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
    convolution_share: float = CONVOLUTION_SHARE
    convolution_copies: float = CONVOLUTION_COPIES
    layer_overheads: float = LAYER_OVERHEADS
    load_share: float = LOAD_SHARE
    stage_setup_s: float = STAGE_SETUP_S
    first_pass_s: float = FIRST_PASS_S
    libraries_host_bytes: int = LIBRARIES_HOST_BYTES
    cuda_host_bytes: int = CUDA_HOST_BYTES
    allocator_overhead_bytes: int = ALLOCATOR_OVERHEAD_BYTES
    memory_bytes_per_s: float = MEMORY_BYTES_PER_S
    expand_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    calibrated: str = ""

    @property
    def load_bytes_per_s(self) -> float:
        """Rate at which weights are read into memory before a stage runs, page cache cold."""
        return self.load_share * self.disk_read_bytes_per_s


def with_value(hardware: Hardware, path: str, value: float, source: str) -> Hardware:
    """The same with one number replaced; ``path`` as in its provenance (``matmul_flops_per_s.bf16`` for a class)."""
    name, _, key = path.partition(".")
    provenance = {**hardware.provenance, path: source}
    made: object = {**getattr(hardware, name), key: value} if key else value
    if name.endswith("_bytes"):
        made = round(value)
    return replace(hardware, provenance=provenance, **{name: made})  # type: ignore[arg-type]


def value_of(hardware: Hardware, path: str) -> float:
    """The number that ``with_value`` would replace, or that stands for one which is not there."""
    name, _, key = path.partition(".")
    if name == "expand_bytes_per_s":
        return hardware.expand_bytes_per_s.get(key, hardware.memory_bytes_per_s)
    return float(getattr(hardware, name)[key] if key else getattr(hardware, name))


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile file: its ``Hardware``, where it lies, and what only listing and detection need.

    ``identity`` is the machine that a calibration was made on; None for a profile that was not measured.
    """

    title: str
    nvml_names: tuple[str, ...]  # as nvidia-smi prints them; empty on a CPU
    sms: int  # streaming multiprocessors; 0 on a CPU and where the file does not say
    hardware: Hardware
    path: Path
    identity: Identity | None = None


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
_OPTIONAL_KEYS = {
    "convolution_share": "compute.convolution_share",
    "convolution_copies": "compute.convolution_copies",
    "layer_overheads": "compute.layer_overheads",
    "load_share": "disk.load_share",
    "stage_setup_s": "compute.stage_setup_ms",
    "first_pass_s": "compute.first_pass_ms",
    "libraries_host_bytes": "host.libraries",
    "cuda_host_bytes": "host.cuda",
    "allocator_overhead_bytes": "gpu.allocator_overhead",
}
"""Field -> key of the file, for what a file may leave to the assumption."""
_MILLI = frozenset({"stage_setup_s", "first_pass_s"})
"""Fields in seconds whose key is in milliseconds."""


def _hardware(parsed: ProfileFile) -> Hardware:
    gpu, host, compute, sources = parsed.gpu, parsed.host, parsed.compute, parsed.sources
    peaks: dict[str, float] = parsed.matmul_tflops.model_dump(exclude_none=True)

    def achieved(peak: str, share: str) -> str:
        fraction = getattr(compute, share)
        return sources[peak] + (f"; x {fraction:g} achievable ({sources[f'compute.{share}']})" if fraction < 1 else "")

    provenance = {field: sources.get(key, "none on a CPU") for field, key in _FIELD_KEYS.items()}
    provenance |= {field: sources.get(key, ASSUMED[field]) for field, key in _OPTIONAL_KEYS.items()}
    for kind in peaks:
        provenance[f"matmul_flops_per_s.{kind}"] = achieved(f"matmul_tflops.{kind}", "matmul_fraction")
    provenance["attention_flops_per_s"] = achieved("compute.attention_tflops", "attention_fraction")
    optional: dict[str, Any] = {}
    if memory := parsed.memory:
        optional["memory_bytes_per_s"] = memory.bandwidth * memory.fraction
        share = f"; x {memory.fraction:g} achievable ({sources['memory.fraction']})" if memory.fraction < 1 else ""
        provenance["memory_bytes_per_s"] = sources["memory.bandwidth"] + share
    elif gpu is None:
        optional["memory_bytes_per_s"] = parsed.link.h2d_pageable
        provenance["memory_bytes_per_s"] = f"the rate of a copy: {sources['link.h2d_pageable']}"
    else:
        provenance["memory_bytes_per_s"] = ASSUMED["memory_bytes_per_s"]
    expand: dict[str, float] = parsed.expand.model_dump(exclude_none=True, by_alias=True) if parsed.expand else {}
    provenance |= {f"expand_bytes_per_s.{name}": sources[f"expand.{name}"] for name in expand}
    for name, key in _OPTIONAL_KEYS.items():
        table, _, leaf = key.partition(".")
        value = getattr(getattr(parsed, table), leaf, None)
        if value is not None:
            optional[name] = value * 1e-3 if name in _MILLI else value
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
        **optional,
        expand_bytes_per_s=expand,
        calibrated=parsed.calibration.date if parsed.calibration else "",
    )


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
            hint = nearest(name.lower(), names) or "; `lowmem-flux2 profiles list` shows them"
            raise ProfileError(f"unknown profile {name!r}{hint}")
        path = profiles_dir() / f"{name}.toml"
    parsed = read_file(path)
    gpu, made = parsed.gpu, parsed.calibration
    return Profile(
        title=parsed.title,
        nvml_names=gpu.nvml_names if gpu else (),
        sms=(gpu.sms or 0) if gpu else 0,
        hardware=_hardware(parsed),
        path=path,
        identity=Identity(made.cpu, made.threads, made.gpu, made.gpu_id) if made else None,
    )


def load_profile(name_or_path: str) -> Hardware:
    """``Hardware`` of a shipped profile (by name) or of a TOML file (by path). Raises ProfileError."""
    return read_profile(name_or_path).hardware


def check_profile(path: str | Path) -> Hardware:
    """Check a profile file, whatever it is called; its ``Hardware`` when it is right. Raises ProfileError."""
    return read_profile(Path(path)).hardware


def profile_text(hardware: Hardware, title: str, identity: Identity) -> str:
    """The TOML text of a calibrated machine: ``read_profile`` gives the same ``Hardware`` back, to four digits.

    Rates are written as achieved, with fractions of 1. A field of a CUDA profile that means nothing on a CPU is left
    out, and the other way round.
    """
    on_gpu, rates = hardware.device == "cuda", hardware.matmul_flops_per_s
    order = [kind for kind in ("fp32", "fp16", "bf16", "fp8", "int8") if kind in rates]
    gpu: dict[str, object] = {}
    if on_gpu:
        major, minor = hardware.compute_capability or (0, 0)
        gpu = {
            "nvml_names": (identity.gpu,),
            "compute_capability": f"{major}.{minor}",
            "vram": size_text(hardware.vram_bytes),
            "vram_reserve": size_text(hardware.vram_reserve_bytes),
            "context": size_text(hardware.context_bytes),
            "allocator_overhead": size_text(hardware.allocator_overhead_bytes),
        }
    tables: dict[str, dict[str, object]] = {
        "": {"schema_version": 1, "name": hardware.name, "title": title, "device": hardware.device},
        "calibration": {"date": hardware.calibrated, **asdict(identity)},
        "gpu": gpu,
        "matmul_tflops": {kind: rates[kind] / 1e12 for kind in order},
        "compute": {
            "attention_tflops": hardware.attention_flops_per_s / 1e12,
            "matmul_fraction": 1.0,
            "attention_fraction": 1.0,
            "block_overhead_us": hardware.block_overhead_s * 1e6,
            "convolution_share": hardware.convolution_share,
            "convolution_copies": hardware.convolution_copies,
            "layer_overheads": hardware.layer_overheads,
            "stage_setup_ms": hardware.stage_setup_s * 1e3,
            "first_pass_ms": hardware.first_pass_s * 1e3,
        },
        "memory": {"bandwidth": rate_text(hardware.memory_bytes_per_s), "fraction": 1.0},
        "expand": {name: rate_text(rate) for name, rate in hardware.expand_bytes_per_s.items()},
        "link": {
            "h2d_pinned": rate_text(hardware.h2d_pinned_bytes_per_s),
            "h2d_pageable": rate_text(hardware.h2d_pageable_bytes_per_s),
        },
        "host": {
            "ram": size_text(hardware.ram_bytes),
            "pinnable": size_text(hardware.pinnable_bytes) if on_gpu else None,
            "pin": rate_text(hardware.pin_bytes_per_s),
            "libraries": size_text(hardware.libraries_host_bytes),
            "cuda": size_text(hardware.cuda_host_bytes) if on_gpu else None,
        },
        "disk": {"read": rate_text(hardware.disk_read_bytes_per_s), "load_share": hardware.load_share},
    }
    achieved = "1: the rates are achieved ones, not peaks"
    texts = {key: hardware.provenance[field] for field, key in (_FIELD_KEYS | _OPTIONAL_KEYS).items()}
    texts |= {f"matmul_tflops.{kind}": hardware.provenance[f"matmul_flops_per_s.{kind}"] for kind in order}
    texts |= {
        "compute.attention_tflops": hardware.provenance["attention_flops_per_s"],
        "compute.matmul_fraction": achieved,
        "compute.attention_fraction": achieved,
        "memory.bandwidth": hardware.provenance["memory_bytes_per_s"],
        "memory.fraction": achieved,
    }
    texts |= {
        f"expand.{name}": hardware.provenance[f"expand_bytes_per_s.{name}"] for name in hardware.expand_bytes_per_s
    }
    numbers = [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, value in table.items()
        if name not in ("", "calibration") and key != "nvml_names" and value is not None
    ]
    return file_text({**tables, "sources": {key: texts[key] for key in numbers}})
