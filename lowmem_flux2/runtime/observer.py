"""Who is told what goes on while a plan is carried out."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Told what is going on; the command line draws progress bars from it. A stage is one of the plan's, or prepare."""

    def stage_started(self, stage: str, total: int) -> None: ...

    def advanced(self) -> None: ...

    def stage_finished(self, stage: str) -> None: ...

    def event(self, text: str) -> None: ...


class Silent:
    """The observer that ignores everything."""

    def stage_started(self, stage: str, total: int) -> None:
        return

    def advanced(self) -> None:
        return

    def stage_finished(self, stage: str) -> None:
        return

    def event(self, text: str) -> None:
        return
