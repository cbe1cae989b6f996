"""What may be asked of ``Engine.generate`` together, and what of the stock pipelines' arguments is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.models import ModelSpec
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


def check_stock(
    model: ModelSpec,
    return_dict: bool,
    attention_kwargs: Mapping[str, Any] | None,
    text_encoder_out_layers: Sequence[int] | None,
) -> None:
    """Arguments of the stock pipelines that this engine takes only at the value they have anyway.

    Raises:
        UsageError: another value; says what it would have to be, and why.
    """
    if not return_dict:
        raise UsageError("return_dict=False: generate returns a Generation; the stock tuple is (its images,)")
    kwargs = dict(attention_kwargs or {})
    if kwargs.pop("scale", 1.0) != 1.0:
        raise UsageError("attention_kwargs: 'scale' is that of LoRA weights: give each LoRA its own scale instead")
    if kwargs:
        raise UsageError(f"attention_kwargs: {', '.join(kwargs)}: FLUX.2's attention has no such option")
    layers = model.text_encoder.out_layers
    if text_encoder_out_layers is not None and tuple(text_encoder_out_layers) != layers:
        raise UsageError(
            f"text_encoder_out_layers {tuple(text_encoder_out_layers)}: {model.name} was trained on the states after "
            f"layers {', '.join(map(str, layers))}, and no more than these are loaded; leave it out"
        )


def rounded(name: str, value: int | None, multiple: int) -> int | None:
    """A side in pixels rounded down to a multiple, with a warning, as in diffusers."""
    if value is None or value % multiple == 0 or value < multiple:
        return value
    below = value // multiple * multiple
    warnings.warn(f"{name} {value} is not a multiple of {multiple}: using {below}", stacklevel=4)
    return below
