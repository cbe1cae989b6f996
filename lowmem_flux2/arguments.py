"""A parsed command line: what was asked for, resolved into the objects that planning takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_flux2 import options as opt
from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.job import Machine, resolve_machine
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection
from lowmem_flux2.planning.sources import EMBEDDED, ModelSource, resolve_model
from lowmem_flux2.planning.workload import Request, make_request
from lowmem_flux2.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed and resolved command line: all that the planner needs."""

    model: str
    source: ModelSource
    machine: Machine
    request: Request
    selection: Selection


@dataclass(frozen=True, slots=True)
class Wanted:
    """The request's flags as typed; None takes the plan file's value, else the model's."""

    model: str | None
    prompts: tuple[str, ...]
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    num_images: int | None
    negative_prompt: str | None
    max_sequence_length: int | None

    def after(self, plan: Plan) -> Wanted:
        """Fill what was not typed from a plan that is to be carried out."""
        work = plan.workload
        return Wanted(
            model=self.model or plan.model,
            prompts=self.prompts,
            width=work.width if self.width is None else self.width,
            height=work.height if self.height is None else self.height,
            steps=work.steps if self.steps is None else self.steps,
            guidance=plan.guidance_scale if self.guidance is None else self.guidance,
            num_images=work.num_images // work.num_prompts if self.num_images is None else self.num_images,
            negative_prompt=self.negative_prompt,
            max_sequence_length=work.text_tokens if self.max_sequence_length is None else self.max_sequence_length,
        )


def resolve(
    wanted: Wanted, selection: Selection, profile: str, device: str, revision: str | None, offline: bool
) -> Asked:
    model = wanted.model or EMBEDDED
    source = resolve_model(model, revision=revision, offline=offline)
    request = make_request(
        source.spec,
        wanted.prompts,
        negative_prompt=wanted.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance,
        num_images_per_prompt=1 if wanted.num_images is None else wanted.num_images,
        max_sequence_length=wanted.max_sequence_length,
    )
    if revision is not None and source.kind != "hub":
        raise UsageError(f"--revision {revision}: {model} is not on the hub; leave the flag out")
    machine = resolve_machine(profile, device, selection.max_ram_bytes)
    if selection.max_vram_bytes is not None and machine.hardware.device == "cpu":
        raise UsageError("--max-vram: there is no VRAM on the cpu; cap RAM with --max-ram")
    return Asked(model, source, machine, request, selection)


def selection_of(
    *,
    prefer: opt.Prefer,
    weight_format: str,
    text_weight_format: str,
    dtype: str,
    placement: opt.Placed,
    vae_tile: str,
    step_cache: str,
    batch_size: int,
    max_vram: str | None,
    max_ram: str | None,
) -> Selection:
    return Selection(
        prefer=prefer.value,
        weight_format=weight_format,
        text_weight_format=text_weight_format,
        dtype=dtype,
        placement=placement.value,
        vae_tile=vae_tile,
        step_cache=step_cache,
        batch_size=batch_size,
        max_vram_bytes=_size("--max-vram", max_vram),
        max_ram_bytes=_size("--max-ram", max_ram),
    )


def _size(flag: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def read_prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    prompts = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompt-file {file}: cannot read it: {error}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"--prompt-file {file}: there is no prompt in it")
        prompts += found
    return tuple(prompts)


def check_nothing_is_chosen(selection: Selection) -> None:
    """With ``--plan`` the plan has chosen: only caps may be given, and are compared with its peaks.

    Raises:
        UsageError: a flag that chooses.
    """
    if replace(selection, max_vram_bytes=None, max_ram_bytes=None) != Selection():
        raise UsageError(
            "--plan carries out what the file says: leave out --prefer, --weight-format, --text-weight-format, "
            "--dtype, --placement, --step-cache, --vae-tile and --batch-size, or plan again with them"
        )


def refuse_references(references: list[Path] | None) -> None:
    if references:
        raise UsageError("--image: reference images are not in this version; leave the flag out")
