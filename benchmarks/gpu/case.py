"""What a part consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu.running import Bench


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. Cases of a part are listed in order of importance, and begun as long as there is time.

    Args:
        name: unique in its part; a case whose result is on record is not run again.
        run: returns what goes on record; ``line`` in it is printed, ``met`` says whether a goal was reached.
        guess_s: how long it may take, until one like it was measured: it is not begun with less time left.
            Cases with the same guess are taken to be alike.
        timeout_s: then it is ended, and that is its result.
        alone: in a process of its own.
    """

    name: str
    run: Callable[[Bench], dict[str, Any]]
    guess_s: float
    timeout_s: float = 180.0
    alone: bool = False
