"""What is asked for (Request) and how much work that is (Workload)."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapter_file import adapters_of
from lowmem_flux2.planning.adapters import Adapter, Lora
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.references import MOST_REFERENCES, Reference
from lowmem_flux2.units import real_number, whole_number

Preference = Literal["quality", "balanced", "speed", "memory"]

MAX_SIDE_PX = 4096
MAX_STEPS = 1000
MAX_IMAGES = 1024
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100
MAX_TEXT_TOKENS = 2048
MAX_TEMPERATURE = 10


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, with every default filled in from the resolved model.

    Args:
        prompts: one or more prompts; the images of all of them are one run.
        negative_prompt: for the second guidance pass; None where there is no such pass.
        width, height: pixels, multiples of the model's ``size_multiple``.
        num_inference_steps: denoising steps.
        guidance_scale: embedded (dev) or true classifier-free guidance (klein base).
        num_images_per_prompt: images per prompt.
        max_sequence_length: text tokens, padded to exactly this length.
        references: pictures that all images of the run are made after, in the order that the prompt counts them.
        loras: added to the transformer while it runs.
        caption_upsample_temperature: of the prompts' rewriting by the text encoder; None for the prompts as they are.
        text_encoder_out_layers: hidden states that are taken in place of the model's own; see ``spec_of``.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    max_sequence_length: int
    references: tuple[Reference, ...] = ()
    loras: tuple[Lora, ...] = ()
    caption_upsample_temperature: float | None = None
    text_encoder_out_layers: tuple[int, ...] | None = None

    @property
    def num_images(self) -> int:
        return len(self.prompts) * self.num_images_per_prompt


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of a request: all that cost depends on.

    ``image_tokens`` is (height / 16) x (width / 16) for FLUX.2; ``guidance_passes`` is 2 where the model is not
    distilled, has no embedded guidance and guidance_scale > 1. ``references`` are (width, height) in pixels of each
    reference image, after preprocessing; ``reference_tokens`` are those of all together. ``adapters`` are the request's
    LoRAs, but for those of scale 0. ``upsample_temperature`` is None where prompts are not upsampled.
    ``caches_references``: references are computed in the first step alone (``reference_keys``).
    """

    width: int
    height: int
    image_tokens: int
    text_tokens: int
    reference_tokens: int
    steps: int
    num_prompts: int
    num_images: int
    guidance_passes: int
    references: tuple[tuple[int, int], ...] = ()
    adapters: tuple[Adapter, ...] = ()
    upsample_temperature: float | None = None
    caches_references: bool = False

    @property
    def step_tokens(self) -> int:
        """Tokens of one image that each step computes; of kept references the first step's are more."""
        return self.sequence_tokens - (self.reference_tokens if self.caches_references else 0)

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one image's joint sequence in the transformer."""
        return self.text_tokens + self.reference_tokens + self.image_tokens


def guidance_passes(model: ModelSpec, guidance_scale: float) -> int:
    """2 for true classifier-free guidance, else 1 (Flux2KleinPipeline.do_classifier_free_guidance; dev embeds it)."""
    true_guidance = model.form == "klein" and not model.is_distilled and guidance_scale > 1.0
    return 2 if true_guidance else 1


