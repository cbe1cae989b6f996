"""Groups of options that commands share, each a frozen object; ``flattened`` spells them out for typer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from lowmem_flux2 import options as opt


@dataclass(frozen=True, slots=True)
class RequestFlags:
    """What to draw, as typed; None takes the plan file's value, else the model's."""

    prompt: opt.Prompts = None
    prompt_file: opt.PromptFile = None
    model: opt.Model = None
    text_encoder: opt.TextEncoder = None
    vae: opt.Vae = None
    tokenizer: opt.Tokenizer = None
    width: opt.Width = None
    height: opt.Height = None
    steps: opt.Steps = None
    guidance: opt.Guidance = None
    num_images: opt.NumImages = None
    negative_prompt: opt.Negative = None
    max_sequence_length: opt.Length = None
    text_encoder_out_layers: opt.OutLayers = None
    image: opt.References = None
    image_size: opt.ImageSize = None
    lora: opt.Loras = None
    caption_upsample: opt.CaptionUpsample = None
    revision: opt.Revision = None
    offline: opt.Offline = False


@dataclass(frozen=True, slots=True)
class FitFlags:
    """The machine, its budgets, and what the planner may not choose by itself."""

    profile: opt.ProfileName = "auto"
    device: opt.Device = "auto"
    dtype: opt.Dtype = "auto"
    max_vram: opt.MaxVram = None
    max_ram: opt.MaxRam = None
    weight_format: opt.WeightFormat = "auto"
    text_weight_format: opt.TextFormat = "auto"
    prefer: opt.Preferred = opt.Prefer.balanced
    placement: opt.PlacementName = opt.Placed.auto
    step_cache: opt.StepCache = "auto"
    vae_tile: opt.VaeTile = "auto"
    batch_size: opt.BatchSize = 0


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: each parameter that is a group of flags replaced by the group's fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if not is_dataclass(hint):
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(hint, type)
        groups[name] = hint
        kinds = get_type_hints(hint, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
            )
            for field in fields(hint)
        ]

    def run(**typed: Any) -> None:
        made = {
            name: group(**{field.name: typed.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **typed)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
