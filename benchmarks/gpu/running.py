"""One plan of ours, made and carried out as ``generate`` does it, with made-up weights and meters."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gpu.generated import GeneratedWeights, Pieces, block_sources
from gpu.meter import Meters
from gpu.record import RAN, read_cases, record_path
from gpu.subjects import Subject, subject
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.job import Machine, plan_job, resolve_machine
from lowmem_flux2.planning.ladder import Resource, next_rung
from lowmem_flux2.planning.plan import Placement, Plan, Stage, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.workload import Request, make_request
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.executor import Executor, Outcome
from lowmem_flux2.runtime.inputs import Inputs, Wanted
from lowmem_flux2.runtime.layout import BlockSource

PROMPT = "a lighthouse at dusk, waves breaking on the rocks below"
SEED = 0
TINY_PIECE_WEIGHTS = 1 << 12


@dataclass(frozen=True)
class Bench:
    """What every case needs.

    Args:
        device: ``cuda``, ``cuda:1`` or ``cpu``.
        profile: ``auto``, a profile's name or a TOML file, as ``--profile``.
        scratch: for configs, and for the disk tier's weights.
        out: where the records are; a part may look at an earlier case.
    """

    device: str
    tiny: bool
    profile: str
    scratch: Path
    out: Path

    @cached_property
    def machine(self) -> Machine:
        return resolve_machine(self.profile, self.device)

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(SEED, TINY_PIECE_WEIGHTS) if self.tiny else Pieces(SEED)

    @property
    def side_px(self) -> int:
        return 256 if self.tiny else 1024

    @property
    def text_tokens(self) -> int:
        return 64 if self.tiny else 512

    def subject(self, name: str, blocks: tuple[int, int] | None = None) -> Subject:
        return subject(name, self.scratch, tiny=self.tiny, blocks=blocks)

    def request(self, model: Subject, steps: int) -> Request:
        return make_request(
            model.source.spec,
            (PROMPT,),
            width=self.side_px,
            height=self.side_px,
            num_inference_steps=steps,
            max_sequence_length=self.text_tokens,
        )

    def plan(self, model: Subject, request: Request, **selected: Any) -> Plan:
        """The plan that ``generate`` would make here for a ``Selection``.

        Raises:
            DoesNotFit: as the planner says it.
        """
        return plan_job(model.source, self.machine, request, Selection(**selected), running=True)

    def embeds(self, model: Subject, plan: Plan) -> torch.Tensor:
        """Seeded stand-ins for a prompt's embeddings (1, tokens, joint_dim), where encoding is not what is measured."""
        width = model.source.spec.text_encoder.joint_dim
        noise = torch.randn(1, self.text_tokens, width, generator=torch.Generator().manual_seed(SEED))
        return noise.to(DTYPES[plan.stage("denoise").compute_dtype])


def with_placements(plan: Plan, model: Subject, name: Stage, placements: Sequence[Placement], slots: int) -> Plan:
    """The same plan with one stage's blocks placed otherwise, and priced anew."""
    depth = max(slots - 1, 0)
    changed = replace(plan.stage(name), block_placements=tuple(placements), slots=slots, prefetch_depth=depth)
    changed = replace(changed, cost=stage_cost(changed, model.source.spec, plan.workload, plan.hardware))
    return with_stage(plan, changed)


def with_stage(plan: Plan, changed: StagePlan) -> Plan:
    return replace(plan, stages=tuple(changed if stage.stage == changed.stage else stage for stage in plan.stages))


