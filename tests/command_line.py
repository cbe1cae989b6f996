"""The command line, run in this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def runner(monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: exit code and what was printed."""
    from lowmem_flux2 import cli

    def go(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lowmem-flux2", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capture.readouterr()
        return Ran(int(stopped.value.code or 0), captured.out, captured.err)

    return go


def signals_in(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, signals: int = 1) -> None:
    """SIGINT in the midst of a call."""
    before, calls = getattr(owner, name), []

    def signalled(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        return before(*arguments, **named)

    monkeypatch.setattr(owner, name, signalled)
