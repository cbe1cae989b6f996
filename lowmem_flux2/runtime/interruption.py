"""Stopping a run after the step under way, so that it goes on there: what Ctrl-C asks for, the first time.

    with Interruption().on_sigint() as interruption:
        engine.generate(..., interruption=interruption)

While layers, steps and pictures are being made, the first SIGINT waits for the one under way, and ``Interrupted`` or
``DecodeFailed`` is raised with what is to be kept. A second one, or one while weights are loaded, is an ordinary
KeyboardInterrupt: at once, with nothing kept but what is on disk, whole.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lowmem_flux2.errors import Interrupted

NOTICE = b"\nstopping after this step; Ctrl-C again stops at once\n"


class Interruption:
    """Asked of a run, from a signal, another thread or a step's callback."""

    def __init__(self) -> None:
        self._is_asked = False
        self._is_deferred = False

    @property
    def is_asked(self) -> bool:
        return self._is_asked

    def ask(self) -> None:
        """Stop after the layer, step or picture under way."""
        self._is_asked = True

    def check(self) -> None:
        """Called between two steps.

        Raises:
            Interrupted: it was asked for.
        """
        if self._is_asked:
            raise Interrupted("interrupted")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """While steps are taken, SIGINT waits for the one under way."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def on_sigint(self) -> Iterator[Interruption]:
        """SIGINT asks, until the block ends. In the main thread only, as Python has it.

        Raises:
            ValueError: in another thread.
        """
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_asked or not self._is_deferred:
            raise KeyboardInterrupt
        self._is_asked = True
        # Not print: the signal may come in the middle of one, and buffered writers are not re-entrant.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, NOTICE)
