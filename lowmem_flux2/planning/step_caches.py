"""Step caches: which denoising steps compute all blocks, and what the others reuse of earlier ones.

Two kinds, as text on the command line and in plan files:

    first-block:threshold=0.08,order=1,warmup=3,last=1
    taylor:interval=2,order=1,warmup=2,last=1

- ``first-block`` (First Block Cache of ParaAttention, after TeaCache, arXiv 2411.19108) computes each step's first
  block. Where what it adds has changed by less than ``threshold``, relative to the last step that computed all blocks,
  the others are left out, and what they add to the image's tokens is forecast from what they added in earlier steps.
- ``taylor`` (TaylorSeer, arXiv 2503.06923) computes every ``interval``-th step and forecasts the velocity of the
  others: such a step runs no block and moves no weights. TaylorSeer keeps derivatives of every module's output, 5.9 GiB
  on dev at 1024 px; forecasting only what leaves the transformer takes ``order`` + 1 tensors as large as the latents.

A forecast of order n is the polynomial of degree n, in the number of the step, through the last n + 1 computed steps:
order 0 repeats the last one, as First Block Cache does, order 1 goes on in a straight line. The first ``warmup`` steps
and the ``last`` ones are always computed. A threshold of 0 and an interval of 1 skip nothing: bit-equal to ``off``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.workload import MAX_STEPS, Preference, Workload

OFF, AUTO = "off", "auto"
MAX_ORDER = 2
MEASURED_MODEL, MEASURED_STEPS = "shapes", 20


@dataclass(frozen=True, slots=True)
class FirstBlock:
    """Skip all blocks but the first where that changed by less than ``threshold``, at most 1."""

    kind: ClassVar[str] = "first-block"
    threshold: float
    order: int = 1
    warmup: int = 3
    last: int = 1

    def __str__(self) -> str:
        return _text(self)

    def is_always_computed(self, step: int, steps: int) -> bool:
        return step < self.warmup or step >= steps - self.last

    def computed_steps(self, steps: int) -> int:
        """Assumed: the share of those that may be skipped that was skipped on `shapes` at a threshold not above it."""
        free = max(steps - self.warmup - self.last, 0)
        share = max((one for least, one in SKIPPED_SHARES if self.threshold >= least), default=0.0)
        return steps - int(free * share)

    def bytes_kept(self, model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
        """For each guidance pass and image: what the first block added, and the others in ``order`` + 1 steps.

        While a step's other blocks are computed, what entered them, with all other tokens, takes the oldest's place.
        """
        tokens = (self.order + 1) * workload.image_tokens + workload.sequence_tokens
        return workload.guidance_passes * batch * tokens * model.transformer.hidden_size * dtype_bytes


@dataclass(frozen=True, slots=True)
class Taylor:
    """Compute every ``interval``-th step and forecast the others' velocity."""

    kind: ClassVar[str] = "taylor"
    interval: int
    order: int = 1
    warmup: int = 2
    last: int = 1

    def __str__(self) -> str:
        return _text(self)

    def is_computed(self, step: int, steps: int) -> bool:
        """Whether the schedule has this step computed: warm-up, the last ones, and every ``interval``-th after it."""
        after = step - self.warmup
        return after < 0 or step >= steps - self.last or after % self.interval == self.interval - 1

    def computed_steps(self, steps: int) -> int:
        return sum(self.is_computed(step, steps) for step in range(steps))

    def bytes_kept(self, model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
        """``order`` + 1 velocities of each image and the references in a step, guidance passes joined."""
        tokens = workload.step_tokens - workload.text_tokens
        return (self.order + 1) * batch * tokens * model.transformer.in_channels * dtype_bytes


StepCache = FirstBlock | Taylor
KINDS: dict[str, type[FirstBlock] | type[Taylor]] = {FirstBlock.kind: FirstBlock, Taylor.kind: Taylor}

PRESETS: dict[str, StepCache] = {
    "fine": Taylor(interval=2, order=2, warmup=2),
    "fair": Taylor(interval=3, order=1, warmup=3),
    "coarse": Taylor(interval=4, order=1, warmup=3),
}
"""By name, from the most faithful to the fastest."""

GRAMMAR = (
    f"off, auto, a preset ({', '.join(PRESETS)}), 'first-block:threshold=0.08' or 'taylor:interval=2', "
    "with order=0..2, warmup=STEPS and last=STEPS after commas"
)


class StepsTaken(NamedTuple):
    """Of one batch: steps that compute all blocks, the others, how many blocks each of those computes, bytes kept."""

    computed: int
    skipped: int
    first_blocks: int
    kept_bytes: int


class Measured(NamedTuple):
    """A step cache on `shapes` at 20 steps: worst relative error of the latents, worst PSNR of the pictures."""

    latents_error: float
    psnr_db: float


SKIPPED_SHARES = ((0.1, 1 / 16), (0.2, 8 / 16), (0.3, 11 / 16))
"""(threshold, share of the steps that may be skipped that ``first-block`` skips at least) on `shapes`, 20 steps."""
MEASURED: dict[StepCache, Measured] = {
    Taylor(interval=2, order=2, warmup=2): Measured(0.0070, 56.8),
    Taylor(interval=3, order=1, warmup=3): Measured(0.0145, 47.8),
    Taylor(interval=4, order=1, warmup=3): Measured(0.0315, 41.6),
    Taylor(interval=6, order=1, warmup=3): Measured(0.0861, 35.8),
    FirstBlock(threshold=0.1): Measured(0.0023, 64.6),
    FirstBlock(threshold=0.2): Measured(0.0116, 50.4),
    FirstBlock(threshold=0.3): Measured(0.0144, 47.0),
    FirstBlock(threshold=0.2, order=0): Measured(0.0308, 40.3),
}
PROVENANCE = (
    "step cache: worst error of latents on shapes in 20 steps, 64 pictures: benchmarks/results/fidelity-shapes.json"
)


def parse_step_cache(text: str) -> StepCache | None:
    """The step cache that a text names, None for ``off``. ``str`` of it is the text in full, as plans record it.

    Raises:
        UsageError: not of the grammar, or a value out of range; says what to write.
    """
    if text == OFF:
        return None
    if text in PRESETS:
        return PRESETS[text]
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"unknown: write {GRAMMAR}")
    names = [field.name for field in fields(KINDS[kind])]
    given: dict[str, str] = {}
    for place, part in enumerate(rest.split(",") if rest else ()):
        name, equals, value = part.partition("=")
        if not equals and place == 0:
            name, value = names[0], part  # its first value needs no name
        if name not in names:
            raise UsageError(f"{kind} has no {name!r}: one of {', '.join(names)}, each as NAME=VALUE")
        if name in given:
            raise UsageError(f"{name} is given twice")
        given[name] = value
    if names[0] not in given:
        raise UsageError(f"{kind} needs its {names[0]}: '{kind}:{names[0]}={'0.08' if kind == FirstBlock.kind else 2}'")
    threshold = given.pop("threshold", None)
    counts = {name: _count(name, value) for name, value in given.items()}
    if threshold is None:
        return Taylor(**counts)
    return FirstBlock(threshold=_threshold(threshold), **counts)


