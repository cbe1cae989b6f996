"""``lowmem-flux2 doctor``: what is installed, usable, and what to do about the rest."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

from rich.table import Table

from lowmem_flux2.errors import LowMemFlux2Error
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.detect import available_ram_bytes, detect, ram_limit_bytes
from lowmem_flux2.planning.nvml import read_nvml
from lowmem_flux2.planning.sources import MODEL_NAMES, resolve_model
from lowmem_flux2.runtime.cache import prompt_cache_limit, prompt_files, prompts_folder
from lowmem_flux2.units import format_bytes
from lowmem_flux2.version import __version__

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub")
OPTIONAL = {
    "bitsandbytes": "nf4 and nf4-mixed weights: pip install 'lowmem-flux2[cuda]'",
    "gguf": "GGUF files: pip install 'lowmem-flux2[gguf]'",
    "sdnq": "folders that SDNQ has quantized: pip install 'lowmem-flux2[sdnq]'",
    "matplotlib": "the bench plot: pip install 'lowmem-flux2[bench]'",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, whether it is as it should be, and the remedy."""

    subject: str
    found: str
    is_fine: bool
    remedy: str = ""


def examine() -> Table:
    """Look at everything; a table with one row a finding."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading)
    for finding in _findings():
        mark = "[green]ok[/]" if finding.is_fine else "[yellow]--[/]"
        table.add_row(mark, finding.subject, finding.found, finding.remedy)
    return table


def _findings() -> Iterator[Finding]:
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("lowmem-flux2", __version__, True)
    yield Finding("Python", platform.python_version(), fine, "" if fine else "use Python 3.11, 3.12 or 3.13")
    for name in REQUIRED:
        version = _version(name)
        yield Finding(name, version or "missing", version is not None, "" if version else f"pip install {name}")
    yield from _gpu()
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Finding(f"{name} (optional)", version or "not installed", True, "" if version else use)
    yield from _memory()
    yield _prompt_cache()
    yield from _models()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Iterator[Finding]:
    cards = read_nvml()
    for card in cards:
        capability = ".".join(map(str, card.compute_capability))
        yield Finding(
            "GPU",
            f"{card.name}, {format_bytes(card.free_bytes)} of {format_bytes(card.total_bytes)} free, sm {capability}",
            True,
        )
    if not cards:
        yield Finding("GPU", "no NVIDIA GPU found", True, "everything runs on the CPU, slowly")
    if util.find_spec("torch") is not None:
        import torch

        usable = torch.cuda.is_available()
        built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
        remedy = "" if usable or not cards else "install a CUDA build of torch, and a driver that is new enough for it"
        yield Finding("CUDA", f"{built}, {'usable' if usable else 'no usable device'}", usable or not cards, remedy)
    try:
        hardware = detect()
        made = f"calibrated {hardware.calibrated}" if hardware.calibrated else "assumed, not measured here"
        remedy = "" if hardware.calibrated else "times become this machine's own with: lowmem-flux2 calibrate"
        yield Finding("profile auto", f"{hardware.name}, {made}", True, remedy)
    except LowMemFlux2Error as error:
        yield Finding("profile auto", "none", False, str(error))


def _memory() -> Iterator[Finding]:
    limit = ram_limit_bytes()
    yield Finding("RAM", f"{format_bytes(available_ram_bytes())} available of {format_bytes(limit)}", True)


def _prompt_cache() -> Finding:
    cache = cache_folder()
    entries = prompt_files(cache)
    size = format_bytes(sum(entry.size_bytes for entry in entries))
    held = f"{len(entries)} batches of prompts, {size}, in {prompts_folder(cache)}" if entries else "empty"
    try:
        limit = prompt_cache_limit()
    except LowMemFlux2Error as error:
        return Finding("prompt cache", held, False, str(error))
    bound = f"at most {format_bytes(limit)}" if limit else "switched off"
    clear = "to clear it: lowmem-flux2 prepare --remove prompts" if entries else ""
    return Finding("prompt cache", f"{held}; {bound}", True, clear)


def _models() -> Iterator[Finding]:
    for name in MODEL_NAMES:
        try:
            source = resolve_model(name, offline=True)
        except LowMemFlux2Error as error:
            yield Finding(f"model {name}", "unusable", False, str(error))
            continue
        here = source.folder is not None
        yield Finding(
            f"model {name}",
            "weights are here" if here else f"known, weights on the hub as {source.repo_id}",
            True,
            "" if here else "downloaded at the first 'generate'; gated: accept the licence, then 'hf auth login'",
        )
    token = util.find_spec("huggingface_hub") is not None and _has_token()
    yield Finding(
        "hub token", "found" if token else "none", True, "" if token else "needed for gated models: hf auth login"
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
