"""Step caches at work: what they skip, that nothing else changes, and that placement and recovery do not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.errors import Interrupted, NonFiniteLatents
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.planning.step_caches import FirstBlock, Taylor
from lowmem_flux2.report import StageMeasure
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.step_cache import History, Residuals
from lowmem_flux2.runtime.streaming import BlockStreamer

STEPS, BLOCKS = 8, 5
GPU, PAGEABLE, DISK = Placement.GPU, Placement.PAGEABLE, Placement.DISK
PROMPTS = ["a red circle", "a blue dog"]
TAYLOR = "taylor:interval=3,order=1,warmup=2,last=1"  # computes 0, 1, 4 and 7
FIRST_BLOCK = "first-block:threshold=1.0,order=1,warmup=2,last=1"
CACHES = [TAYLOR, FIRST_BLOCK]
SIZE: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,  # two guidance passes
    "height": 64,
    "width": 64,
    "max_sequence_length": 64,
}
SIGMAS = [0.9, 0.89, 0.88, 0.87, 0.6, 0.59, 0.58, 0.1]
"""Some near each other: what random weights compute changes a lot from one step to the next."""


def run(
    folder: Path, step_cache: str, *, placements: Sequence[Placement] = (), batch_size: int = 2, **hooks: Any
) -> Generation:
    options: dict[str, Any] = {"dtype": "fp32", "placement": "resident", "batch_size": batch_size}
    with Engine(str(folder), step_cache=step_cache, **options) as engine:
        plan = engine.plan(engine.request(PROMPTS, **SIZE))
        if placements:
            denoise = replace(plan.stage("denoise"), block_placements=tuple(placements), slots=2, prefetch_depth=1)
            plan = replace(plan, stages=(plan.stage("encode"), denoise, plan.stage("decode")))
        asked = {**SIZE, **hooks, "sigmas": SIGMAS, "seed": 5, "output_type": "pt"}
        return engine.generate(PROMPTS, plan=plan, **asked)


def measured(result: Generation) -> StageMeasure:
    return next(stage for stage in result.report.stages if stage.stage == "denoise")


@pytest.fixture(scope="module")
def unbroken(tiny_klein: Path) -> dict[str, Generation]:
    return {name: run(tiny_klein, name) for name in ("off", *CACHES)}


def test_reports_say_what_was_skipped(unbroken: dict[str, Generation]) -> None:
    assert (measured(unbroken["off"]).skipped_steps, measured(unbroken["off"]).computed_blocks) == (((),), 8 * BLOCKS)
    assert measured(unbroken[TAYLOR]).skipped_steps == ((2, 3, 5, 6),)
    assert measured(unbroken[TAYLOR]).computed_blocks == 4 * BLOCKS
    (skipped,) = measured(unbroken[FIRST_BLOCK]).skipped_steps
    assert 1 <= len(skipped) < 5 and set(skipped) <= {2, 3, 4, 5, 6}  # some of those that may be
    assert measured(unbroken[FIRST_BLOCK]).computed_blocks == (8 - len(skipped)) * BLOCKS + len(skipped)
    pictures = [result.images for result in unbroken.values()]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    assert len({result.report.plan.digest for result in unbroken.values()}) == 3


@pytest.mark.parametrize("step_cache", ["taylor:interval=1", "first-block:threshold=0"])
def test_what_skips_nothing_changes_no_bit(step_cache: str, tiny_klein: Path, unbroken: dict[str, Generation]) -> None:
    assert torch.equal(run(tiny_klein, step_cache).images, unbroken["off"].images)


@pytest.mark.parametrize("placements", [[PAGEABLE] * BLOCKS, [DISK] * BLOCKS, [GPU, DISK, DISK, GPU, PAGEABLE]])
@pytest.mark.parametrize("step_cache", CACHES)
def test_streamed_equals_resident_and_a_skipped_step_moves_nothing(
    step_cache: str,
    placements: list[Placement],
    tiny_klein: Path,
    unbroken: dict[str, Generation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brought: dict[BlockStreamer, list[int]] = {}
    bring = BlockStreamer._bring

    def watched(self: BlockStreamer, index: int, slot: Any) -> None:
        brought.setdefault(self, []).append(index)
        bring(self, index, slot)

    monkeypatch.setattr(BlockStreamer, "_bring", watched)
    result = run(tiny_klein, step_cache, placements=placements)
    assert torch.equal(result.images, unbroken[step_cache].images)
    assert measured(result).skipped_steps == measured(unbroken[step_cache]).skipped_steps
    computed = STEPS - len(measured(result).skipped_steps[0])
    streamed = [index for index, placed in enumerate(placements) if placed is not GPU]
    assert list(brought.values())[-1] == computed * streamed


def out_of_memory_at(call: int, method: Callable[..., Any], after: bool) -> Callable[..., Any]:
    """The method, whose n-th call fails before or after its work."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        number, calls = calls, calls + 1
        if number == call and not after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More details")
        result = method(*args, **kwargs)
        if number == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More details")
        return result

    return failing


