"""A parsed command line: what was asked for, resolved into the objects that planning takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from typer import Context

from lowmem_flux2.errors import UsageError
from lowmem_flux2.flags import FitFlags, RequestFlags
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.job import Machine, resolve_machine
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection
from lowmem_flux2.planning.prompt_file import PromptLine, read_prompt_file
from lowmem_flux2.planning.references import STOCK_BOUND_PX, references_of
from lowmem_flux2.planning.sources import EMBEDDED, ModelSource, check_revision, resolve_model
from lowmem_flux2.planning.workload import Request, make_request, spec_of
from lowmem_flux2.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed and resolved command line: all that the planner needs."""

    model: str
    source: ModelSource
    machine: Machine
    request: Request
    selection: Selection


def after(flags: RequestFlags, plan: Plan) -> RequestFlags:
    """Fill what was not typed from a plan that is to be carried out."""
    work = plan.workload
    planned: dict[str, Any] = {
        "model": plan.model,
        "width": work.width,
        "height": work.height,
        "steps": work.steps,
        "guidance": plan.guidance_scale,
        "num_images": plan.num_images_per_prompt,
        "max_sequence_length": work.text_tokens,
        "caption_upsample": work.upsample_temperature,
        "lora": [f"{adapter.path}:{adapter.scale!r}" for adapter in work.adapters] or None,
    }
    return replace(flags, **{name: value for name, value in planned.items() if getattr(flags, name) is None})


def resolve(
    flags: RequestFlags,
    fit: FitFlags,
    selection: Selection,
    prompts: tuple[str, ...],
    *,
    without_prompt: str = "",
    cache: Path | None = None,
) -> Asked:
    """Resolve model, request and machine.

    Args:
        cache: the cache folder as it was given.
        without_prompt: stands for a prompt where only the size of the work matters; then sizes may stand for
            reference images too.
    """
    model = EMBEDDED if flags.model is None else flags.model
    source = resolve_model(
        model,
        revision=flags.revision,
        offline=flags.offline,
        text_encoder=flags.text_encoder,
        vae=flags.vae,
        tokenizer=flags.tokenizer,
        cache=cache,
    )
    check_revision(source, flags.revision)
    out_layers = _layers(flags.text_encoder_out_layers)
    source = replace(source, spec=spec_of(source.spec, out_layers))
    if flags.image_size is not None and not flags.image:
        raise UsageError("--image-size bounds reference images: give --image, or leave it out")
    bound = STOCK_BOUND_PX if flags.image_size is None else flags.image_size
    references = references_of(flags.image or (), source.spec.size_multiple, bound, may_be_sizes=bool(without_prompt))
    request = make_request(
        source.spec,
        prompts or ((without_prompt,) if without_prompt else ()),
        negative_prompt=flags.negative_prompt,
        width=flags.width,
        height=flags.height,
        num_inference_steps=flags.steps,
        guidance_scale=flags.guidance,
        num_images_per_prompt=1 if flags.num_images is None else flags.num_images,
        max_sequence_length=flags.max_sequence_length,
        references=references,
        loras=tuple(map(Lora.parse, flags.lora or ())),
        caption_upsample_temperature=flags.caption_upsample,
    )
    request = replace(request, text_encoder_out_layers=out_layers)
    machine = resolve_machine(fit.profile, fit.device, selection.max_ram_bytes)
    check_caps(selection, machine)
    return Asked(model, source, machine, request, selection)


def _layers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise UsageError(f"--text-encoder-out-layers {text}: numbers with commas between them, as 10,20,30") from None


def check_caps(selection: Selection, machine: Machine) -> None:
    if selection.max_vram_bytes is not None and machine.hardware.device == "cpu":
        raise UsageError("--max-vram: there is no VRAM on the cpu; cap RAM with --max-ram")


def selection_of(fit: FitFlags) -> Selection:
    return Selection(
        prefer=fit.prefer.value,
        weight_format=fit.weight_format,
        text_weight_format=fit.text_weight_format,
        dtype=fit.dtype,
        placement=fit.placement.value,
        vae_tile=fit.vae_tile,
        step_cache=fit.step_cache,
        batch_size=fit.batch_size,
        max_vram_bytes=_size("--max-vram", fit.max_vram),
        max_ram_bytes=_size("--max-ram", fit.max_ram),
    )


