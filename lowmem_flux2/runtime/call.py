"""The arguments of ``Engine.generate``: what may be asked together, and what the stock pipelines mean by some."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, cast

import torch

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.workload import guidance_passes
from lowmem_flux2.runtime.generation import Generation
from lowmem_flux2.runtime.images import OUTPUT_TYPES
from lowmem_flux2.runtime.inputs import check_tensor
from lowmem_flux2.units import parse_bytes, real_number, whole_number


def size_of(name: str, size: int | str | None) -> int | None:
    """Bytes, of text too. Raises UsageError: no size, or nothing at all."""
    if size is None or isinstance(size, str):
        return None if size is None else parse_bytes(size)
    if whole_number(name, size) <= 0:
        raise UsageError(f"{name} must be above 0 bytes, not {size}")
    return size


def check_alone(*given: object) -> None:
    """With ``from_latents`` all these are the latents' own.

    Raises:
        UsageError: one of them is given.
    """
    if any(value is not None for value in given):
        raise UsageError("from_latents: prompt, seed, size and all else are the latents' own: leave them out")


def check_together(
    prompt: object,
    prompt_embeds: object,
    generator: object,
    seed: int | None,
    latents: object,
    output_type: str,
    plan: object,
) -> None:
    """Arguments that say the same thing twice, or not at all, or what is none of the kinds there are.

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
    if not isinstance(plan, Plan | None):
        raise UsageError(f"plan: a {type(plan).__name__}, not a Plan; planning.plan.read_plan reads a file")


def prompts_of(prompt: object) -> tuple[str, ...]:
    """One prompt or several, as they were given.

    Raises:
        UsageError: neither text nor a list.
    """
    if not isinstance(prompt, str | list | tuple):
        raise UsageError(f"prompt: give text or a list of texts, not {prompt!r}")
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def in_place_of_prompts(
    model: ModelSpec,
    guidance_scale: float | None,
    embeds: torch.Tensor | None,
    negative: torch.Tensor | None,
    asked_tokens: int | None,
) -> tuple[list[str], int]:
    """What stands for the prompts that embeddings (prompts, tokens, width) are of, and the longest text of a pass.

    A negative prompt without embeddings is as long as it is asked for, else as by default, whatever the prompts' are.

    Raises:
        UsageError: no embeddings, none of that shape, or fewer tokens asked for than they have.
    """
    for name, given in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative)):
        if given is not None:
            check_tensor(name, given)
            if given.ndim != 3 or 0 in given.shape:
                raise UsageError(f"{name} have the shape {tuple(given.shape)}: (prompts, tokens, width)")
    assert embeds is not None
    longest = max(int(given.shape[1]) for given in (embeds, negative) if given is not None)
    if asked_tokens is not None and whole_number("max_sequence_length", asked_tokens) < longest:
        raise UsageError(f"max_sequence_length {asked_tokens}: the embeddings have {longest} tokens; leave it out")
    guidance = model.defaults.guidance_scale if guidance_scale is None else real_number("guidance", guidance_scale)
    if negative is None and guidance_passes(model, guidance) == 2:
        longest = max(longest, asked_tokens or model.defaults.max_sequence_length)
    return ["(embeddings)"] * embeds.shape[0], longest


def sigmas_of(sigmas: Iterable[float] | None) -> tuple[float, ...] | None:
    """A schedule as floats, of numpy's and tensors' numbers too.

    Raises:
        UsageError: no list of finite numbers.
    """
    if sigmas is None:
        return None
    if isinstance(sigmas, str | bytes) or not isinstance(sigmas, Iterable):
        raise UsageError(f"sigmas: give a list of numbers, not {sigmas!r}")
    found = tuple(real_number("a sigma", sigma) for sigma in sigmas)
    if not all(map(isfinite, found)):
        raise UsageError(f"sigmas: there is NaN or infinity among {', '.join(map(str, found))}")
    return found


def layers_of(out_layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """``text_encoder_out_layers`` as ints. Raises UsageError: no list of whole numbers."""
    if not isinstance(out_layers, list | tuple | None):
        raise UsageError(f"text_encoder_out_layers: give a list of numbers, not {out_layers!r}")
    return None if out_layers is None else tuple(whole_number("text_encoder_out_layers", layer) for layer in out_layers)


def lora_scale(attention_kwargs: Mapping[str, Any] | None, loras: Sequence[Lora]) -> float:
    """What ``attention_kwargs`` does in the stock pipelines: ``scale`` multiplies the scales of all LoRAs.

    Raises:
        UsageError: a ``scale`` with nothing to scale; or another key, which the stock pipelines ignore with a warning,
            but for ``attention_mask``.
    """
    if not isinstance(attention_kwargs, Mapping | None):
        raise UsageError(f"attention_kwargs: give a dict, not {attention_kwargs!r}")
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
    if value is None:
        return None
    value = whole_number(name, value)
    if value % multiple == 0 or value < multiple:
        return value
    below = value // multiple * multiple
    warnings.warn(f"{name} {value} is not a multiple of {multiple}: using {below}", stacklevel=4)
    return below