@dataclass(slots=True)
class Watch:
    """The executor's observer: notes when what happened."""

    started: dict[str, float] = field(default_factory=dict)
    advances: dict[str, list[float]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    _stage: str = ""

    def stage_started(self, stage: str, total: int) -> None:
        self._stage = stage
        self.started[stage] = time.perf_counter()
        self.advances[stage] = []

    def advanced(self) -> None:
        self.advances[self._stage].append(time.perf_counter())

    def stage_finished(self, stage: str) -> None:
        return

    def event(self, text: str) -> None:
        self.events.append(text)


@dataclass(frozen=True, slots=True)
class Run:
    """A plan carried out: its result, and its figures for the record."""

    outcome: Outcome
    plan: Plan
    figures: dict[str, Any]

    @property
    def latents(self) -> torch.Tensor:
        assert self.outcome.packed_latents is not None
        return self.outcome.packed_latents

    @property
    def step_s(self) -> float:
        step: float = self.figures["step_median_s"]
        return step


def carry_out(
    bench: Bench,
    model: Subject,
    plan: Plan,
    request: Request,
    *,
    embeds: torch.Tensor | None = None,
    result: Wanted = "packed_latents",
    watch: Watch | None = None,
    on_blocks: Callable[[StagePlan, Blocks], None] = lambda stage, blocks: None,
    make_sources: Callable[[StagePlan, Blocks, Pieces], list[BlockSource]] = block_sources,
) -> Run:
    """Run a plan through the executor, the recovery ladder included; ``embeds`` skip the encode stage."""
    if plan.not_executable:
        raise RuntimeError("this plan cannot be carried out here: " + "; ".join(plan.not_executable))
    watch, meters = watch or Watch(), Meters()
    weights = GeneratedWeights(model.source.spec, bench.pieces, meters, make_sources, on_blocks)

    def replan(current: Plan, stage: Stage, resource: Resource) -> Plan | None:
        return next_rung(current, stage, model.source.spec, resource=resource)

    executor = Executor(plan, model.source.spec, model.folder, bench.device, watch, weights, replan)
    generators = [torch.Generator().manual_seed(SEED)]
    outcome = executor.run(request, Inputs(generators=generators, prompt_embeds=embeds, result=result))
    return Run(outcome, executor.plan, _figures(bench, executor.plan, outcome, watch, meters, request))


def _figures(
    bench: Bench, plan: Plan, outcome: Outcome, watch: Watch, meters: Meters, request: Request
) -> dict[str, Any]:
    stages = []
    for measured in outcome.measures:
        name: Any = measured.stage
        planned, transfers = plan.stage(name), meters.transfers(measured.stage)
        stages.append(
            {
                "stage": name,
                "weight_format": planned.weight_format,
                "placements": {place.value: planned.count(place) for place in Placement if planned.count(place)},
                "slots": planned.slots,
                "chunk_tokens": planned.chunk_tokens,
                "tile_px": planned.tile_px,
                "predicted": asdict(planned.cost)
                | {
                    "peak_vram_bytes": planned.cost.peak_vram_bytes,
                    "peak_ram_bytes": planned.cost.peak_ram_bytes,
                },
                "measured": asdict(measured),
                "transfers": transfers and asdict(transfers) | {"bytes_per_s": transfers.bytes_per_s},
            }
        )
    steps = _step_seconds(outcome, watch)
    cost = plan.stage("denoise").cost
    return {
        "steps": request.num_inference_steps,
        "step_s": steps,
        "step_median_s": statistics.median(steps[1:] or steps),
        "planned_steps": plan.workload.steps,
        "predicted_step_s": cost.run_s / cost.rounds,
        "predicted_step_waiting_s": cost.waiting_s / cost.rounds,
        "peak_vram_bytes": max(measured.peak_vram_bytes for measured in outcome.measures),
        "predicted_peak_vram_bytes": max(plan.stage(stage["stage"]).cost.peak_vram_bytes for stage in stages),
        "stages": stages,
        "generator_bytes": bench.pieces.total_bytes,
        "events": list(watch.events),
        "latents": digest(outcome.packed_latents),
    }


def _step_seconds(outcome: Outcome, watch: Watch) -> list[float]:
    """Each denoising step; the first begins when loading ends. One that was tried twice counts from its first try."""
    load_s = next(measured.load_s for measured in outcome.measures if measured.stage == "denoise")
    moments = [watch.started["denoise"] + load_s, *watch.advances["denoise"]]
    return [after - before for before, after in pairwise(moments)]


def digest(tensor: torch.Tensor | None) -> str | None:
    """First 16 hex digits over a tensor's bytes: equal where the tensors are, bit for bit."""
    if tensor is None:
        return None
    raw = tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(raw).hexdigest()[:16]


def case_on_record(bench: Bench, part: str, name: str) -> dict[str, Any] | None:
    """The result of a case that ran, of this call or an earlier one; None without one."""
    kept = read_cases(record_path(bench.out, bench.machine.hardware.name, part))
    return next((case for case in kept if case["case"] == name and case["status"] == RAN), None)