def _size(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def read_prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The prompts alone, where all of them are planned as one."""
    prompts = list(given or ())
    if file is not None:
        for located in read_prompt_file(file):
            if located.line != PromptLine(located.line.prompt, seed=located.line.seed):
                raise UsageError(
                    f"{located.where}: lines that ask for more than a prompt are planned by "
                    f"'generate --prompt-file {file} --dry-run'"
                )
            prompts.append(located.line.prompt)
    return tuple(prompts)


IN_THE_FILE = frozenset(
    {
        *("prompt", "prompt_file", "model", "width", "height", "steps", "guidance", "num_images", "negative_prompt"),
        *("max_sequence_length", "image", "image_size", "lora", "caption_upsample", "revision", "seed"),
        "text_encoder_out_layers",
        *("dtype", "weight_format", "text_weight_format", "placement", "step_cache", "batch_size", "plan"),
    }
)
"""Parameters whose values saved latents hold."""
NOT_AGAIN = frozenset({"output", "from_latents", "manifest", "dry_run"})
"""Those that a command which goes on has anew, or that made no run which could be gone on with."""
OF_DECODING, OF_STEPS = frozenset({"prefer", "vae_tile"}), frozenset({"save_latents"})
"""Open again only where all that is left is to decode; of use only where steps are left."""


def words_to_go_on(context: Context, *, decodes: bool) -> tuple[str, ...]:
    """What was typed, word by word, but for what saved latents hold: any other flag counts, whatever may be added.

    Args:
        decodes: for the command that decodes denoised latents, as against one that takes steps before.
    """
    left_out = IN_THE_FILE | NOT_AGAIN | (OF_STEPS if decodes else OF_DECODING)
    if any(context.params[part] for part in ("text_encoder", "vae", "tokenizer")):  # which go with a single file
        left_out -= {"model"}
    return typed_words(context, left_out)


def typed_words(context: Context, left_out: frozenset[str]) -> tuple[str, ...]:
    """What was typed, word by word, but for the parameters of these names."""
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in left_out or source is None or source.name != "COMMANDLINE":
            continue
        flag, value = max(parameter.opts, key=len), context.params[name]
        if isinstance(value, bool):
            words += [flag] if value else []
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [flag, str(each.value if isinstance(each, Enum) else each)]
    return tuple(words)


def check_nothing_is_chosen(selection: Selection, why: str = "--plan carries out what the file says") -> None:
    """With ``--plan`` the plan has chosen: only caps may be given, and are compared with its peaks.

    Raises:
        UsageError: a flag that chooses.
    """
    if replace(selection, max_vram_bytes=None, max_ram_bytes=None) != Selection():
        raise UsageError(
            f"{why}: leave out --prefer, --weight-format, --text-weight-format, "
            "--dtype, --placement, --step-cache, --vae-tile and --batch-size, or plan again with them"
        )


def check_all_is_in_the_file(flags: RequestFlags, selection: Selection, seed: int | None, plan: Path | None) -> None:
    """With ``--from-latents`` all but decoding is done.

    Raises:
        UsageError: a flag about what is done already.
    """
    asked = replace(flags, model=None, text_encoder=None, vae=None, tokenizer=None, offline=False) != RequestFlags()
    if asked or seed is not None or plan is not None:
        raise UsageError(
            "--from-latents: prompt, seed, size, steps and guidance are the file's: leave out --plan and all flags "
            "about what to draw but -m, --text-encoder, --vae, --tokenizer and --offline"
        )
    open_to_choice = replace(
        selection, prefer="balanced", dtype="auto", vae_tile="auto", max_vram_bytes=None, max_ram_bytes=None
    )
    if open_to_choice != Selection():
        raise UsageError(
            "--from-latents decodes only: leave out --weight-format, --text-weight-format, --placement, --step-cache "
            "and --batch-size"
        )
