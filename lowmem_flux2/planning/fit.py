"""Fits a machine's constants to what runs of it took. Arithmetic over the cost model alone: no torch, no files.

A constant c with its assumed value c0 enters as t = log(c / c0). With r = log(predicted / measured) of each observation
(the load of a stage, its run, a denoising step), the fit minimises

    sum huber(r / NOISE) + sum (t / SPREAD)^2

by Gauss-Newton with Levenberg's damping and a numerical Jacobian of ``cost.stage_cost``, which may change without the
fit changing. Ratios, because a stage of 20 ms and one of 20 min must weigh alike. Huber's loss, because a run beside
other work is late, and once is no reason to believe it. The second term holds what the runs do not tell near its
assumed value: constants that only show together (compute and attention rate of one size of picture) move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import median

import numpy as np
import numpy.typing as npt

from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.hardware import Hardware, value_of, with_value
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Stage, StagePlan
from lowmem_flux2.planning.workload import Workload

NOISE = 0.1
"""Timings of one machine repeat within about 10 %."""
SPREAD = float(np.log(4))
"""An assumed constant may well be wrong by a factor of four."""
HUBER = 1.5
"""Residuals beyond so many NOISE count linearly."""
FURTHEST = float(np.log(1000))
"""No constant moves further than this from where it was."""
WEAKLY = SPREAD / 4
"""A constant with a larger standard deviation than this is told weakly, and its provenance says so."""
LEAST_MOVE = 0.01
"""What moves by less keeps its value and its source."""
UNTOLD = 4.0
"""A constant is not moved where the sum is no more than this larger for it: two standard deviations."""
SURELY = 10.0
"""Nor is that tried where it moved by more standard deviations than this."""
ROUNDS, CLOSE, DIFFERENCE = 60, 1e-3, 1e-3
STEADY_STEPS = 3
"""From so many steps on, one more takes as long as any other."""
FROM_ZERO_S = 0.05
"""Where a time starts that is assumed to be zero: a logarithm has no zero, and near it every slope is flat."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Observation:
    """One stage of one run.

    Args:
        load_s: None where it says nothing: the page cache had the weights.
        step_s: a denoising step in the steady state; None elsewhere, and where there were fewer than two.
        is_first: the first run of its process, which found the kernels cold.
    """

    stage: StagePlan
    model: ModelSpec
    workload: Workload
    load_s: float | None
    run_s: float
    step_s: float | None = None
    is_first: bool = True


DISK, LOAD = "disk_read_bytes_per_s", "load_bytes_per_s"
"""A profile has loading as a share of the disk's rate; runs tell the two rates apart from each other."""
OVERHEADS = ("block_overhead_s", "layer_overheads", "stage_setup_s", "first_pass_s")
"""What a run of a tiny model tells, and nothing else does."""
EVERYWHERE = (*OVERHEADS, "attention_flops_per_s", "convolution_share", DISK, LOAD)
ON_A_GPU = ("h2d_pinned_bytes_per_s", "h2d_pageable_bytes_per_s", "pin_bytes_per_s")


