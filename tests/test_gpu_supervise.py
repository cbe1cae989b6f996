"""The suite's supervisor over workers that misbehave, and the script as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu.record import FINAL, Record, read_cases, record_path  # noqa: E402
from gpu.supervise import Card, Supervisor, judged  # noqa: E402

from lowmem_flux2.errors import UsageError  # noqa: E402

WORKER = """
import json, os, signal, sys, time
channel = int(sys.argv[sys.argv.index("--channel") + 1])
def say(answer):
    os.write(channel, (json.dumps(answer) + chr(10)).encode())
names = sys.argv[1].split(",")
if names != ["mute"]:
    say({"cases": [{"name": n, "guess_s": 500 if n == "long" else 0.1, "timeout_s": 0.5 if n == "late" else 60,
                    "alone": n.startswith("alone")} for n in names],
         "versions": {}, "card": None})
for line in sys.stdin:
    name = line.strip()
    if name == "fails":
        say({"status": "failed", "error": "trace", "line": "ValueError: no"})
        sys.exit(1)
    if name == "exits":
        sys.exit(3)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("late", "slow"):
        time.sleep(60)
    say({"status": "does not fit" if name == "large" else "ran", "seconds": 0.01, "line": "done", "pid": os.getpid(),
         "met": name != "misses"})
"""


def supervise(folder: Path, names: str, seconds: float = 60.0, only: tuple[str, ...] = ()) -> Supervisor:
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    record = Record.open(record_path(folder, "toy", "part"), {"part": "part"})
    command = [sys.executable, str(script), names]
    made = Supervisor(command, record, Card(None), folder / "log", time.monotonic() + seconds, only)
    made.run()
    return made


def statuses(folder: Path) -> dict[str, str]:
    return {case["case"]: case["status"] for case in read_cases(record_path(folder, "toy", "part"))}


def test_every_end_of_a_case_is_on_record(tmp_path: Path) -> None:
    made = supervise(tmp_path, "good,fails,exits,killed,late,large,misses,alone-a,alone-b,last")
    assert statuses(tmp_path) == {
        "good": "ran",
        "fails": "failed",
        "exits": "crashed",
        "killed": "killed for RAM",
        "late": "timed out",
        "large": "does not fit",
        "misses": "ran",
        "alone-a": "ran",
        "alone-b": "ran",
        "last": "ran",
    }
    assert not made.cut_short
    cases = {case["case"]: case for case in read_cases(record_path(tmp_path, "toy", "part"))}
    pids = [cases[name]["pid"] for name in ("large", "misses", "alone-a", "alone-b", "last")]
    assert pids[0] == pids[1]  # one process serves many cases
    assert len(set(pids)) == 4  # but what is to be alone is
    assert cases["good"]["ram_taken_peak_bytes"] >= 0
    assert cases["exits"]["line"] == "exit code 3"
    assert Record.open(record_path(tmp_path, "toy", "part"), {}).missed == ["misses"]


def test_a_later_call_goes_on_with_what_has_no_result(tmp_path: Path) -> None:
    supervise(tmp_path, "good,fails,killed")
    before = {case["case"]: case for case in read_cases(record_path(tmp_path, "toy", "part"))}
    supervise(tmp_path, "good,fails,killed,more")
    after = {case["case"]: case for case in read_cases(record_path(tmp_path, "toy", "part"))}
    assert after["good"] == before["good"]
    assert after["killed"] == before["killed"]
    assert after["more"]["status"] == "ran"
    assert list(after) == ["good", "killed", "fails", "more"]  # what failed was run again


def test_no_case_is_begun_that_cannot_end_and_none_goes_on_past_the_deadline(tmp_path: Path) -> None:
    start = time.monotonic()
    made = supervise(tmp_path, "good,long,slow,never", seconds=2.0)
    assert time.monotonic() - start < 5
    assert made.cut_short
    assert statuses(tmp_path) == {"good": "ran", "slow": "cut short"}
    assert "cut short" not in FINAL
    supervise(tmp_path, "good,never", seconds=60)
    assert statuses(tmp_path)["never"] == "ran"


def test_no_worker_is_started_when_its_start_takes_what_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Supervisor._start

    def slow(supervisor: Supervisor) -> list[dict[str, Any]] | None:
        listed = start(supervisor)
        supervisor._start_s = 1000.0
        return listed

    monkeypatch.setattr(Supervisor, "_start", slow)
    made = supervise(tmp_path, "good,alone-b,last")
    assert made.cut_short
    assert statuses(tmp_path) == {"good": "ran", "last": "ran"}


def test_a_case_that_takes_the_machines_ram_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter((30 << 30, 20 << 30, 10 << 30, 1 << 29))
    monkeypatch.setattr("gpu.supervise.available_ram_bytes", lambda: next(left, 30 << 30))
    supervise(tmp_path, "slow,good", seconds=20)
    assert statuses(tmp_path) == {"slow": "killed for RAM", "good": "ran"}


def test_a_cap_is_judged_by_what_the_card_held() -> None:
    result = {"met": True, "cap_bytes": 4 << 30, "line": "step"}
    assert judged(result | {"card_taken_peak_bytes": 4 << 30})["met"] is True
    over = judged(result | {"card_taken_peak_bytes": (4 << 30) + 1})
    assert (over["met"], over["within_cap"]) == (False, False)
    assert over["line"].endswith("the card held 4.00 GiB, MORE THAN THE CAP")
    assert judged(result | {"card_taken_peak_bytes": None}) == result | {"card_taken_peak_bytes": None}


def test_only_the_cases_asked_for(tmp_path: Path) -> None:
    supervise(tmp_path, "good,other", only=("other",))
    assert statuses(tmp_path) == {"other": "ran"}


def test_a_worker_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.supervise.START_S", 0.3)
    with pytest.raises(RuntimeError, match="did not start"):
        supervise(tmp_path, "mute")


def test_a_file_that_is_no_record_is_left_alone(tmp_path: Path) -> None:
    path = record_path(tmp_path, "toy", "part")
    path.write_text("[]")
    with pytest.raises(UsageError, match="not a record"):
        Record.open(path, {})
    assert path.read_text() == "[]"


# ------------------------------------------------------------------------------------------------------ all together


def test_the_script_prints_a_line_a_case_and_a_json_line_a_part(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--device", "cpu", "--tiny"]
    command += ["--part", "caps", "--only", "klein-4b-2gib", "klein-4b-0.0625gib", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.startswith("klein-4b-2gib: ran: ")
    assert second.startswith("klein-4b-0.0625gib: does not fit: ")
    summary = json.loads(last)
    assert (summary["part"], summary["counts"]) == ("caps", {"ran": 1, "does not fit": 1})
    record = json.loads((tmp_path / f"{summary['machine']}-caps.json").read_text())
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["tiny"] is True
    assert [case["case"] for case in record["cases"]] == ["klein-4b-2gib", "klein-4b-0.0625gib"]


def test_the_smoke_run_writes_what_each_part_came_to(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_smoke.py"), "--device", "cpu", "--tiny"]
    command += ["--only", "recovery", "--budget", "100", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert found["budget_s"] == 100
    assert [(part["part"], part["counts"], part["passed"]) for part in found["parts"]] == [
        ("recovery", {"ran": 3}, True)
    ]
