"""Is each wait of the streamer needed, and would a test say so? Break them one at a time and see.

    python benchmarks/mutate_streaming.py --out benchmarks/results    # --resume: what was caught is not run again

For every mutation below, a copy of the package in a temporary folder has one piece of source replaced, and the
streaming tests run against the copy until one fails. Prints the test that caught each, records them in
mutations-streaming.json after each, and exits with 1 if one survived. Takes about ten seconds a mutation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RACES, STREAMING = ROOT / "tests/runtime/test_races.py", ROOT / "tests/runtime/test_streaming.py"
TIMEOUT_S = 180
NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True)
settings.load_profile("mutation")
"""


@dataclass(frozen=True)
class Mutation:
    """In ``file`` of runtime/, ``before`` (which occurs once) becomes ``after``.

    ``equivalent`` says why a survivor would be no fault of the tests.
    """

    name: str
    file: str
    before: str
    after: str
    equivalent: str = ""


def streaming(name: str, before: str, after: str, equivalent: str = "") -> Mutation:
    return Mutation(name, "streaming.py", before, after, equivalent)


def transport(name: str, before: str, after: str, equivalent: str = "") -> Mutation:
    return Mutation(name, "transport.py", before, after, equivalent)


COPY = (
    "        self._transport.copy_waits(slot.freed)\n"
    "        self._transport.copy(source, slot.span[: source.numel()])\n"
    "        self._transport.record_copy(slot.copied)\n"
)
WAITS, COPIES, RECORDS = COPY.splitlines(keepends=True)
RING_WAIT = (
    "            self._transport.host_waits(slot.copied)  # for the entry's last copy, on this thread, not the loop's\n"
)
RING_READ = "            self._sources[index].read_into(slot.staging[:size_bytes], direct=True)\n"
RING_COPY = "            self._copy(slot.staging[:size_bytes], slot)\n"
SHUTDOWN = "        self._worker.shutdown(wait=True, cancel_futures=True)\n"
SYNCHRONIZE = "            self._transport.synchronize()  # copies under way write to slots and read from arenas\n"
AFTER_USE = "            self._release()\n            self._prefetch()\n"
ROUND_DONE = "        self._at = None\n        self._rounds_left = max(0, self._rounds_left - 1)\n"
ROUND_LEFT_OUT = "        self._round += 1\n        self._rounds_left = max(0, self._rounds_left - 1)\n"
RELEASE = "        if not self._is_cut:\n            self._release()\n"
DISCARD = (
    "                    use.brought.exception()  # wait: its copy would land in the slot after that of a new use\n"
)

