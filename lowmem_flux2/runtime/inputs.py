"""What a caller hands over in place of what the stages would make, checked against the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.batches import Batch, negatives_of, prompt_batches
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.workload import Request, guidance_passes
from lowmem_flux2.runtime.denoise import Generators, Progress
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.step_hook import StepHook

OnPicture = Callable[[int, torch.Tensor, Plan], None]
OnBatch = Callable[[int, torch.Tensor, Plan], None]
Wanted = Literal["pictures", "vae_latents", "packed_latents", "embeddings", "prompts"]
UNDENOISED: tuple[Wanted, ...] = ("embeddings", "prompts")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors and hooks that a Python caller may hand over in place of what the stages would make.

    Shapes as in diffusers: ``prompt_embeds`` and ``negative_prompt_embeds`` (prompts, tokens, joint_dim), ``latents``
    (images, channels, height, width) noise.
    """

    generators: Generators = None
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    sigmas: Sequence[float] | None = None
    hook: StepHook | None = None
    references: Sequence[torch.Tensor] = ()
    """Pictures (height, width, 3) in 8 bits, of the sizes that the request has."""
    encoded_references: References | None = None
    """The same, encoded already."""
    seen: Image.Image | None = None
    """What the text encoder sees of the references where captions are upsampled: ``vision.side_by_side``."""
    upsample_seed: int = 0
    """Of the sampling of upsampled captions."""
    on_upsampled: Callable[[tuple[str, ...]], None] | None = None
    """Told of the prompts that the text encoder made of the request's."""
    result: Wanted = "pictures"
    known: Mapping[Batch, torch.Tensor] = field(default_factory=dict)
    """Embeddings of batches of prompts from the prompt cache: equal to those that the encoder would make."""
    on_encoded: Callable[[Batch, torch.Tensor, Plan], None] | None = None
    """Told of each batch of prompts that the encoder made, or the prompt cache held, with the plan that made it."""
    packed: torch.Tensor | None = None
    """Denoised latents (images, tokens, channels): nothing is left to do but to decode them."""
    progress: Progress | None = None
    """How far an earlier run of the same plan has denoised the same noise: goes on there."""
    on_batch: OnBatch | None = None
    """Told of each batch that is denoised, by its number, packed and on the host, with the plan that made it."""
    keeps_pictures: bool = True
    """Whether pictures are handed back at the end too, besides ``on_picture``."""
    interruption: Interruption | None = None
    """May ask to stop after a layer, step or picture."""
    on_latents: Callable[[torch.Tensor, Plan], None] | None = None
    """Told of the denoised latents, packed, before they are decoded."""
    on_picture: OnPicture | None = None
    """Told of each picture (1, 3, height, width) as soon as it is decoded, so that a later failure loses none, with the
    plan that made it: the ladder may have taken smaller tiles."""


def check_tensor(name: str, given: object) -> None:
    """Raises UsageError: no tensor, or one with NaN or infinity, which denoising would blame the weights for."""
    if not isinstance(given, torch.Tensor):
        raise UsageError(f"{name}: give a tensor, not a {type(given).__name__}")
    if not bool(torch.isfinite(given).all()):
        raise UsageError(f"{name}: there is NaN or infinity in it")


def check_inputs(model: ModelSpec, request: Request, inputs: Inputs) -> None:
    """Compare what the caller hands over with the request, before anything is fetched or loaded.

    Raises:
        UsageError: a wrong number of generators or sigmas, a wrong shape, or what is no tensor or generator at all.
    """
    for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
        if getattr(inputs, name) is not None:
            check_tensor(name, getattr(inputs, name))
    for one in inputs.generators if isinstance(inputs.generators, Sequence) else (inputs.generators,):
        if not isinstance(one, torch.Generator | None):
            raise UsageError(f"generator: {one!r} is no torch.Generator; a number goes into seed")
    shapes = [(one.height, one.width, 3) for one in request.references]
    if inputs.references and [tuple(picture.shape) for picture in inputs.references] != shapes:
        raise UsageError(f"reference pictures have other shapes than the request's, {shapes}")
    if request.caption_upsample_temperature is not None and request.references and inputs.seen is None:
        raise UsageError("caption upsampling with reference images: the text encoder is to see them too")
    given = inputs.generators
    if isinstance(given, Sequence) and len(given) != request.num_images:
        raise UsageError(f"{len(given)} generators for {request.num_images} images: one each, or a single one")
    if inputs.sigmas is not None and len(inputs.sigmas) != request.num_inference_steps:
        raise UsageError(f"{len(inputs.sigmas)} sigmas for {request.num_inference_steps} steps: give one a step")
    multiple, channels = model.size_multiple, model.transformer.in_channels
    shape = (request.num_images, channels, request.height // multiple, request.width // multiple)
    if inputs.latents is not None and tuple(inputs.latents.shape) != shape:
        raise UsageError(f"latents have the shape {tuple(inputs.latents.shape)}, this request needs {shape}")
    if inputs.negative_prompt_embeds is not None and guidance_passes(model, request.guidance_scale) == 1:
        raise UsageError(f"negative_prompt_embeds have no effect on {model.name} with this guidance; leave them out")
    width = model.text_encoder.joint_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = getattr(inputs, name)
        if embeds is not None and not embeds.is_floating_point():
            raise UsageError(f"{name} are of {embeds.dtype}: give floating-point numbers")
        if embeds is not None and (embeds.ndim != 3 or embeds.shape[::2] != (len(request.prompts), width)):
            needed = f"({len(request.prompts)}, tokens, {width})"
            raise UsageError(f"{name} have the shape {tuple(embeds.shape)}, this request needs {needed}")
        if embeds is not None and embeds.shape[1] > request.max_sequence_length:
            raise UsageError(
                f"{name} have {embeds.shape[1]} tokens, the request has {request.max_sequence_length}: "
                "give that many with max_sequence_length"
            )


def batches_to_encode(request: Request, plan: Plan, inputs: Inputs | None = None) -> list[Batch]:
    """Batches of prompts in the plan's composition whose embeddings the caller does not hand over; negative ones last,
    equal ones of them once."""
    inputs = inputs or Inputs()
    batches = prompt_batches(request.prompts, plan.stage("encode").batch_size)
    wanted = batches if inputs.prompt_embeds is None else []
    if plan.workload.guidance_passes == 2 and inputs.negative_prompt_embeds is None:
        wanted = wanted + list(dict.fromkeys(negatives_of(batches, request.negative_prompt)))
    return wanted
