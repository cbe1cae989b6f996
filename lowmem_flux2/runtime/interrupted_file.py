"""A run that was stopped while denoising, in a file: all that it needs to go on at the next step, bit for bit.

A safetensors file with the noise, the embeddings, what is denoised and what is under way; its metadata says after which
step, with which sigmas, by which weights, and all that the pictures will say of themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.plan import Plan, stages_of
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.runtime.checked import write_checked
from lowmem_flux2.runtime.denoise import Progress
from lowmem_flux2.runtime.executor import UnderWay
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.latents_file import (
    LatentImage,
    Origin,
    SavedLatents,
    latents_of,
    origin_of,
    read_saved_tensors,
)
from lowmem_flux2.runtime.newfile import write_new
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.store import content_fingerprint

FORMAT = "lowmem-flux2 interrupted 1"
KEPT = "kept."
SUFFIX = ".interrupted.safetensors"


@dataclass(frozen=True, slots=True)
class InterruptedRun:
    """Where denoising stopped.

    Args:
        noise: (images, channels, height, width), of all images.
        prompt_embeds, negative_prompt_embeds: (prompts, tokens, joint_dim).
        finished: (images, tokens, channels), packed, of the batches that are done; None where none is.
        under_way: the same of the batch under way after ``step`` steps; None where the next has not begun.
        sigmas: the caller's schedule; None for the pipeline's own.
        weights: which transformer it was; see ``weights_of``.
        kept: what the step cache held of the batch under way, by the names of ``step_cache.Reuse.tensors``.
        changed_embeds: (images of the batch under way, tokens, joint_dim), where a step's callback has replaced them.
        reference_latents, reference_ids: of ``References``, where there are any; the ids in fp32, which holds them.
    """

    noise: torch.Tensor
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    finished: torch.Tensor | None
    under_way: torch.Tensor | None
    step: int
    sigmas: tuple[float, ...] | None
    weights: str
    origin: Origin
    reference_latents: torch.Tensor | None = None
    reference_ids: torch.Tensor | None = None
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)
    changed_embeds: torch.Tensor | None = None

    @property
    def inputs(self) -> Inputs:
        """What makes a run of the same request and plan go on here."""
        size = self.origin.plan.stage("denoise").batch_size
        done = [] if self.finished is None else list(self.finished.split(size))
        references = None
        if self.reference_latents is not None and self.reference_ids is not None:
            references = References(self.reference_latents, self.reference_ids.to(torch.int64))
        return Inputs(
            latents=self.noise,
            prompt_embeds=self.prompt_embeds,
            negative_prompt_embeds=self.negative_prompt_embeds,
            sigmas=self.sigmas,
            progress=Progress(done, self.under_way, self.step, saved=self.kept, embeds=self.changed_embeds),
            encoded_references=references,
        )

    def save(self, path: Path) -> Path:
        """Write the file whole, never over another; returns the name that was free."""
        given = {name: getattr(self, name) for name in _TENSORS}
        given |= {f"{KEPT}{name}": tensor for name, tensor in self.kept.items()}
        tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
        progress = json.dumps({"step": self.step, "sigmas": self.sigmas, "weights": self.weights})

        def write(file: BinaryIO) -> None:
            write_checked(file, tensors, {"format": FORMAT, "origin": self.origin.to_json(), "progress": progress})

        return write_new(path, write)


_TENSORS = (
    "noise",
    "prompt_embeds",
    "negative_prompt_embeds",
    "finished",
    "under_way",
    "reference_latents",
    "reference_ids",
    "changed_embeds",
)


def weights_of(source: ModelSource, plan: Plan) -> str:
    """A fingerprint of what is in the transformer's files, and the format that a plan denoises in."""
    assert source.folder is not None
    stage = plan.stage("denoise")
    content = content_fingerprint(source.folder, "transformer")
    return f"{stage.weight_format} {stage.compute_dtype} {content}"


def interrupted_run(
    source: ModelSource,
    request: Request,
    plan: Plan,
    images: tuple[LatentImage, ...],
    done: UnderWay,
    sigmas: tuple[float, ...] | None,
) -> InterruptedRun:
    """What to keep of a run whose plan was being carried out."""
    progress, repeats = done.progress, request.num_images_per_prompt
    held = progress.kept
    return InterruptedRun(
        noise=done.noise,
        prompt_embeds=done.embeds[::repeats],
        negative_prompt_embeds=None if done.negative is None else done.negative[::repeats],
        finished=torch.cat(progress.finished) if progress.finished else None,
        under_way=None if progress.latents is None else progress.latents.to("cpu"),
        step=progress.step,
        sigmas=sigmas,
        weights=weights_of(source, plan),
        origin=origin_of(source, request, plan, images),
        reference_latents=None if done.references is None else done.references.latents,
        reference_ids=None if done.references is None else done.references.ids.to(torch.float32),
        kept={name: tensor.to("cpu") for name, tensor in held.items()},
        changed_embeds=None if progress.embeds is None else progress.embeds.to("cpu"),
    )


def read_saved(path: Path) -> SavedLatents | InterruptedRun:
    """Read a file of latents, denoised or on their way.

    Raises:
        UsageError: no such file, or not readable.
        CheckpointBroken: truncated, damaged, or not a latents file of this version.
    """
    tensors, texts = read_saved_tensors(path)
    if texts.get("format") != FORMAT:
        return latents_of(path, tensors, texts)
    try:
        origin, progress = Origin.from_json(texts["origin"], str(path)), json.loads(texts["progress"])
        sigmas = progress["sigmas"]
        run = InterruptedRun(
            tensors["noise"],
            tensors["prompt_embeds"],
            tensors.get("negative_prompt_embeds"),
            tensors.get("finished"),
            tensors.get("under_way"),
            int(progress["step"]),
            None if sigmas is None else tuple(float(sigma) for sigma in sigmas),
            str(progress["weights"]),
            origin,
            tensors.get("reference_latents"),
            tensors.get("reference_ids"),
            {name.removeprefix(KEPT): tensor for name, tensor in tensors.items() if name.startswith(KEPT)},
            tensors.get("changed_embeds"),
        )
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise CheckpointBroken(f"{path} is not an interrupted run that this version wrote: {error}") from error
    whole = tuple(stage.stage for stage in origin.plan.stages) == stages_of(origin.plan.workload)
    has_references = run.reference_latents is not None and run.reference_ids is not None
    whole = whole and has_references is bool(origin.request.references)
    if not whole or len(run.noise) != origin.request.num_images or run.step > origin.request.num_inference_steps:
        raise CheckpointBroken(f"{path}: its latents and what it says of them do not belong together")
    return run


def check_interrupted(run: InterruptedRun, source: ModelSource, name: str) -> None:
    """Compare with the model that is to go on.

    Args:
        name: what to call the run.

    Raises:
        UsageError: another transformer.
    """
    here = weights_of(source, run.origin.plan)
    if here != run.weights:
        raise UsageError(
            f"{name}: begun by {run.origin.plan.model} with weights {run.weights}, here {source.name} with {here}: "
            "give the model that began it with -m, or begin anew"
        )