MUTATIONS = (
    # Waits and events, each removed, moved, or taken for another.
    streaming("the copy does not wait until the slot is free", COPY, COPIES + RECORDS),
    streaming("the copy waits for the slot after it has written to it", COPY, COPIES + WAITS + RECORDS),
    streaming("the copy waits for the slot's last copy", WAITS, WAITS.replace("freed", "copied")),
    streaming("the copy's event is lost", COPY, WAITS + COPIES),
    streaming("the copy's event is recorded before it", COPY, WAITS + RECORDS + COPIES),
    streaming("the copy records the other event", RECORDS, RECORDS.replace("copied", "freed")),
    streaming("kernels do not wait for the copy", "        self._transport.compute_waits(use.slot.copied)\n", ""),
    streaming("kernels wait for the other event", "compute_waits(use.slot.copied)", "compute_waits(use.slot.freed)"),
    streaming("the loop does not wait for the worker", "            use.brought.result()\n", "            pass\n"),
    streaming(
        "the loop waits for the worker after the event",
        "        if use.brought is not None:\n            use.brought.result()\n"
        "        self._transport.compute_waits(use.slot.copied)\n",
        "        self._transport.compute_waits(use.slot.copied)\n"
        "        if use.brought is not None:\n            use.brought.result()\n",
    ),
    streaming(
        "the event after a slot's use is lost", "            self._transport.record_compute(self._held.freed)\n", ""
    ),
    streaming(
        "a slot counts as free before its block is used",
        "        self._held = use.slot\n",
        "        self._held = use.slot\n        self._transport.record_compute(use.slot.freed)\n"
        "        self._held = None\n",
    ),
    streaming(
        "slots count as free when they are made",
        "            self._transport.record_compute(slot.freed)\n",
        "            pass\n",
    ),
    streaming("a ring entry is read into while it is copied", RING_WAIT, ""),
    streaming("a ring entry waits after the read", RING_WAIT + RING_READ, RING_READ + RING_WAIT),
    streaming("a ring entry waits for the other event", "host_waits(slot.copied)", "host_waits(slot.freed)"),
    streaming("a ring entry is copied before the read", RING_READ + RING_COPY, RING_COPY + RING_READ),
    streaming(
        "the whole ring is one entry",
        "                _Slot(allocate(largest, self._device), staging,",
        "                _Slot(allocate(largest, self._device), made[0].staging if made else staging,",
    ),
    streaming(
        "all slots share the copy's event",
        "staging, self._transport.event(), self._transport.event())",
        "staging, made[0].copied if made else self._transport.event(), self._transport.event())",
    ),
    streaming(
        "all slots share the event of their use",
        "staging, self._transport.event(), self._transport.event())",
        "staging, self._transport.event(), made[0].freed if made else self._transport.event())",
    ),
    streaming(
        "the loop waits for every block",
        "        self._held = use.slot\n",
        "        self._held = use.slot\n        self._transport.host_waits(use.slot.copied)\n",
    ),
    streaming("pageable memory is copied by the loop", "if index in self._inline and", "if index in self._spans and"),
    streaming("pinned memory is copied by the worker", "if index in self._inline and", "if False and"),
    streaming(
        "a pinned block overtakes the one before it", " and (self._bringing is None or self._bringing.done()):", ":"
    ),
    # Indices.
    streaming(
        "a slot is used one block early",
        "len(self._uses) < free",
        "len(self._uses) <= free",
    ),
    streaming("one slot stays empty", "len(self._uses) <", "len(self._uses) + 1 <"),
    streaming("two blocks in turn go to one slot", "self._slots[self._issued % ", "self._slots[self._issued // 2 % "),
    streaming(
        "the slot is counted from the round's beginning",
        "self._slots[self._issued % ",
        "self._slots[(self._issued - self._origin) % len(self._streamed) % ",
    ),
    streaming(
        "the prefetch order is shifted", "(self._issued - self._origin) %", "(self._issued - self._origin + 1) %"
    ),
    streaming("the prefetch order forgets where a round began", "(self._issued - self._origin) %", "self._issued %"),
    streaming("the prefetch order is reversed", "self._streamed[(self._issued", "self._streamed[-1 - (self._issued"),
    streaming("prefetch stops at the end of a round", "max(1, self._rounds_left) * len", "1 * len"),
    streaming(
        "prefetch goes one block beyond the announced rounds",
        "self._rounds_left) * len(self._streamed)",
        "self._rounds_left) * len(self._streamed) + 1",
    ),
    streaming(
        "prefetch goes one round beyond the announced ones", "max(1, self._rounds_left)", "(1 + self._rounds_left)"
    ),
    streaming("no round after the announced ones", "max(1, self._rounds_left)", "self._rounds_left"),
    streaming("finished rounds are not counted", ROUND_DONE, "        self._at = None\n"),
    streaming("rounds that are left out are not counted", ROUND_LEFT_OUT, "        self._round += 1\n"),
    streaming("a kept block's slot counts as free", "self._slots) - (self._held is not None)", "self._slots)"),
    streaming("a kept block counts as taken", "len(self._uses) - (self._held is not None)", "len(self._uses)"),
    streaming("a kept block is given up", "self._is_cut = self._is_cut or self._at == 0", "self._is_cut = False"),
    streaming("the limit counts from what was sent for", "self._limit = taken +", "self._limit = self._issued +"),
    streaming(
        "the next block is sent for before the slot is free",
        AFTER_USE,
        "            self._prefetch()\n            self._release()\n",
    ),
    streaming("nothing is sent for after a use", AFTER_USE, "            self._release()\n"),
    streaming(
        "nothing is sent for when a round begins",
        "* len(self._streamed)\n        self._prefetch()\n",
        "* len(self._streamed)\n",
    ),
    streaming(
        "the block is bound to the first slot",
        "self._take(index).span)",
        "(self._take(index), self._slots[0])[1].span)",
    ),
    streaming("all blocks of an arena lie on one another", "                offset += layout.total_bytes\n", ""),
    streaming(
        "slots as large as the smallest block",
        "largest = max((self._layouts[index].total_bytes for index in self._streamed)",
        "largest = min((self._layouts[index].total_bytes for index in self._streamed)",
    ),
    streaming(
        "slots as large as the largest block of all",
        "for index in self._streamed), default=0)",
        "for index in range(len(self._layouts))), default=0)",
    ),
    streaming("the two loading buffers are one", "buffers[number % len(buffers)]", "buffers[0]"),
    streaming(
        "the next block is loaded before the last is there",
        "            ready = reading.result()\n",
        "            ready = buffers[number % len(buffers)][: self._layouts[index].total_bytes]\n",
    ),
    # Rounds that are given up.
    streaming(
        "a round that was given up is not forgotten", "if (taken - self._origin) % len(self._streamed):", "if False:"
    ),
    streaming("every round is begun anew", "if (taken - self._origin) % len(self._streamed):", "if True:"),
    streaming("a given-up round's reads are not waited for", DISCARD, "                    pass\n"),
    streaming("a given-up round's reads are all waited for", "and not use.brought.cancel()", ""),
    streaming(
        "a given-up round's uses stay",
        "            self._uses.clear()\n            self._origin",
        "            self._origin",
    ),
    streaming("the new round does not begin here", "self._origin = taken = self._issued", "taken = self._issued"),
    streaming(
        "the block in use is forgotten",
        RELEASE,
        RELEASE.replace("self._release()", "self._held = None"),
    ),
    streaming(
        "the block in use stays in use",
        RELEASE,
        "",
    ),
    streaming("an old iterator goes on", "if self._is_closed or number != self._round:", "if self._is_closed:"),
    streaming(
        "an iterator goes on after close", "if self._is_closed or number != self._round:", "if number != self._round:"
    ),
    streaming(
        "a closed streamer begins a round",
        '            raise ValueError("the streamer is closed")\n        self._round += 1\n',
        "            pass\n        self._round += 1\n",
    ),
    # Giving back.
    streaming("close does not wait for the worker", "shutdown(wait=True,", "shutdown(wait=False,"),
    streaming("close finishes what was sent for", "cancel_futures=True", "cancel_futures=False"),
    streaming(
        "close does not wait for copies",
        "            self._transport.synchronize()  # copies",
        "            pass  # copies",
    ),
    streaming(
        "close stops the worker after the copies",
        SHUTDOWN + "        try:\n" + SYNCHRONIZE,
        "        try:\n" + SYNCHRONIZE + "    " + SHUTDOWN,
    ),
    streaming("close leaves memory pinned", "                self._transport.unpin(span)\n", "                pass\n"),
    streaming("close leaves modules bound", "                unbind(block)\n", "                pass\n"),
    streaming("close keeps the slots", "            self._slots.clear()\n", ""),
    streaming("close keeps the arenas", "            self._spans.clear()\n", ""),
    streaming(
        "a failure while loading is not cleaned up",
        "        except BaseException:\n            self.close()\n            raise\n",
        "        except BaseException:\n            raise\n",
    ),
    streaming(
        "pinned spans share pages",
        "-(-size_bytes // PAGE_BYTES) * PAGE_BYTES",
        "size_bytes",
        "blocks' spans are whole sectors of 4096 bytes, as long as a page: there is nothing to round",
    ),
    # What the primitives do.
    transport(
        "copies go to the compute stream",
        "        with torch.cuda.stream(self._copies):\n            target",
        "        if True:\n            target",
    ),
    transport("copies block the host", "non_blocking=True", "non_blocking=False"),
    transport(
        "the copy's event is recorded on the compute stream",
        ".record(self._copies)",
        ".record(torch.cuda.current_stream(self._device))",
    ),
    transport(
        "the event of a use is recorded on the copy stream",
        ".record(torch.cuda.current_stream(self._device))",
        ".record(self._copies)",
    ),
    transport(
        "the compute stream waits for slots to be free",
        "self._copies.wait_event(",
        "torch.cuda.current_stream(self._device).wait_event(",
    ),
    transport(
        "the copy stream waits for its own copies",
        "torch.cuda.current_stream(self._device).wait_event(",
        "self._copies.wait_event(",
    ),
    transport("the host does not wait", "        self._events[event].synchronize()\n", "        return\n"),
    transport("nobody waits for the device", "        synchronize(self._device)\n", "        return\n"),
    transport("all events are one", "return len(self._events) - 1", "return 0"),
    transport("a new thread stays at cuda:0", '"block-reader", self.enter_thread)', '"block-reader")'),
    transport("entering a thread does nothing", "        torch.cuda.set_device(self._device)\n", "        return\n"),
    transport("memory stays pinned", "        unregister_pinned(span)\n", "        return\n"),
    transport("a CPU copies nothing", "        target.copy_(source)\n", "        return\n"),
)


