"""Runs a part's cases in worker processes: begins them while there is time, watches memory, ends what goes too far.

This process never touches CUDA: the card's memory is read through NVML. Imports no torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from gpu.record import CRASHED, CUT_SHORT, FAILED, KILLED_FOR_RAM, TIMED_OUT, Record
from lowmem_flux2.planning.detect import available_ram_bytes
from lowmem_flux2.units import GIB

POLL_S = 0.02
SETTLE_S, SETTLE_TRIES = 0.1, 50
START_S = 120.0
"""A worker that has not listed its cases by then never will: imports take some ten seconds."""
RAM_FLOOR_BYTES = 1 << 30
RAM_FLOOR_SHARE = 20
"""A case is ended when less RAM is left than a gibibyte or one part in so many, before the system ends something."""


class Card:
    """Memory in use on the card, through NVML; None where it says nothing."""

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if uuid is None:
            return
        with suppress(Exception):  # measured beside other things: without it the suite still runs
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml

    def used_bytes(self) -> int | None:
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:
            return None


@dataclass(slots=True)
class Peaks:
    """The card's and the machine's memory while a case runs, all processes together."""

    card: Card
    card_before: int | None
    ram_before: int
    card_peak: int = 0
    ram_least: int = 1 << 62

    def take(self) -> None:
        self.card_peak = max(self.card_peak, self.card.used_bytes() or 0)
        self.ram_least = min(self.ram_least, available_ram_bytes())

    def figures(self) -> dict[str, Any]:
        """What the worker took over what was in use before it started: context, pinned memory and all."""
        taken = None if self.card_before is None else self.card_peak - self.card_before
        return {"card_taken_peak_bytes": taken, "ram_taken_peak_bytes": max(self.ram_before - self.ram_least, 0)}


def settled_bytes(card: Card) -> int | None:
    """Memory in use on the card once it has stopped falling: a process that ended gives its own back after a moment."""
    before = card.used_bytes()
    for _ in range(SETTLE_TRIES):
        time.sleep(SETTLE_S)
        now = card.used_bytes()
        if before is None or now is None or now >= before:
            return now
        before = now
    return before


class Worker:
    """A process that runs cases one by one."""

    def __init__(self, command: Sequence[str], log: IO[bytes], card: Card) -> None:
        self.card_before = settled_bytes(card)
        self.ram_before = available_ram_bytes()
        read, write = os.pipe()
        self._channel = read
        self._pending = b""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [*command, "--channel", str(write)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            process_group=0,
            env=environment,
        )
        os.close(write)

    def send(self, name: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: the next poll sees that
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()

    def poll(self) -> dict[str, Any] | None:
        """An answer, within POLL_S. Raises EOFError when the process is gone."""
        ready, _, _ = select.select([self._channel], [], [], POLL_S)
        if ready:
            received = os.read(self._channel, 1 << 16)
            if not received:
                self.process.wait()
                raise EOFError
            self._pending += received
        line, found, rest = self._pending.partition(b"\n")
        if not found:
            return None
        self._pending = rest
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill it and what it started, and wait until it is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(OSError):
            os.close(self._channel)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


@dataclass(frozen=True, slots=True)
class Told:
    """A case as the worker lists it."""

    name: str
    guess_s: float
    timeout_s: float
    alone: bool


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Whether the card held no more than the cap, as the driver saw it: context and all, which no allocator sees."""
    cap, taken = result.get("cap_bytes"), result["card_taken_peak_bytes"]
    if cap is None or taken is None or "met" not in result:
        return result
    line = f"{result['line']}; the card held {taken / GIB:.2f} GiB" + ("" if taken <= cap else ", MORE THAN THE CAP")
    return result | {"within_cap": taken <= cap, "met": result["met"] and taken <= cap, "line": line}


