"""The arguments of ``Engine.generate``: what may be asked together, and what the stock pipelines mean by some."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, cast

import torch

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.runtime.generation import Generation
from lowmem_flux2.runtime.images import OUTPUT_TYPES


def check_alone(*given: object) -> None:
    """With ``from_latents`` all these are the latents' own.

    Raises:
        UsageError: one of them is given.
    """
    if any(value is not None for value in given):
        raise UsageError("from_latents: prompt, seed, size and all else are the latents' own: leave them out")


def check_together(
    prompt: object, prompt_embeds: object, generator: object, seed: int | None, latents: object, output_type: str
) -> None:
    """Arguments that say the same thing twice, or not at all.

    Raises:
        UsageError: names them.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise UsageError("give either prompt or prompt_embeds, and not both")
    if generator is not None and seed is not None:
        raise UsageError("give either seed or generator, and not both")
    if latents is not None and seed is not None:
        raise UsageError("give either seed or latents, and not both: latents are the noise that a seed would draw")
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type {output_type!r}: one of {', '.join(OUTPUT_TYPES)}")


def in_place_of_prompts(embeds: torch.Tensor | None) -> tuple[list[str], int]:
    """What stands for the prompts that embeddings (prompts, tokens, width) are of, and their length.

    Raises:
        UsageError: another shape.
    """
    assert embeds is not None
    if embeds.ndim != 3:
        raise UsageError(f"prompt_embeds have the shape {tuple(embeds.shape)}: (prompts, tokens, width)")
    return ["(embeddings)"] * embeds.shape[0], int(embeds.shape[1])


def lora_scale(attention_kwargs: Mapping[str, Any] | None, loras: Sequence[Lora]) -> float:
    """What ``attention_kwargs`` does in the stock pipelines: ``scale`` multiplies the scales of all LoRAs.

    Raises:
        UsageError: a ``scale`` with nothing to scale; or another key, which the stock pipelines ignore with a warning,
            but for ``attention_mask``.
    """
    kwargs = dict(attention_kwargs or {})
    scale = kwargs.pop("scale", 1.0)
    if not isinstance(scale, int | float) or not isfinite(scale):
        raise UsageError(f"attention_kwargs: scale {scale!r} is no finite number")
    if scale != 1 and not loras:
        raise UsageError("attention_kwargs: 'scale' multiplies the scales of LoRAs, and there is none: leave it out")
    if "attention_mask" in kwargs:
        raise UsageError(
            "attention_kwargs: attention_mask: FLUX.2 was trained without one, text padding included, and none is "
            "counted in the plan: leave it out"
        )
    if kwargs:
        raise UsageError(f"attention_kwargs: {', '.join(kwargs)}: FLUX.2's attention has no such option")
    return float(scale)


def returned(made: Generation, return_dict: bool) -> Generation:
    """What ``generate`` hands out. The tuple is for callers of the stock pipelines; types tell of the other."""
    return made if return_dict else cast("Generation", (made.images,))


def rounded(name: str, value: int | None, multiple: int) -> int | None:
    """A side in pixels rounded down to a multiple, with a warning, as in diffusers."""
    if value is None or value % multiple == 0 or value < multiple:
        return value
    below = value // multiple * multiple
    warnings.warn(f"{name} {value} is not a multiple of {multiple}: using {below}", stacklevel=4)
    return below
