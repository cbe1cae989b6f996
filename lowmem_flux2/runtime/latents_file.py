"""Denoised latents in a file: what a run saves before decoding, or when decoding failed, and decodes later.

A safetensors file with the packed latents, the statistics of the VAE's batch norm (whoever decodes must have the same
VAE), and in its metadata all that the pictures will say of themselves: request, seeds, plan, versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import TypeAdapter

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Plan, stages_of
from lowmem_flux2.planning.selection import Selection, runs_on
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import ImageRecord
from lowmem_flux2.runtime.checked import Damaged, read_checked, write_checked
from lowmem_flux2.runtime.newfile import write_new
from lowmem_flux2.runtime.versions import versions
from lowmem_flux2.runtime.weights import Weights

FORMAT = "lowmem-flux2 latents 1"
SUFFIX = ".latents.safetensors"
SAME_VAE_TOLERANCE = 0.02
"""Of the statistics: a copy of the same VAE in bf16 is the same one."""


@dataclass(frozen=True, slots=True)
class LatentImage:
    """One image of a latents file: its number in the run that made it, its seed and its prompt; what the text encoder
    made of that, where it was upsampled, and by which seed."""

    index: int
    seed: int | None
    prompt: str
    upsampled_prompt: str | None = None
    upsample_seed: int | None = None

    def record(self, path: str | None = None) -> ImageRecord:
        """What a report or a PNG says of it."""
        return ImageRecord(path, self.seed, self.prompt, self.upsampled_prompt, self.upsample_seed)


@dataclass(frozen=True, slots=True)
class Origin:
    """How latents were made.

    Args:
        model: what ``-m`` takes to find the model again.
        revision: of a hub model, where one was asked for.
        plan: as it was carried out.
        images: one for each row of the latents.
        versions: of the libraries that made them.
    """

    model: str
    revision: str | None
    request: Request
    plan: Plan
    images: tuple[LatentImage, ...]
    versions: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"plan": self.plan.to_json()})

    @staticmethod
    def from_json(text: str, source: str) -> Origin:
        """Read back what ``to_json`` wrote.

        Raises:
            ValueError, KeyError, TypeError, UsageError: it is not that.
        """
        raw: dict[str, Any] = json.loads(text)
        return Origin(
            model=str(raw["model"]),
            revision=raw["revision"],
            request=_REQUEST.validate_python(raw["request"]),
            plan=Plan.from_json(raw["plan"], source),
            images=_IMAGES.validate_python(raw["images"]),
            versions=_VERSIONS.validate_python(raw["versions"]),
        )

    def with_decode(self, plan: Plan) -> Plan:
        """The whole plan of the pictures: as the latents were made, and as they are decoded."""
        return replace(self.plan, stages=(*self.plan.stages[:-1], plan.stage("decode")))

    def selection(self, selection: Selection, hardware: Hardware) -> Selection:
        """The selection with the latents' own dtype, where none was asked for and the hardware has it."""
        dtype = self.plan.stage("denoise").compute_dtype
        if selection.dtype != "auto" or not runs_on(dtype, hardware):
            return selection
        return replace(selection, dtype=dtype)


@dataclass(frozen=True, slots=True)
class SavedLatents:
    """Latents that wait to be decoded.

    Args:
        latents: (images, tokens, channels), packed, on the host.
        statistics: (2, channels) mean and variance that unpack them; see ``vae_statistics``.
    """

    latents: torch.Tensor
    statistics: torch.Tensor
    origin: Origin

    def after(self, images: int) -> SavedLatents:
        """The same without the first images."""
        return replace(
            self, latents=self.latents[images:], origin=replace(self.origin, images=self.origin.images[images:])
        )

    def save(self, path: Path) -> Path:
        """Write the file whole, never over another; returns the name that was free."""
        tensors = {"latents": self.latents.contiguous(), "statistics": self.statistics}

        def write(file: BinaryIO) -> None:
            write_checked(file, tensors, {"format": FORMAT, "origin": self.origin.to_json()})

        return write_new(path, write)


