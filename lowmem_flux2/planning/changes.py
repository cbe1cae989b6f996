"""A job that could be planned instead of another, and the command line that plans it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import Any

from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import OUT_LAYERS, ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.references import reduced
from lowmem_flux2.planning.selection import Selection, with_ram_for
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.support import Support
from lowmem_flux2.planning.workload import Workload, guidance_passes, token_counts
from lowmem_flux2.units import GIB, MIB

DETECTED = "auto"


@dataclass(frozen=True, slots=True)
class Change:
    """A job with something done differently.

    ``words`` name the model on a command line; left empty, ``-m`` and its source. ``given`` are the references before
    ``bound_px`` made them smaller.
    """

    model: ModelSpec
    workload: Workload
    hardware: Hardware
    selection: Selection
    words: tuple[str, ...] = ()
    given: tuple[tuple[int, int], ...] = ()
    bound_px: int = 0

    def smaller(self, side: int) -> Change:
        """The picture in its own shape, of at most so many pixels squared."""
        work, multiple = self.workload, self.model.size_multiple
        scale = side / sqrt(work.width * work.height)
        width, height = (max(int(length * scale) // multiple, 1) for length in (work.width, work.height))
        smaller = replace(work, width=width * multiple, height=height * multiple, image_tokens=width * height)
        return replace(self, workload=smaller)

    def with_small_references(self, bound_px: int) -> Change:
        """Reference images of at most so many pixels squared; the picture's own size is kept."""
        multiple, given = self.model.size_multiple, self.given or self.workload.references
        sizes = tuple(reduced(*size, multiple, bound_px) for size in given)
        workload = replace(self.workload, references=sizes, reference_tokens=sum(token_counts(sizes, multiple)))
        return replace(self, workload=workload, given=given, bound_px=bound_px)

    def with_ram(self, size_bytes: int) -> Change:
        hardware = with_ram_for(self.hardware, size_bytes)
        return replace(self, hardware=hardware, selection=replace(self.selection, max_ram_bytes=size_bytes))

    def with_choice(self, name: str, value: Any) -> Change:
        """Another value of one of the selection's fields."""
        return replace(self, selection=replace(self.selection, **{name: value}))

    def with_one_image(self) -> Change:
        return replace(self, workload=replace(self.workload, num_prompts=1, num_images=1))

    def with_short_text(self) -> Change:
        """No more text tokens than the model's default."""
        tokens = min(self.workload.text_tokens, self.model.defaults.max_sequence_length)
        return replace(self, workload=replace(self.workload, text_tokens=tokens))

    def with_model(self, name: str) -> Change:
        """Another model at its own defaults, the size kept."""
        model = spec_from_configs(name, name, shipped_configs(name))
        defaults = model.defaults
        workload = replace(
            self.workload,
            steps=defaults.num_inference_steps,
            text_tokens=defaults.max_sequence_length,
            guidance_passes=guidance_passes(model, defaults.guidance_scale),
            adapters=(),
            caches_references=model.caches_references and bool(self.workload.references),
            upsample_temperature=self.workload.upsample_temperature if model.form == "dev" else None,
        )
        return replace(self, model=model, workload=workload, words=())

    def kind(self, asked: Change) -> tuple[int, frozenset[str]]:
        """The model's size, and what is another than ``asked``, whatever its value."""
        pairs = ((self.workload, asked.workload), (self.selection, asked.selection))
        different = {
            field.name
            for mine, its in pairs
            for field in fields(mine)
            if getattr(mine, field.name) != getattr(its, field.name)
        }
        passes = {"steps", "guidance_passes"} if self.model.name != asked.model.name else set()
        return self.model.transformer.total_weights, frozenset(different - passes)

    def command(self, profile: str) -> str:
        """What plans just this on the command line; prompts apart, as only their number matters."""
        work, defaults, selection = self.workload, self.model.defaults, self.selection
        width, height = work.references[0] if work.references else (defaults.width, defaults.height)
        words = ["lowmem-flux2", "plan", *(self.words or ("-m", self.model.source)), "--profile", profile]
        if self.hardware.device == "cpu" and profile == DETECTED:
            words += ["--device", "cpu"]
        for flag, value, default in (
            ("-W", work.width, width),
            ("-H", work.height, height),
            ("--steps", work.steps, defaults.num_inference_steps),
            ("--num-images", work.num_images, 1),
            ("--max-sequence-length", work.text_tokens, defaults.max_sequence_length),
            ("--prefer", selection.prefer, "balanced"),
            ("--dtype", selection.dtype, "auto"),
            ("--weight-format", selection.weight_format, "auto"),
            ("--text-weight-format", selection.text_weight_format, "auto"),
            ("--placement", selection.placement, "auto"),
            ("--vae-tile", selection.vae_tile, "auto"),
            ("--step-cache", selection.step_cache, "auto"),
            ("--batch-size", selection.batch_size, 0),
        ):
            if value != default:
                words += [flag, str(value)]
        for reference in self.given or work.references:
            words += ["--image", "{}x{}".format(*reference)]
        if self.bound_px:
            words += ["--image-size", str(self.bound_px)]
        if work.guidance_passes != guidance_passes(self.model, defaults.guidance_scale):
            words += ["--guidance", "1" if work.guidance_passes == 1 else "4"]
        text = self.model.text_encoder
        if text.out_layers != OUT_LAYERS[text.architecture]:
            words += ["--text-encoder-out-layers", ",".join(map(str, text.out_layers))]
        if work.upsample_temperature is not None:
            words += ["--caption-upsample", f"{work.upsample_temperature!r}"]
        for adapter in work.adapters:
            words += ["--lora", f"{adapter.path}:{adapter.scale!r}"]
        for flag, cap in (("--max-vram", selection.max_vram_bytes), ("--max-ram", selection.max_ram_bytes)):
            if cap is not None:
                words += [flag, f"{cap // GIB}GiB" if cap % GIB == 0 else f"{cap // MIB}MiB"]
        return shlex.join(words)

    def plan(self, profile: str, support: Support) -> Plan:
        """Without reasons. Raises what ``make_plan`` does."""
        return make_plan(
            self.model,
            self.workload,
            self.hardware,
            self.selection,
            profile=profile,
            support=support,
            with_reasons=False,
        )
