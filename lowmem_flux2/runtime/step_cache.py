"""Reuse between the denoising steps of one batch: what is kept, which steps are skipped, and what stands for them.

See ``planning.step_caches`` for the two kinds and their papers. The state lies beside the latents in ``Progress``, so
it survives running out of memory: a step that is tried again finds what its first attempt found, and decides the same.
Guidance passes keep apart what they keep, and all images of a batch take the same decision for a step, as blocks are
brought for all of them at once: the image and pass that changed most decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from lowmem_flux2.planning.step_caches import FirstBlock, StepCache, Taylor

Compute = Callable[..., torch.Tensor]
"""Runs the transformer for this step: (B, tokens, channels). Takes ``residuals``, see ``Forward.predict``."""


class Reuse(Protocol):
    """A step cache at work on one batch.

    Attributes:
        skipped: steps that did not compute all blocks, counted from 0.
    """

    skipped: set[int]

    def predict(self, step: int, compute: Compute, skip: Callable[[], None]) -> torch.Tensor:
        """The step's velocity. ``skip`` tells the streamer that no block of the step is needed."""
        ...

    def forget(self) -> None:
        """The latents were changed from outside: what was kept may not be near them any more."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds between two steps, for a file."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up, in a fresh one, what ``tensors`` of another gave."""
        ...


def reuse(cache: StepCache | None, steps: int, image_tokens: int) -> Reuse:
    """A fresh one for one batch of ``image_tokens`` tokens an image, references apart."""
    if isinstance(cache, Taylor):
        return _TaylorReuse(cache, steps)
    if isinstance(cache, FirstBlock):
        return _FirstBlockReuse(cache, steps, image_tokens)
    return _NoReuse()


class History:
    """The last values of a tensor, newest first, each with its step; forecast as a polynomial in the step's number."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._values: list[tuple[int, torch.Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._values)

    def clear(self) -> None:
        self._values.clear()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.{step}": value for step, value in self._values}

    def restore(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        found = [(int(key.rpartition(".")[2]), tensors[key]) for key in tensors if key.rpartition(".")[0] == name]
        self._values = sorted(found, key=lambda pair: -pair[0])

    def make_room(self, step: int) -> None:
        """Drop what will not be needed once this step's value is there, and that of an earlier attempt at it."""
        self._values = [pair for pair in self._values if pair[0] != step][: self._order]

    def add(self, step: int, value: torch.Tensor) -> None:
        self.make_room(step)
        self._values.insert(0, (step, value))

    def forecast(self, step: int) -> torch.Tensor:
        """Lagrange's polynomial through the values, in fp32: exact where it repeats the newest."""
        if len(self._values) == 1:
            return self._values[0][1]
        steps = [known for known, _ in self._values]
        total = torch.zeros_like(self._values[0][1], dtype=torch.float32)
        for known, value in self._values:
            weight = 1.0
            for other in steps:
                if other != known:
                    weight *= (step - other) / (known - other)
            total.add_(value, alpha=weight)
        return total.to(self._values[0][1].dtype)


class _NoReuse:
    def __init__(self) -> None:
        self.skipped: set[int] = set()

    def predict(self, step: int, compute: Compute, skip: Callable[[], None]) -> torch.Tensor:
        return compute()

    def forget(self) -> None:
        return

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        return


class _TaylorReuse:
    """Keeps the velocity, guidance passes joined: that is linear, so it is the same as joining their forecasts."""

    def __init__(self, cache: Taylor, steps: int) -> None:
        self._cache, self._steps = cache, steps
        self._history = History(cache.order)
        self.skipped: set[int] = set()

    def predict(self, step: int, compute: Compute, skip: Callable[[], None]) -> torch.Tensor:
        if self._history and not self._cache.is_computed(step, self._steps):
            velocity = self._history.forecast(step)
            skip()
            self.skipped.add(step)
            return velocity
        velocity = compute()
        self._history.add(step, velocity)
        return velocity

    def forget(self) -> None:
        self._history.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self._history.tensors("velocity"), **_steps_tensor(self.skipped)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._history.restore("velocity", tensors)
        self.skipped.update(_steps_of(tensors))


