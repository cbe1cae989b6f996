"""A GPU, its host thread and its reader thread, as a machine that may take any order the program allows.

Four actors: the loop (the test's own thread), the worker (a real thread that runs only when it is its turn), and the
queues of copies and kernels, whose operations are carried out when the schedule says so. Wherever a thread could be
overtaken it calls ``pause``, and the schedule chooses who goes on among those who can: a thread that is not blocked, a
queue whose first operation does not wait for an event. So one seed is one interleaving, and it can be run again.

What is in the middle of being written is poisoned: a copy spoils its target before it fills it, a read its buffer, and
a block's last kernel spoils the slot, so bytes that are read too early or too late are never right by luck.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import torch

LOOP, WORKER, COPIES, KERNELS = ACTORS = ("loop", "worker", "copies", "kernels")
POISON = 0xDD
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Schedule:
    """Who goes on: the first of ``order`` who can, or with a seed anyone, some much more often than others."""

    order: tuple[str, ...]
    seed: int | None = None


class Stuck(Exception):
    """No actor can go on."""


@dataclass
class _Operation:
    run: Callable[[], object]
    may_run: Callable[[], bool] = lambda: True
    reads: torch.Tensor | None = None


@dataclass
class Machine:
    schedule: Schedule
    faults: list[str] = field(default_factory=list)
    copied: list[torch.Tensor] = field(default_factory=list)  # the source of each copy that was enqueued
    pinned: set[int] = field(default_factory=set)  # addresses
    kernels_done: int = 0
    copies_done: int = 0
    kernels_before_copy: list[int] = field(default_factory=list)  # how many were done when each copy began
    loop_has_waited: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.schedule.seed)
        self._weights = {actor: self._random.choice((1, 10, 100)) for actor in ACTORS}
        self._queues: dict[str, deque[_Operation]] = {COPIES: deque(), KERNELS: deque()}
        self._recorded: list[int] = []
        self._reached: list[int] = []
        self._turn = LOOP
        self._blocked_until: dict[str, Callable[[], bool]] = {}
        self._changed = threading.Condition()
        self._worker_thread: threading.Thread | None = None
        self._stuck = ""

    # ------------------------------------------------------------------------------------------------- threads

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others overtake, and return when the condition holds and the schedule says so."""
        with self._changed:
            me = WORKER if threading.current_thread() is self._worker_thread else LOOP
            self._blocked_until[me] = until
            while (actor := self._choose()) in self._queues:
                self._queues[actor].popleft().run()
            if actor != me:
                self._hand_over(actor)
                self._await_turn(me)

    def start_worker(self, thread: threading.Thread, has_work: Callable[[], bool]) -> None:
        self._worker_thread = thread
        self._blocked_until[WORKER] = has_work
        thread.start()

    def begin_worker(self) -> None:
        with self._changed:
            self._await_turn(WORKER)

    def end_worker(self) -> None:
        with self._changed:
            del self._blocked_until[WORKER]
            self._hand_over(LOOP)

    @property
    def has_worker(self) -> bool:
        return WORKER in self._blocked_until

    def _hand_over(self, actor: str) -> None:
        self._turn = actor
        self._changed.notify_all()

    def _await_turn(self, me: str) -> None:
        if not self._changed.wait_for(lambda: self._turn == me or bool(self._stuck), PATIENCE_S):
            self._stuck = f"{self._turn} never gave the turn back"
        if self._stuck:
            raise Stuck(self._stuck)

    def _choose(self) -> str:
        able = [actor for actor, until in self._blocked_until.items() if until()]
        able += [name for name, queue in self._queues.items() if queue and queue[0].may_run()]
        if not able or self._stuck:
            self._stuck = self._stuck or "everyone waits for someone else"
            self._hand_over(LOOP)
            raise Stuck(self._stuck)
        if self.schedule.seed is None:
            return min(able, key=self.schedule.order.index)
        return self._random.choices(able, [self._weights[actor] for actor in able])[0]

    def is_loop(self) -> bool:
        return threading.current_thread() is not self._worker_thread

    # -------------------------------------------------------------------------------------------------- queues

    def kernel(self, run: Callable[[], object]) -> None:
        """A kernel that ``run`` stands for."""

        def carry_out() -> None:
            run()
            self.kernels_done += 1

        self.pause()
        self._queues[KERNELS].append(_Operation(carry_out))

    def copy(self, source: torch.Tensor, target: torch.Tensor, queue: str = COPIES) -> None:
        """In two operations, since a copy takes its time. From pageable memory the calling thread waits for it."""
        self.pause()
        self.copied.append(source)
        done = []

        def begin() -> None:
            self.kernels_before_copy.append(self.kernels_done)
            target.fill_(POISON)

        def finish() -> None:
            done.append(target.copy_(source))
            self.copies_done += 1

        self._queues[queue].append(_Operation(begin, reads=source))
        self._queues[queue].append(_Operation(finish, reads=source))
        if source.untyped_storage().data_ptr() not in self.pinned:
            self._note_wait()
            self.pause(until=lambda: bool(done))

    def event(self) -> int:
        self._recorded.append(0)
        self._reached.append(0)
        return len(self._recorded) - 1

    def record(self, queue: str, event: int) -> None:
        self.pause()
        self._recorded[event] += 1
        number = self._recorded[event]

        def reach() -> None:
            self._reached[event] = number

        self._queues[queue].append(_Operation(reach))

    def wait(self, queue: str, event: int) -> None:
        self.pause()
        number = self._recorded[event]
        self._queues[queue].append(_Operation(lambda: None, lambda: self._reached[event] >= number))

    def host_waits(self, event: int) -> None:
        self._note_wait()
        number = self._recorded[event]
        self.pause(until=lambda: self._reached[event] >= number)

    def synchronize(self) -> None:
        self.pause(until=self.is_idle)

    def is_idle(self) -> bool:
        return not any(self._queues.values())

    def pin(self, span: torch.Tensor) -> None:
        assert span.data_ptr() % 4096 == span.numel() % 4096 == 0  # a page can be pinned once only
        self.pinned.add(span.untyped_storage().data_ptr())

    def unpin(self, span: torch.Tensor) -> None:
        address = span.untyped_storage().data_ptr()
        self.pinned.remove(address)
        for operation in (each for queue in self._queues.values() for each in queue):
            if operation.reads is not None and operation.reads.untyped_storage().data_ptr() == address:
                self.faults.append("host memory was given back while a copy still had to read it")

    def _note_wait(self) -> None:
        self.loop_has_waited |= self.is_loop()


