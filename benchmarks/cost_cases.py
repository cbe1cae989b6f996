"""Cases in which the closed forms of memory are compared with the simulator: one request, planned one way, each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from lowmem_flux2.planning.candidates import CHUNK_TOKENS
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.hardware import load_profile
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import COMPONENT_OF, ONE_BY_ONE, Placement, Stage, StagePlan, stages_of
from lowmem_flux2.planning.sources import ModelSource, resolve_model
from lowmem_flux2.planning.tiles import TILE_SIDES_PX
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.simulating import Comparison, compare_stage

MODELS = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "flux2-klein-base-4b", "flux2-klein-base-9b")
FORMATS = ("plain", "int8", "int6", "nf4", "w8a8")
"""int4 expands as int6 does, fp8 as int8."""
SLOW_MODELS, SLOW_FORMATS = ("flux2-klein-9b-kv",), ("nf4-mixed",)
"""No two of their blocks stand for each other, so all are simulated: in one of ``SLOW_ONE_IN`` random cases."""
SLOW_ONE_IN = 16
PLACEMENTS = ("resident", "pinned", "disk", "mixed")
CHUNKS = CHUNK_TOKENS
TILES = (0, *TILE_SIDES_PX)
MIXED = (Placement.GPU, Placement.PINNED, Placement.PAGEABLE, Placement.DISK, Placement.GPU)


@dataclass(frozen=True, slots=True)
class Case:
    """A request and how it is planned.

    Args:
        batches: batches of ``batch`` images; a prompt each.
        references: tokens of all reference images of a picture; each is of 512 px, as far as they are whole ones.
        weight_format: of the blocks; ``plain`` is the compute dtype.
        is_cut: the text encoder's last tapped state is not its last, so its final norm is not needed.
    """

    model: str
    size: tuple[int, int]
    batch: int
    batches: int
    references: int
    text: int
    steps: int
    weight_format: str
    dtype: str
    chunk: int
    tile: int
    placement: str
    slots: int
    is_cut: bool
    device: str

    @property
    def workload(self) -> Workload:
        width, height = self.size
        return Workload(
            width=width,
            height=height,
            image_tokens=(width // 16) * (height // 16),
            text_tokens=self.text,
            reference_tokens=self.references,
            steps=self.steps,
            num_prompts=self.batch * self.batches,
            num_images=self.batch * self.batches,
            guidance_passes=2 if "base" in self.model else 1,
            references=((512, 512),) * (self.references // 1024),
            caches_references=self.model.endswith("-kv") and self.references > 0,
        )


def compare_case(case: Case) -> Iterator[Comparison]:
    """Each stage, predicted and simulated."""
    source = _source(case.model)
    hardware = load_profile("cpu" if case.device == "cpu" else "rtx-3090-24gb")
    model = source.spec if case.is_cut else _uncut(source.spec)
    for name in stages_of(case.workload):
        bare = _stage(case, name, model)
        stage = replace(bare, cost=stage_cost(bare, model, case.workload, hardware))
        yield compare_stage(stage, case.workload, model, source.configs, on_host=case.device == "cpu")


@cache
def _source(name: str) -> ModelSource:
    return resolve_model(name, offline=True)


def _uncut(model: ModelSpec) -> ModelSpec:
    """Saved with no more layers than are used, as some repositories do."""
    return replace(model, text_encoder=replace(model.text_encoder, num_layers=model.text_encoder.layers_used))


def _stage(case: Case, name: Stage, model: ModelSpec) -> StagePlan:
    blocks = {"encode": model.text_encoder.layers_used, "denoise": len(model.transformer.blocks)}.get(name, 0)
    placements = {
        "resident": (Placement.GPU,) * blocks,
        "pinned": (Placement.PINNED,) * blocks,
        "disk": (Placement.DISK,) * blocks,
        "mixed": tuple(MIXED[index % len(MIXED)] for index in range(blocks)),
    }[case.placement]
    is_streamed = any(placement is not Placement.GPU for placement in placements)
    plain = case.weight_format == "plain" or name in ONE_BY_ONE
    return StagePlan(
        stage=name,
        component=COMPONENT_OF[name],
        weight_format=case.dtype if plain else case.weight_format,
        compute_dtype=case.dtype,
        block_placements=placements,
        non_block_placement=Placement.DISK if name == "encode" else Placement.GPU,
        prefetch_depth=case.slots - 1 if is_streamed else 0,
        slots=case.slots if is_streamed else 0,
        chunk_tokens=case.chunk if name == "denoise" else 0,
        tile_px=case.tile if name in ONE_BY_ONE and case.tile < (512 if name == "reference" else max(case.size)) else 0,
        step_cache="off",
        batch_size=1 if name in ONE_BY_ONE else case.batch,
    )


def random_cases(count: int, seed: int) -> list[Case]:
    """Drawn over all that plans may ask for, sizes and lengths evenly; nothing was fitted to any of them."""
    rng = random.Random(seed)
    return [
        Case(
            model=rng.choice(SLOW_MODELS if rng.randrange(SLOW_ONE_IN) == 0 else MODELS),
            size=(16 * rng.randint(32, 128), 16 * rng.randint(32, 128)),
            batch=rng.randint(1, 4),
            batches=rng.randint(1, 3),
            references=rng.randint(0, 4) * rng.choice((256, 1024, 2304, 4096)),
            text=rng.choice((16, 77, 128, 256, 512, rng.randint(16, 2048), 2048)),
            steps=rng.choice((2, 4, 8, 28)),
            weight_format=rng.choice(SLOW_FORMATS if rng.randrange(SLOW_ONE_IN) == 0 else FORMATS),
            dtype=rng.choice(("bf16", "bf16", "fp32")),
            chunk=rng.choice(CHUNKS),
            tile=rng.choice(TILES),
            placement=rng.choice(PLACEMENTS),
            slots=rng.randint(1, 4),
            is_cut=rng.random() < 0.8,
            device=rng.choice(("cuda", "cuda", "cuda", "cpu")),
        )
        for _ in range(count)
    ]
