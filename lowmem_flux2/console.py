"""What a person sees while a run goes on: progress bars on a terminal, plain lines of warning elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

UNITS = {
    "prepare": "blocks",
    "upsample": "tokens",
    "encode": "layers",
    "reference": "images",
    "denoise": "steps",
    "decode": "images",
}


class _RateColumn(ProgressColumn):
    """``3.2 steps/s``, or ``4.1 s/step`` where it is slow."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = str(task.fields["unit"])
        if not speed:
            return Text("")
        if speed >= 1:
            return Text(f"{speed:.1f} {unit}/s")
        return Text(f"{1 / speed:.1f} s/{unit.removesuffix('s')}")


class ConsoleObserver:
    """Draws one bar a stage with its rate and remaining time; silent bars where the console is no terminal."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks = [self._progress.add_task("start", total=None, visible=False, unit="steps")]

    def __enter__(self) -> ConsoleObserver:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage_started(self, stage: str, total: int) -> None:
        """Weights may be prepared in the middle of a stage, which then goes on."""
        self._tasks.append(self._progress.add_task(stage, total=total, unit=UNITS[stage]))

    def advanced(self) -> None:
        self._progress.advance(self._tasks[-1])

    def stage_finished(self, stage: str) -> None:
        self._progress.stop_task(self._tasks.pop())

    def event(self, text: str) -> None:
        """Warnings are shown even when quiet: a flag or figure that does not hold must be seen. A line each, as it is:
        paths in them are to be copied."""
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