@dataclass(frozen=True, slots=True)
class Fitted:
    """One constant: assumed, fitted, and how well the runs tell it.

    ``uncertainty`` is the standard deviation of its logarithm: 0.1 is about 10 %; SPREAD where nothing was learnt.
    """

    name: str
    before: float
    after: float
    uncertainty: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The machine with fitted constants, and each of them that moved."""

    hardware: Hardware
    moved: tuple[Fitted, ...]


def constants_of(hardware: Hardware, observations: Sequence[Observation]) -> tuple[str, ...]:
    """All that the observations could tell: the compute classes that they ran in, and what every machine has."""
    rates = hardware.matmul_flops_per_s
    used = {one.stage.compute_dtype if one.stage.compute_dtype in rates else "fp32" for one in observations}
    names = [f"matmul_flops_per_s.{kind}" for kind in rates if kind in used]
    names += [*EVERYWHERE, *(ON_A_GPU if hardware.device == "cuda" else ("h2d_pageable_bytes_per_s",))]
    return tuple(names)


def fit(
    hardware: Hardware, observations: Sequence[Observation], source: str, names: Sequence[str] | None = None
) -> Fit:
    """Fit constants to observations.

    Args:
        hardware: where they start, and what they are held near.
        source: the provenance of what moves.
        names: constants that the observations were made to tell, as in provenance: each is taken from them. None for
            all that they could tell, moving as few as will do: one that they do not ask for keeps value and source.
    """
    constants = constants_of(hardware, observations) if names is None else tuple(names)
    problem = _Problem(hardware, observations, constants)
    assumed = np.array([value_of(hardware, name) for name in constants])
    everything = np.ones(len(constants), dtype=bool)
    if names is None:
        best = _fewest(problem, problem.solve(np.zeros(len(constants)), assumed > 0), everything)
    else:
        best = problem.solve(np.zeros(len(constants)), everything)
    found, rows = hardware, []
    values = problem.values(best.moved)
    for name, before, after, deviation, is_free in zip(
        constants, assumed, values, best.deviations, best.free, strict=True
    ):
        if names is not None or (is_free and abs(after - before) > LEAST_MOVE * before):
            weak = "; they tell it weakly" if deviation > WEAKLY else ""
            found = _with(found, name, after, f"{source}{weak}")
            rows.append(Fitted(name, float(before), after, float(deviation)))
    return Fit(found, tuple(rows))


def _fewest(problem: _Problem, best: _Solution, everything: npt.NDArray[np.bool_]) -> _Solution:
    """Free what is assumed to be zero only if the sum asks for it, and hold what it does not ask for."""
    if not best.free.all():
        more = problem.solve(best.moved, everything)
        best = more if more.loss < best.loss - UNTOLD else best
    moves = np.abs(best.moved) / best.deviations
    for index in np.argsort(moves):  # the least told first
        if best.free[index] and moves[index] < SURELY:
            fewer = problem.solve(best.moved, best.free & (np.arange(len(moves)) != index))
            best = fewer if fewer.loss <= best.loss + UNTOLD else best
    return best


@dataclass(frozen=True, slots=True)
class _Solution:
    """Where the sum is least: the logarithms by which the free constants moved, and their standard deviations."""

    moved: Array
    free: npt.NDArray[np.bool_]
    loss: float
    deviations: Array


@dataclass(frozen=True, slots=True)
class _Problem:
    """The sum to minimise, over those constants that are free; the others are as assumed."""

    hardware: Hardware
    observations: Sequence[Observation]
    constants: tuple[str, ...]

    def values(self, moved: Array) -> list[float]:
        starts = (value_of(self.hardware, name) or FROM_ZERO_S for name in self.constants)
        return [float(start * np.exp(by)) for start, by in zip(starts, moved, strict=True)]

    def residuals(self, moved: Array, free: npt.NDArray[np.bool_]) -> Array:
        made = self.hardware
        for name, value, is_free in zip(self.constants, self.values(moved), free, strict=True):
            made = _with(made, name, value, "") if is_free else made
        return _log_ratios(self.observations, made)

    def solve(self, start: Array, free: npt.NDArray[np.bool_]) -> _Solution:
        """Gauss-Newton steps with Levenberg's damping."""
        moved, damping = np.where(free, start, 0.0), 1e-3
        now = self.residuals(moved, free)
        loss = _loss(now, moved)
        normal, slope = self._equations(moved, free, now)
        for _ in range(ROUNDS):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
            proposed = np.clip(moved + step, -FURTHEST, FURTHEST)
            then = self.residuals(proposed, free)
            less = _loss(then, proposed)
            if less < loss:
                is_done = loss - less < CLOSE
                moved, now, loss, damping = proposed, then, less, damping / 4
                normal, slope = self._equations(moved, free, now)
                if is_done:
                    break
            elif damping > 1e6:  # no direction is better
                break
            else:
                damping *= 8
        return _Solution(moved, free, loss, np.sqrt(np.diag(np.linalg.inv(normal))))

    def _equations(self, moved: Array, free: npt.NDArray[np.bool_], now: Array) -> tuple[Array, Array]:
        """Normal matrix and slope of the sum at ``moved``; Huber's loss as weights of the squares."""
        jacobian = np.zeros((len(now), len(moved)))
        for index in np.flatnonzero(free):
            shifted = moved.copy()
            shifted[index] += DIFFERENCE
            jacobian[:, index] = (self.residuals(shifted, free) - now) / DIFFERENCE
        weights = np.minimum(1.0, HUBER * NOISE / np.maximum(np.abs(now), NOISE * 1e-6)) / NOISE**2
        normal = jacobian.T @ (weights[:, None] * jacobian) + np.eye(len(moved)) / SPREAD**2
        return normal, jacobian.T @ (weights * now) + moved / SPREAD**2


