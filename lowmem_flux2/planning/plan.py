"""The plan: which weights are where, in which format, and what that is predicted to cost. A plan is a file.

Nothing here decides anything: ``planner`` makes plans, ``cost`` prices them, the executor carries them out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.adapters import Adapter
from lowmem_flux2.planning.batches import batch_sizes
from lowmem_flux2.planning.formats import COMPUTE_DTYPES, FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import Component
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.planning.step_caches import parse_step_cache
from lowmem_flux2.planning.workload import Workload

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA_VERSION = 1

Stage = Literal["upsample", "encode", "reference", "denoise", "decode"]
EVERY_STAGE: tuple[Stage, ...] = get_args(Stage)
"""In the order of a run."""
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")
"""Of every request from prompts; see ``stages_of``."""
ONE_BY_ONE: tuple[Stage, ...] = ("reference", "decode")
"""Stages of the VAE, which takes one picture at a time, whole or in tiles, and has no blocks to be placed."""


class Placement(StrEnum):
    """Where a block's weights rest between uses. On ``device=cpu``, ``gpu`` means resident in working memory."""

    GPU = "gpu"
    PINNED = "pinned"
    PAGEABLE = "pageable"
    DISK = "disk"


COMPONENT_OF: dict[Stage, Component] = {
    "upsample": "text_encoder",
    "encode": "text_encoder",
    "reference": "vae",
    "denoise": "transformer",
    "decode": "vae",
}
WHOLE_TEXT_ENCODER = "whole_text_encoder"
"""What the prepared store calls all layers of it, as against those alone that encoding takes."""
NON_BLOCK_OF = {stage: Placement.DISK if stage == "encode" else Placement.GPU for stage in EVERY_STAGE}
"""Where the executor has each stage's weights outside blocks."""


def stages_of(workload: Workload) -> tuple[Stage, ...]:
    """What a run consists of: prompts are upsampled where that is asked for, reference images encoded where there are
    any."""
    left_out = {"upsample"} if workload.upsample_temperature is None else set()
    left_out |= set() if workload.references else {"reference"}
    return tuple(stage for stage in EVERY_STAGE if stage not in left_out)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one stage runs.

    Args:
        stage, component: upsample and encode/text_encoder, reference/vae, denoise/transformer, decode/vae.
        weight_format: stored format of the component's weights (a name in ``formats.FORMATS``).
        compute_dtype: of matmuls and activations.
        block_placements: one per block, in the order of use; empty for the VAE, which is always resident in its stage.
        non_block_placement: of the weights outside blocks (embedders, norms, projections).
        prefetch_depth: blocks whose copies may be under way while one computes.
        slots: device buffers for streamed blocks, each as large as the largest streamed block; 0 when none is streamed.
        chunk_tokens: tokens per chunk of feed-forward and attention output; 0 for none.
        tile_px: VAE tile side in pixels; 0 for untiled.
        step_cache: reuse between denoising steps, as ``step_caches`` writes it; "off" for none.
        batch_size: images that one denoising pass (or prompts that one encoder pass) takes together.
        cached_batches: of the encode stage's batches (``planning.batches``), those that the prompt cache holds.
    """

    stage: Stage
    component: Component
    weight_format: str
    compute_dtype: str
    block_placements: tuple[Placement, ...]
    non_block_placement: Placement
    prefetch_depth: int
    slots: int
    chunk_tokens: int
    tile_px: int
    step_cache: str
    batch_size: int
    cached_batches: int = 0
    cost: StageCost = field(default_factory=StageCost)
    reasons: tuple[str, ...] = ()

    @staticmethod
    def bare(stage: Stage, weight_format: str, compute_dtype: str) -> StagePlan:
        """A stage in these formats, one image or prompt at a time, with nothing placed yet."""
        return StagePlan(
            stage=stage,
            component=COMPONENT_OF[stage],
            weight_format=weight_format,
            compute_dtype=compute_dtype,
            block_placements=(),
            non_block_placement=NON_BLOCK_OF[stage],
            prefetch_depth=0,
            slots=0,
            chunk_tokens=0,
            tile_px=0,
            step_cache="off",
            batch_size=1,
        )

    def count(self, placement: Placement) -> int:
        return sum(1 for placed in self.block_placements if placed is placement)

    @property
    def prepared_as(self) -> str:
        """What the prepared store calls the blocks of this stage."""
        return WHOLE_TEXT_ENCODER if self.stage == "upsample" else self.component

    @property
    def streamed(self) -> int:
        return len(self.block_placements) - self.count(Placement.GPU)


_DECIDES = (
    "stage",
    "weight_format",
    "compute_dtype",
    "block_placements",
    "slots",
    "chunk_tokens",
    "tile_px",
    "step_cache",
    "batch_size",
)
"""Fields of a stage that its pixels and placement follow from; the others are derived, predicted or words."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets a plan was made for: caps of the whole process, after reserves; ``pinnable_bytes`` lies in RAM."""

    vram_bytes: int
    ram_bytes: int
    pinnable_bytes: int