class Worker(Executor):
    """ThreadPoolExecutor with one thread, on a machine."""

    def __init__(self, machine: Machine, initializer: Callable[[], None] = lambda: None) -> None:
        self._machine = machine
        self._initializer = initializer
        self._tasks: deque[tuple[_Answer, Callable[[], Any]]] = deque()
        self._is_stopping = False
        machine.start_worker(threading.Thread(target=self._serve, daemon=True), self._may_go_on)

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._is_stopping:
            raise RuntimeError("the worker was shut down")
        answer = _Answer(self._machine)
        self._tasks.append((answer, lambda: call(*args, **kwargs)))
        self._machine.pause()
        return answer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_stopping = True
        while cancel_futures and self._tasks:
            self._tasks.popleft()[0].cancel()
        if wait:
            self._machine.pause(until=lambda: not self._machine.has_worker)

    def _may_go_on(self) -> bool:
        return bool(self._tasks) or self._is_stopping

    def _serve(self) -> None:
        try:
            self._machine.begin_worker()
            self._initializer()
            while True:
                self._machine.pause(until=self._may_go_on)
                if not self._tasks:
                    return
                answer, task = self._tasks.popleft()
                if not answer.set_running_or_notify_cancel():
                    continue
                try:
                    result = task()
                except BaseException as error:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)
        except Stuck:
            return  # the loop's thread raises it too
        finally:
            self._machine.end_worker()


class _Answer(Future[Any]):
    """A future whose reader lets the others go on until it is there."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def result(self, timeout: float | None = None) -> Any:
        self._machine.pause(until=self.done)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._machine.pause(until=self.done)
        return super().exception(0)