def token_counts(sizes: Sequence[tuple[int, int]], multiple: int) -> tuple[int, ...]:
    """Tokens of pictures of these (width, height): one a latent patch."""
    return tuple((width // multiple) * (height // multiple) for width, height in sizes)


def spec_of(model: ModelSpec, out_layers: Sequence[int] | None) -> ModelSpec:
    """The model with other hidden states of its text encoder tapped: entry k is the output after k layers, 0 the token
    embedding; in this order, and one may come twice, as in the stock pipelines.

    Raises:
        UsageError: a layer that it lacks, or not as many states as the transformer's text input is made of.
    """
    text = model.text_encoder
    if out_layers is None or tuple(out_layers) == text.out_layers:
        return model
    wanted = ", ".join(map(str, out_layers))
    if len(out_layers) != len(text.out_layers):
        raise UsageError(
            f"text_encoder_out_layers {wanted}: {model.name} takes {len(text.out_layers)} hidden states side by side"
        )
    if any(not 0 <= layer <= text.num_layers for layer in out_layers) or max(out_layers) < 1:
        raise UsageError(
            f"text_encoder_out_layers {wanted}: the text encoder of {model.name} has the states 0 (the token "
            f"embedding) to {text.num_layers}, and one layer at least must run"
        )
    return replace(model, text_encoder=replace(text, out_layers=tuple(out_layers)))


def workload_of(request: Request, model: ModelSpec) -> Workload:
    """The work of a request.

    Raises:
        CheckpointMissing, CheckpointBroken: a LoRA that cannot be applied.
    """
    multiple = model.size_multiple
    sizes = tuple((reference.width, reference.height) for reference in request.references)
    return Workload(
        width=request.width,
        height=request.height,
        image_tokens=(request.height // multiple) * (request.width // multiple),
        text_tokens=request.max_sequence_length,
        reference_tokens=sum(token_counts(sizes, multiple)),
        steps=request.num_inference_steps,
        num_prompts=len(request.prompts),
        num_images=request.num_images,
        guidance_passes=guidance_passes(model, request.guidance_scale),
        references=sizes,
        adapters=adapters_of(request.loras, model),
        caches_references=model.caches_references and bool(sizes),
        upsample_temperature=request.caption_upsample_temperature,
    )


def _checked_side(name: str, value: int, multiple: int) -> None:
    if value <= 0:
        raise UsageError(f"{name} must be at least {multiple} px, not {value}")
    if value > MAX_SIDE_PX:
        raise UsageError(f"{name} {value} px is too large: at most {MAX_SIDE_PX} px a side")
    if value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(f"{name} {value} px is not a multiple of {multiple}: the nearest valid ones are {nearest}")


def make_request(
    model: ModelSpec,
    prompts: tuple[str, ...],
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int | None = None,
    references: tuple[Reference, ...] = (),
    loras: tuple[Lora, ...] = (),
    caption_upsample_temperature: float | None = None,
) -> Request:
    """Fill in the model's defaults and check everything that can be checked before any heavy work.

    The size defaults to the first reference's, where there is one.

    Raises:
        UsageError: an empty prompt, an impossible size, count or length, or an option the model cannot honour.
    """
    defaults = model.defaults
    own = references[0] if references else defaults
    width = whole_number("width", own.width if width is None else width)
    height = whole_number("height", own.height if height is None else height)
    steps = whole_number("steps", defaults.num_inference_steps if num_inference_steps is None else num_inference_steps)
    guidance = real_number("guidance", defaults.guidance_scale if guidance_scale is None else guidance_scale)
    length = defaults.max_sequence_length if max_sequence_length is None else max_sequence_length
    length = whole_number("max-sequence-length", length)
    num_images_per_prompt = whole_number("the number of images", num_images_per_prompt)
    if len(references) > MOST_REFERENCES:
        raise UsageError(f"{len(references)} reference images: at most {MOST_REFERENCES}")
    for text in (*prompts, "" if negative_prompt is None else negative_prompt):
        if not isinstance(text, str):
            raise UsageError(f"a prompt must be text, not {text!r}")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UsageError("the prompt is empty: say what to draw with -p 'a red circle ...'")
    for prompt in (*prompts, negative_prompt or ""):
        if not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UsageError(f"the prompt is not valid UTF-8: {prompt!r}") from None
    _checked_side("width", width, model.size_multiple)
    _checked_side("height", height, model.size_multiple)
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps must be 1 to {MAX_STEPS}, not {steps}")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise UsageError(f"guidance must be 0 to {MAX_GUIDANCE}, not {guidance:g}")
    if num_images_per_prompt < 1 or num_images_per_prompt * len(prompts) > MAX_IMAGES:
        raise UsageError(f"the number of images must be 1 to {MAX_IMAGES}")
    if not 1 <= length <= MAX_TEXT_TOKENS:
        raise UsageError(f"max-sequence-length must be 1 to {MAX_TEXT_TOKENS} tokens, not {length}")
    if negative_prompt is not None and guidance_passes(model, guidance) == 1:
        why = (
            "its guidance is embedded"
            if model.form == "dev"
            else "it is distilled"
            if model.is_distilled
            else f"guidance {guidance:g} is not above 1"
        )
        raise UsageError(f"a negative prompt has no effect on {model.name}: {why}; leave it out")
    return Request(
        prompts=prompts,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=num_images_per_prompt,
        max_sequence_length=length,
        references=references,
        loras=loras,
        caption_upsample_temperature=_checked_temperature(caption_upsample_temperature, model, len(references)),
    )


def _checked_temperature(temperature: float | None, model: ModelSpec, references: int) -> float | None:
    """None for 0 too, as in the stock pipeline."""
    if temperature is None or real_number("caption upsampling: the temperature", temperature) == 0:
        return None
    if not 0 < temperature <= MAX_TEMPERATURE:
        raise UsageError(f"caption upsampling: the temperature must be above 0 and at most {MAX_TEMPERATURE}; try 0.15")
    if model.form != "dev":
        raise UsageError(
            f"caption upsampling: {model.name} is of the klein form, whose pipeline has none; rewrite the prompt "
            "elsewhere, or take flux2-dev"
        )
    if references and model.text_encoder.vision is None:
        raise UsageError(
            f"caption upsampling with reference images: the text encoder of {model.name} has no vision part; "
            "leave one of the two out"
        )
    return float(temperature)


def image_seeds(seed: int | None, count: int) -> list[int]:
    """``seed + i`` for image i; a seed is drawn where none is given."""
    first = secrets.randbelow(2**31) if seed is None else whole_number("the seed", seed)
    if not 0 <= first <= MAX_SEED - count:
        raise UsageError(f"the seed must be 0 to {MAX_SEED - count}, not {first}")
    return [first + index for index in range(count)]