@dataclass(frozen=True, slots=True)
class FormatChange:
    """A smaller weight format taken while running, as the user allowed: what has been computed was kept.

    Args:
        stage: encode or denoise.
        before, after: weight formats.
        partly: images under way at the change.
        wholly: images that were not begun yet.
        step: denoising steps that those under way had done.
    """

    stage: Stage
    before: str
    after: str
    partly: tuple[int, ...]
    wholly: tuple[int, ...]
    step: int = 0


@dataclass(frozen=True, slots=True)
class Preparation:
    """A component, or the ``WHOLE_TEXT_ENCODER``, to be quantized into the prepared store before the first run: bytes
    read and written, seconds."""

    component: str
    weight_format: str
    read_bytes: int
    write_bytes: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan for one workload on one machine; its peaks are the maxima over its stages.

    All stages are there, or decode alone, where latents come from a file. ``guidance_scale`` is the request's: it
    decides pixels, and no cost beyond ``workload.guidance_passes``. ``format_changes`` is filled while the plan is
    carried out. ``time_s`` is that of each run; what must be prepared before the first one, as far as is known, comes
    beside it.
    """

    schema_version: int
    profile: str
    model: str
    prefer: str
    workload: Workload
    guidance_scale: float
    hardware: Hardware
    limits: Limits
    stages: tuple[StagePlan, ...]
    not_executable: tuple[str, ...] = ()
    format_changes: tuple[FormatChange, ...] = ()
    preparations: tuple[Preparation, ...] = ()

    def stage(self, name: Stage) -> StagePlan:
        return next(stage for stage in self.stages if stage.stage == name)

    def weight_format_of(self, name: Stage, image: int) -> str:
        """What an image's stage was computed with, in words: the weight format, and each that it was changed to."""
        changes = [change for change in self.format_changes if change.stage == name]
        text = changes[0].before if changes else self.stage(name).weight_format
        for change in changes:
            if image in change.wholly:
                text = change.after
            elif image in change.partly:
                text += f", {change.after} from step {change.step + 1}" if change.step else f" and {change.after}"
        return text

    def is_cached(self, stage: StagePlan) -> bool:
        """Whether the prompt cache holds all that the stage would compute."""
        return 0 < stage.cached_batches >= len(batch_sizes(self.workload, stage.batch_size))

    @property
    def decodes_only(self) -> bool:
        """Whether it decodes latents that are done."""
        return len(self.stages) == 1

    @property
    def num_images_per_prompt(self) -> int:
        return self.workload.num_images // self.workload.num_prompts

    @property
    def peak_vram_bytes(self) -> int:
        return max(stage.cost.peak_vram_bytes for stage in self.stages)

    @property
    def peak_ram_bytes(self) -> int:
        return max(stage.cost.peak_ram_bytes for stage in self.stages)

    @property
    def time_s(self) -> float:
        return sum(stage.cost.time_s for stage in self.stages)

    @property
    def prepare_s(self) -> float:
        """Before the first run with these formats, and never again."""
        return sum(preparation.time_s for preparation in self.preparations)

    @property
    def fidelity_error(self) -> float:
        """Independent errors of the stages add in squares. Another wording of a prompt is no error of a picture."""
        errors = [stage.cost.fidelity_error for stage in self.stages if stage.stage != "upsample"]
        return float(sum(error**2 for error in errors) ** 0.5)

    @property
    def digest(self) -> str:
        """First 12 hex digits over what decides pixels and placement, on any machine; recorded in each PNG."""
        workload = asdict(self.workload)
        for adapter in workload["adapters"]:  # which file it is, not where
            del adapter["path"]
        decides = {
            "model": self.model,
            "workload": workload,
            "guidance_scale": self.guidance_scale,
            "stages": [{key: getattr(stage, key) for key in _DECIDES} for stage in self.stages],
        }
        canonical = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """The contract's plan JSON; ``Plan.from_json`` reads it back, whole."""
        plan = asdict(self)
        for raw, stage in zip(plan["stages"], self.stages, strict=True):
            counts = Counter(stage.block_placements)
            raw["placements"] = {placement.value: counts[placement] for placement in Placement}
            raw["block_placements"] = [placement.value for placement in stage.block_placements]
            raw["cost"]["peak_vram_bytes"] = stage.cost.peak_vram_bytes
            raw["cost"]["peak_ram_bytes"] = stage.cost.peak_ram_bytes
        plan["predicted"] = {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "time_s": self.time_s,
            "prepare_s": self.prepare_s,
            "fidelity_error": self.fidelity_error,
        }
        return plan

    @staticmethod
    def from_json(raw: Any, source: str) -> Plan:
        """Read back what ``to_json`` wrote.

        Raises:
            UsageError: not a plan of this schema; says which key.
        """
        from pydantic import ValidationError

        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list):
            raise UsageError(f"{source}: not a plan file (no 'stages'); write one with: lowmem-flux2 plan --json")
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                f"{source}: plan schema {raw.get('schema_version')}, this version reads {SCHEMA_VERSION}; plan again"
            )
        kept = {key: value for key, value in raw.items() if key not in _BESIDES}
        kept["stages"] = [_without_derived(stage) for stage in raw["stages"]]
        try:
            plan = _adapter().validate_python(kept)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"{source}: {where}: {first['msg']}") from None
        _check_names(plan, source)
        return plan