def _with(hardware: Hardware, name: str, value: float, source: str) -> Hardware:
    """The same with one constant replaced: of the rates of loading and of the disk, each without the other."""
    if name == LOAD:
        return with_value(hardware, "load_share", value / hardware.disk_read_bytes_per_s, source)
    if name == DISK:
        hardware = replace(hardware, load_share=hardware.load_bytes_per_s / value)
    return with_value(hardware, name, value, source)


def _loss(residuals: Array, moved: Array) -> float:
    size = np.abs(residuals) / NOISE
    hubers = np.where(size <= HUBER, size**2, 2 * HUBER * size - HUBER**2)
    return float(np.sum(hubers) + np.sum((moved / SPREAD) ** 2))


def _log_ratios(observations: Sequence[Observation], hardware: Hardware) -> Array:
    """log(predicted / measured) of every time that the observations have."""
    warm = replace(hardware, first_pass_s=0.0)
    found: list[float] = []
    known: dict[tuple[object, ...], tuple[float, float, float]] = {}
    for one in observations:
        key = (one.stage, one.model, one.workload, one.is_first, one.step_s is None)
        if key not in known:
            known[key] = _predicted(one, hardware if one.is_first else warm)
        measured = (one.load_s, one.run_s, one.step_s)
        found += [log(mine / its) for mine, its in zip(known[key], measured, strict=True) if its]
    return np.array(found)


def _predicted(one: Observation, hardware: Hardware) -> tuple[float, float, float]:
    """Seconds of the load, the run and one step: what one more step adds to a run that is under way."""
    cost = stage_cost(one.stage, one.model, one.workload, hardware)
    step_s = 0.0
    if one.step_s is not None:
        steps = max(one.workload.steps, STEADY_STEPS)
        runs = [
            stage_cost(one.stage, one.model, replace(one.workload, steps=count), hardware).run_s
            for count in (steps, steps + 1)
        ]
        step_s = (runs[1] - runs[0]) / -(-one.workload.num_images // one.stage.batch_size)
    return cost.load_s, cost.run_s, step_s


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Predicted / measured over the runs of one stage: the median, and the one furthest from 1."""

    median: float
    worst: float
    count: int


def accuracy(hardware: Hardware, observations: Sequence[Observation]) -> Mapping[Stage, Accuracy]:
    """How well a machine predicts the stages: loading and running together, or running where loading says nothing."""
    found: dict[Stage, list[float]] = {}
    for one in observations:
        load_s, run_s, _ = _predicted(one, hardware if one.is_first else replace(hardware, first_pass_s=0.0))
        ratio = (run_s + (load_s if one.load_s else 0)) / (one.run_s + (one.load_s or 0))
        found.setdefault(one.stage.stage, []).append(ratio)
    return {
        stage: Accuracy(median(ratios), max(ratios, key=lambda ratio: abs(log(ratio))), len(ratios))
        for stage, ratios in found.items()
    }