_REQUEST, _IMAGES = TypeAdapter(Request), TypeAdapter(tuple[LatentImage, ...])
_VERSIONS = TypeAdapter(dict[str, str])


def origin_of(source: ModelSource, request: Request, plan: Plan, images: tuple[LatentImage, ...]) -> Origin:
    """Of latents that this version makes now."""
    model = str(source.folder.resolve()) if source.kind == "local" and source.folder else source.spec.source
    return Origin(model, source.revision, request, plan, images, versions())


def saved_latents(
    source: ModelSource,
    request: Request,
    plan: Plan,
    images: tuple[LatentImage, ...],
    packed: torch.Tensor,
    weights: Weights,
) -> SavedLatents:
    """The latents of a run whose plan was carried out up to decoding."""
    origin = origin_of(source, request, plan, images)
    return SavedLatents(packed, vae_statistics(weights, source.spec.transformer.in_channels), origin)


def read_latents(path: Path) -> SavedLatents:
    """Read a file that ``SavedLatents.save`` wrote.

    Raises:
        UsageError: no such file, or not readable.
        CheckpointBroken: truncated, damaged, or not a latents file of this version.
    """
    return latents_of(path, *read_saved_tensors(path))


def read_saved_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and texts of a file of latents.

    Raises:
        UsageError: no such file, or not readable.
        CheckpointBroken: truncated, damaged, or no such file.
    """
    try:
        return read_checked(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the latents: {error.strerror or error}") from None
    except Damaged as error:
        raise CheckpointBroken(f"{path} is no latents file, or not whole: {error}") from error


def latents_of(path: Path, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> SavedLatents:
    """What ``SavedLatents.save`` wrote.

    Raises:
        CheckpointBroken: it is something else.
    """
    if texts.get("format") != FORMAT:
        raise CheckpointBroken(f"{path} is not a latents file that this version wrote")
    try:
        origin = Origin.from_json(texts["origin"], str(path))
        saved = SavedLatents(tensors["latents"], tensors["statistics"], origin)
    except (ValueError, KeyError, TypeError, UsageError) as error:  # pydantic's errors are ValueErrors
        raise CheckpointBroken(f"{path} is not a latents file that this version wrote: {error}") from error
    whole = tuple(stage.stage for stage in origin.plan.stages) == stages_of(origin.plan.workload)
    if not whole or saved.latents.ndim != 3 or len(saved.latents) != len(origin.images) or not origin.images:
        raise CheckpointBroken(f"{path}: its latents and what it says of them do not belong together")
    return saved


def vae_statistics(weights: Weights, channels: int) -> torch.Tensor:
    """(2, channels) float32: mean and variance of the batch norm that stands between packed latents and the VAE."""
    found = torch.empty(2, channels)
    with closing(weights.open("vae")) as files:
        for row, name in enumerate(("bn.running_mean", "bn.running_var")):
            files.read_into(name, found[row])
    return found


def check_latents(saved: SavedLatents, source: ModelSource, weights: Weights, name: str) -> None:
    """Compare a file with the model that is to decode it.

    Args:
        name: what to call the file.

    Raises:
        UsageError: made by a model with another VAE.
    """
    channels, request = source.spec.transformer.in_channels, saved.origin.request
    multiple = source.spec.size_multiple
    tokens = (request.height // multiple) * (request.width // multiple)
    if saved.latents.shape[1:] != (tokens, channels):
        raise UsageError(
            f"{name}: latents of {saved.origin.plan.model} with {saved.latents.shape[1]} tokens of "
            f"{saved.latents.shape[2]} channels; {source.name} has {tokens} of {channels} at {request.width}x"
            f"{request.height}: give the model that made them with -m"
        )
    here = vae_statistics(weights, channels)
    if saved.statistics.shape != here.shape or not torch.allclose(
        saved.statistics, here, rtol=SAME_VAE_TOLERANCE, atol=SAME_VAE_TOLERANCE
    ):
        raise UsageError(
            f"{name}: latents of {saved.origin.plan.model}, whose VAE is not that of {source.name}: give the model "
            "that made them with -m"
        )