def steps_taken(text: str, model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> StepsTaken:
    """What a batch's steps come to under a step cache, ``off`` among them; ``first-block``'s are assumed."""
    cache, steps = parse_step_cache(text), workload.steps
    if cache is None:
        return StepsTaken(steps, 0, 0, 0)
    computed = cache.computed_steps(steps)
    kept = cache.bytes_kept(model, workload, batch, dtype_bytes)
    return StepsTaken(computed, steps - computed, int(isinstance(cache, FirstBlock)), kept)


def computed_blocks(text: str, steps: int, blocks: int, skipped: Sequence[Sequence[int]]) -> int:
    """Of a run's batches, that skipped these steps each; a block counts once for all guidance passes."""
    first_blocks = int(isinstance(parse_step_cache(text), FirstBlock))
    return sum(blocks * (steps - len(batch)) + first_blocks * len(batch) for batch in skipped)


def step_cache_text(text: str) -> str:
    """The text in full of what a text names; ``auto`` and ``off`` stay what they are.

    Raises:
        UsageError: as ``parse_step_cache``.
    """
    return text if text in (AUTO, OFF) else str(parse_step_cache(text))


_RANGES = {"interval": (1, MAX_STEPS), "order": (0, MAX_ORDER), "warmup": (1, MAX_STEPS), "last": (1, MAX_STEPS)}


def _count(name: str, text: str) -> int:
    least, most = _RANGES[name]
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise UsageError(f"{name}={text}: a whole number from {least} to {most}")
    return int(text)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # NaN is not
        raise UsageError(f"threshold={text}: a number from 0 (skips nothing) to 1")
    return value


def _text(cache: StepCache) -> str:
    values = (f"{field.name}={getattr(cache, field.name)}" for field in fields(cache))
    return f"{cache.kind}:{','.join(values)}"


def fidelity_of_cache(cache: StepCache | None, steps: int) -> tuple[float, str]:
    """Expected relative error of the latents, and where it is from; 0 where no step is skipped.

    A cache that was not measured counts as the next coarser one of its kind that was.
    """
    if cache is None or cache.computed_steps(steps) == steps:
        return 0.0, ""
    if cache in MEASURED:
        return MEASURED[cache].latents_error, PROVENANCE
    alike = [one for one in MEASURED if one.kind == cache.kind]
    computed = cache.computed_steps(MEASURED_STEPS)
    coarser = [one for one in alike if one.computed_steps(MEASURED_STEPS) <= computed]
    nearest = max(coarser or alike, key=lambda one: one.computed_steps(MEASURED_STEPS) if coarser else -computed)
    return MEASURED[nearest].latents_error, f"step cache not measured: {'as' if coarser else 'more than'} {nearest}"


LEAST_STEPS = 8
"""A run of fewer steps has none to spare: each makes its own part of the picture."""


def automatic(model: ModelSpec, workload: Workload, prefer: Preference) -> tuple[tuple[StepCache, ...], str]:
    """What ``auto`` may take besides ``off``, the most faithful first, and why not others."""
    if model.is_distilled or workload.steps < LEAST_STEPS:
        kind = "a distilled model's steps" if model.is_distilled else f"a run of {workload.steps} steps"
        return (), f"{kind} are too few to skip any"
    if prefer == "quality":
        return (), "it changes pixels, prefer quality"
    if prefer == "memory":
        return (), "what it keeps takes memory, prefer memory"
    if prefer == "balanced":
        return (), "it changes pixels, prefer balanced"
    if model.name != MEASURED_MODEL:
        return (), f"none is measured on {model.name}; --step-cache fair asks for one"
    return tuple(PRESETS.values()), ""