class _FirstBlockReuse:
    def __init__(self, cache: FirstBlock, steps: int, image_tokens: int) -> None:
        self._residuals = Residuals(cache, steps, image_tokens)
        self.skipped = self._residuals.skipped

    def predict(self, step: int, compute: Compute, skip: Callable[[], None]) -> torch.Tensor:
        self._residuals.begin(step)
        return compute(residuals=self._residuals)

    def forget(self) -> None:
        """Nothing is to be done: the first block sees the change."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self._residuals.tensors(), **_steps_tensor(self.skipped)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._residuals.restore(tensors)
        self.skipped.update(_steps_of(tensors))


def _steps_tensor(skipped: set[int]) -> dict[str, torch.Tensor]:
    return {"skipped": torch.tensor(sorted(skipped), dtype=torch.float32)} if skipped else {}


def _steps_of(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    return [int(step) for step in tensors["skipped"].tolist()] if "skipped" in tensors else []


class Residuals:
    """What blocks add to the hidden states (B, image tokens, h) of each guidance pass: the first one, and the others.

    ``Forward`` calls ``enter``, ``may_skip`` and ``leave`` in each step. References' tokens, which follow an image's
    own, are computed for these alone, so nothing of them is kept.
    """

    def __init__(self, cache: FirstBlock, steps: int, image_tokens: int) -> None:
        self._cache, self._steps, self._tokens = cache, steps, image_tokens
        self._step = 0
        self._computes: int | None = None  # the step that was decided to compute all blocks last
        self._entering: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self._between: list[torch.Tensor] = []
        self._others: list[History] = []
        self.skipped: set[int] = set()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds between two steps."""
        held = {f"first.{number}": value for number, value in enumerate(self._first)}
        for number, history in enumerate(self._others):
            held |= history.tensors(f"others.{number}")
        return held

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        passes = sum(name.startswith("first.") for name in tensors)
        self._first = [tensors[f"first.{number}"] for number in range(passes)]
        self._others = [History(self._cache.order) for _ in range(passes)]
        for number, history in enumerate(self._others):
            history.restore(f"others.{number}", tensors)

    def begin(self, step: int) -> None:
        self._step = step
        self._between.clear()

    def enter(self, projected: torch.Tensor) -> None:
        """The latents' projection, before the first block."""
        self._entering = projected[:, : self._tokens]

    def may_skip(self, hidden: Sequence[torch.Tensor]) -> bool:
        """Whether the first block's results, of each pass, let the others be forecast.

        The decision for a step holds when it is tried again: what it rests on may have been replaced.
        """
        assert self._entering is not None
        own = [one[:, : self._tokens] for one in hidden]
        first = [one - self._entering for one in own]
        self._entering = None
        self._others = self._others or [History(self._cache.order) for _ in own]
        is_free = self._step != self._computes and not self._cache.is_always_computed(self._step, self._steps)
        self._between = own
        if is_free and _change(first, self._first) < self._cache.threshold:
            self.skipped.add(self._step)
            return True
        self._computes, self._first = self._step, first
        for history in self._others:
            history.make_room(self._step)
        return False

    def leave(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """A pass's hidden states after all blocks: as they are, and remembered; or forecast, of the image alone."""
        between = self._between[number]
        if self._step in self.skipped:
            return between + self._others[number].forecast(self._step)
        self._others[number].add(self._step, hidden[:, : self._tokens] - between)
        return hidden


def _change(now: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """Mean absolute change over mean absolute value, of the image and pass where it is largest; inf without before."""
    if not before:
        return float("inf")
    worst = [
        ((one - other).abs().mean(dim=(1, 2), dtype=torch.float32) / other.abs().mean(dim=(1, 2), dtype=torch.float32))
        for one, other in zip(now, before, strict=True)
    ]
    return float(torch.stack(worst).max().item())