class Supervisor:
    """One part, one call.

    Args:
        command: starts a worker.
        deadline: by ``time.monotonic``; cases under way then are ended.
        only: names of cases, or none for all.
    """

    def __init__(
        self, command: Sequence[str], record: Record, card: Card, log: Path, deadline: float, only: Sequence[str] = ()
    ) -> None:
        self._command, self._record, self._card = command, record, card
        self._deadline, self._only = deadline, only
        self._log = log.open("ab")
        self._worker: Worker | None = None
        self._has_worked = False
        self._slowest: dict[float, float] = {}
        self._start_s = 0.0
        self.about: dict[str, Any] = {}
        self.cut_short = False

    def run(self) -> None:
        try:
            for case in self._cases():
                if self._record.is_final(case.name) or (self._only and case.name not in self._only):
                    continue
                is_new = self._worker is None or (case.alone and self._has_worked)
                if self._deadline - time.monotonic() < self._guess(case) + is_new * self._start_s:
                    self.cut_short = True  # a shorter one may still fit
                    continue
                if is_new:
                    self._end()
                    if self._start() is None:
                        status = CRASHED if time.monotonic() < self._deadline else CUT_SHORT
                        self._put(case, status, {"line": "its process ended, or said nothing, before the case began"})
                        continue
                self._put(case, *self._measure(case))
                if case.alone:
                    self._end()
        finally:
            self._end()
            self._log.close()

    def _cases(self) -> list[Told]:
        listed = self._start()
        if listed is None:
            self._log.flush()
            raise RuntimeError("the worker did not start: see its log")
        return [Told(**case) for case in listed]

    def _guess(self, case: Told) -> float:
        """Cases with the same guess are alike: what the slowest of them took, once one was measured."""
        return self._slowest.get(case.guess_s, case.guess_s)

    def _start(self) -> list[dict[str, Any]] | None:
        """A fresh worker; the cases it lists, None where it ends, or says nothing."""
        self._worker = Worker(self._command, self._log, self._card)
        self._has_worked = False
        begun = time.monotonic()
        limit = min(begun + START_S, self._deadline)
        try:
            while time.monotonic() < limit:
                if (answer := self._worker.poll()) is not None:
                    self._start_s = time.monotonic() - begun
                    self.about = {"versions": answer["versions"], "card": answer["card"]}
                    listed: list[dict[str, Any]] = answer["cases"]
                    return listed
        except EOFError:
            pass
        self._end()
        return None

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None

    def _measure(self, case: Told) -> tuple[str, dict[str, Any]]:
        """Run a case in the worker; its status and result. A worker that failed, or had to be ended, is gone."""
        worker = self._worker
        assert worker is not None
        peaks = Peaks(self._card, worker.card_before, worker.ram_before)
        floor = max(RAM_FLOOR_BYTES, psutil.virtual_memory().total // RAM_FLOOR_SHARE)
        self._has_worked = True
        start = time.monotonic()
        worker.send(case.name)
        try:
            while True:
                answer = worker.poll()
                peaks.take()
                if answer is not None:
                    status = answer.pop("status")
                    if status == FAILED:
                        self._end()
                    return status, judged(answer | peaks.figures())
                ended = self._verdict(case, start, peaks, floor)
                if ended is not None:
                    self._end()
                    return ended, self._ending(start, peaks, ended)
        except EOFError:
            code = worker.process.returncode
            self._end()
            killed = code == -signal.SIGKILL  # by the system: nobody else does, and RAM is its reason
            status = KILLED_FOR_RAM if killed else CRASHED
            return status, self._ending(start, peaks, f"ended by signal {-code}" if code < 0 else f"exit code {code}")

    def _verdict(self, case: Told, start: float, peaks: Peaks, floor: int) -> str | None:
        now = time.monotonic()
        if peaks.ram_least < floor:
            return KILLED_FOR_RAM
        if now - start > case.timeout_s:
            return TIMED_OUT
        return CUT_SHORT if now > self._deadline else None

    @staticmethod
    def _ending(start: float, peaks: Peaks, line: str) -> dict[str, Any]:
        return {"seconds": time.monotonic() - start, "line": line, **peaks.figures()}

    def _put(self, case: Told, status: str, result: dict[str, Any]) -> None:
        self.cut_short = self.cut_short or status == CUT_SHORT
        if "seconds" in result:
            self._slowest[case.guess_s] = max(self._slowest.get(case.guess_s, 0.0), float(result["seconds"]))
        self._record.add(case.name, status, result)
        print(f"{case.name}: {status}: {result.get('line', '')} [{result.get('seconds', 0.0):.1f} s]", flush=True)