@pytest.mark.parametrize("step_cache", CACHES)
@pytest.mark.parametrize(("method", "call"), [("predict", 2), ("predict", 3), ("_double", 12), ("_single", 15)])
def test_out_of_memory_in_the_middle_goes_on_with_what_was_kept(
    method: str,
    call: int,
    step_cache: str,
    tiny_klein: Path,
    unbroken: dict[str, Generation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = out_of_memory_at(call, getattr(Forward, method), after=method == "predict")
    monkeypatch.setattr(Forward, method, failing)
    result = run(tiny_klein, step_cache)
    assert any("out of memory" in event for event in result.report.events)
    assert torch.equal(result.images, unbroken[step_cache].images)
    assert measured(result).skipped_steps == measured(unbroken[step_cache]).skipped_steps


@pytest.mark.parametrize("step_cache", CACHES)
def test_an_interrupted_run_goes_on_with_what_was_kept(
    step_cache: str, tiny_klein: Path, tmp_path: Path, unbroken: dict[str, Generation]
) -> None:
    for stop in (2, 3, 5):
        interruption = Interruption()

        def ask(_: object, step: int, *__: object, stop: int = stop, asked: Interruption = interruption) -> None:
            if step + 1 == stop:
                asked.ask()

        with pytest.raises(Interrupted) as stopped:
            run(tiny_klein, step_cache, callback_on_step_end=ask, interruption=interruption)
        file = stopped.value.run.save(tmp_path / f"{stop}.safetensors")
        with Engine(str(tiny_klein)) as engine:
            again = engine.generate(from_latents=file, output_type="pt")
        assert torch.equal(again.images, unbroken[step_cache].images)
        assert measured(again).skipped_steps == measured(unbroken[step_cache]).skipped_steps


@pytest.mark.parametrize("step_cache", CACHES)
def test_the_same_batches_make_the_same_pictures(
    step_cache: str, tiny_klein: Path, unbroken: dict[str, Generation]
) -> None:
    assert torch.equal(run(tiny_klein, step_cache).images, unbroken[step_cache].images)
    alone = run(tiny_klein, step_cache, batch_size=1)
    assert len(measured(alone).skipped_steps) == 2  # each batch decides for itself
    assert alone.report.plan.digest != unbroken[step_cache].report.plan.digest


@pytest.mark.parametrize("in_place", [True, False])
def test_a_step_after_changed_latents_is_computed(in_place: bool, tiny_klein: Path) -> None:
    def callback(_: object, step: int, __: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step != 4:
            return {}
        if in_place:
            kept["latents"].mul_(1.01)
            return {}
        return {"latents": 1.01 * kept["latents"]}

    assert measured(run(tiny_klein, TAYLOR, callback_on_step_end=callback)).skipped_steps == ((2, 3, 6),)


def test_a_forecast_that_is_not_finite_is_named(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = History.forecast
    monkeypatch.setattr(History, "forecast", lambda self, step: forecast(self, step) * float("nan"))
    with pytest.raises(NonFiniteLatents, match="step 3 of 8, first in the step cache's forecast"):
        run(tiny_klein, TAYLOR)


# ---------------------------------------------------------------------------------------------- what they keep


@given(order=st.integers(0, 2), steps=st.lists(st.integers(0, 30), min_size=4, max_size=6, unique=True).map(sorted))
def test_a_forecast_is_the_polynomial_through_the_last_values(order: int, steps: list[int]) -> None:
    def value(step: int) -> torch.Tensor:
        return sum((torch.tensor([1.0, -2.0]) * step**power for power in range(order + 1)), torch.zeros(2))

    history = History(order)
    for step in steps[:-1]:
        history.add(step, torch.full((2,), 1e9))  # an attempt that failed
        history.add(step, value(step))
    torch.testing.assert_close(history.forecast(steps[-1]), value(steps[-1]), rtol=1e-4, atol=1e-2)


def one_step(residuals: Residuals, step: int, first: list[float], others: list[float]) -> list[float]:
    """A step of passes with one image whose first block and whose other blocks add these; what leaves each pass."""
    entering = torch.zeros(1, 3, 2)
    residuals.begin(step)
    residuals.enter(entering)
    between = [entering + value for value in first]
    is_skipped = residuals.may_skip(between)
    hidden = between if is_skipped else [one + value for one, value in zip(between, others, strict=True)]
    return [float(residuals.leave(number, one)[0, 0, 0]) for number, one in enumerate(hidden)]


def test_guidance_passes_keep_apart_what_they_keep_and_decide_together() -> None:
    cache = FirstBlock(threshold=0.1, order=0, warmup=1, last=1)
    residuals = Residuals(cache, 9, image_tokens=2)  # the third token is a reference's
    assert one_step(residuals, 0, [1.0, 2.0], [10.0, 20.0]) == [11.0, 22.0]
    assert one_step(residuals, 1, [1.05, 2.05], [0.0, 0.0]) == pytest.approx([11.05, 22.05])
    assert one_step(residuals, 2, [1.05, 2.5], [1.0, 2.0]) == pytest.approx([2.05, 4.5])  # one changed too much
    assert one_step(residuals, 3, [1.05, 2.5], [0.0, 0.0]) == pytest.approx([2.05, 4.5])
    assert residuals.skipped == {1, 3}


def test_the_image_that_changed_most_decides() -> None:
    residuals = Residuals(FirstBlock(threshold=0.1, warmup=1, last=1), 9, image_tokens=2)
    for step, second in enumerate([1.0, 1.0, 2.0]):
        residuals.begin(step)
        residuals.enter(torch.zeros(2, 2, 2))
        hidden = torch.stack([torch.ones(2, 2), torch.full((2, 2), second)])
        assert residuals.may_skip([hidden]) == (step == 1)
        residuals.leave(0, hidden)


def test_memory_is_bounded_by_the_order() -> None:
    assert Taylor(interval=3, order=2).order == 2
    history = History(2)
    for step in range(9):
        history.add(step, torch.zeros(1))
        assert len(history._values) == min(step + 1, 3)
        history.make_room(step + 1)
        assert len(history._values) <= 2  # the step's own value takes the oldest's place