def run_tests(package: Path) -> str:
    """The first test that fails against the package in this folder; empty if none does."""
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for test, options in ((RACES, ["--noconftest"]), (STREAMING, [])):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=line",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "-p",
            "no_shrinking",
        ]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *options, str(test)]
        try:
            ran = subprocess.run(
                command, cwd=package, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"{test.name}: none of its tests ended within {TIMEOUT_S} s"
        if ran.returncode:
            found = re.search(
                r"^(?:FAILED|ERROR) \S*?(test_\w+\.py(?:::[^\n]*?)?)(?: - .*)?$", ran.stdout, re.MULTILINE
            )
            if found is None:
                raise SystemExit(f"pytest failed without a failing test:\n{ran.stdout}\n{ran.stderr}")
            return found[1]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for mutations-streaming.json")
    parser.add_argument("--only", default="", help="only mutations whose name contains this")
    parser.add_argument("--resume", action="store_true", help="keep what the file in --out has of mutations caught")
    args = parser.parse_args()
    record: Path | None = args.out / "mutations-streaming.json" if args.out else None
    if args.resume and (record is None or not record.exists()):
        parser.error("--resume goes on with a mutations-streaming.json in --out: there is none")
    kept = {
        each["mutation"]: each
        for each in (json.loads(record.read_text())["results"] if args.resume and record else ())
        if each["caught_by"] or "equivalent" in each
    }
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(ROOT / "lowmem_flux2", package / "lowmem_flux2", ignore=shutil.ignore_patterns("__pycache__"))
        (package / "no_shrinking.py").write_text(NO_SHRINKING)
        failed = run_tests(package)
        if failed:
            raise SystemExit(f"the tests fail without any mutation: {failed}")
        for mutation in MUTATIONS:
            if args.only not in mutation.name or mutation.name in kept:
                continue
            path = package / "lowmem_flux2" / "runtime" / mutation.file
            source = path.read_text()
            if source.count(mutation.before) != 1:
                raise SystemExit(f"{mutation.name}: its source occurs {source.count(mutation.before)} times")
            path.write_text(source.replace(mutation.before, mutation.after))
            caught_by = run_tests(package)
            path.write_text(source)
            print(f"{mutation.name}: {caught_by or 'SURVIVED ' + mutation.equivalent}", flush=True)
            results.append({"mutation": mutation.name, "file": mutation.file, "caught_by": caught_by or None})
            if mutation.equivalent:
                results[-1]["equivalent"] = mutation.equivalent
            if record is not None:
                write(record, [*kept.values(), *results])
    figures = summary([*kept.values(), *results])
    print(json.dumps(figures))
    raise SystemExit(1 if figures["survivors"] else 0)


def summary(results: list[dict[str, object]]) -> dict[str, object]:
    """How many ran, which survived without an excuse, and which are yet to run."""
    names = {each["mutation"] for each in results}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mutations": len(results),
        "survivors": [each["mutation"] for each in results if not each["caught_by"] and "equivalent" not in each],
        "not_run": [each.name for each in MUTATIONS if each.name not in names],
    }


def write(record: Path, results: list[dict[str, object]]) -> None:
    """All results, in the order of ``MUTATIONS``."""
    order: dict[object, int] = {mutation.name: number for number, mutation in enumerate(MUTATIONS)}
    results = sorted((each for each in results if each["mutation"] in order), key=lambda each: order[each["mutation"]])
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(summary(results) | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