_BESIDES = ("predicted", "pareto", "rejected")
"""Keys of a plan's JSON that say more than what is to be carried out."""


def _check_names(plan: Plan, source: str) -> None:
    """What types cannot say: the workload's stages in order, or decode alone, in formats that exist."""
    needed = stages_of(plan.workload)
    if tuple(stage.stage for stage in plan.stages) not in (needed, ("decode",)):
        raise UsageError(f"{source}: stages: must be {', '.join(needed)}, in this order, or decode alone")
    for index, stage in enumerate(plan.stages):
        if stage.weight_format not in FORMATS:
            known = ", ".join(FORMATS)
            raise UsageError(f"{source}: stages.{index}.weight_format: {stage.weight_format!r} is none of {known}")
        if stage.compute_dtype not in COMPUTE_DTYPES:
            known = ", ".join(COMPUTE_DTYPES)
            raise UsageError(f"{source}: stages.{index}.compute_dtype: {stage.compute_dtype!r} is none of {known}")
        try:
            parse_step_cache(stage.step_cache)
        except UsageError as error:
            raise UsageError(f"{source}: stages.{index}.step_cache: {stage.step_cache!r}: {error}") from None


def _without_derived(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    kept = {key: value for key, value in stage.items() if key != "placements"}
    if isinstance(kept.get("cost"), dict):
        kept["cost"] = {k: v for k, v in kept["cost"].items() if not k.startswith("peak_")}
    return kept


_NOUNS: tuple[Any, ...] = (StageCost, StagePlan, Limits, FormatChange, Preparation, Plan, Workload, Adapter, Hardware)
for _noun in _NOUNS:
    _noun.__pydantic_config__ = {"extra": "forbid"}


@cache
def _adapter() -> TypeAdapter[Plan]:
    """Made when a plan is first read: making plans needs none of it, and has to start at once."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        UsageError: missing, not JSON, or not a plan of this schema.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such plan file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a readable plan file: {error}") from None
    return Plan.from_json(raw, str(path))
