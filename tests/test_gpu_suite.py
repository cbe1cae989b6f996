"""The suite for CUDA cards works: its parts on a CPU with toy shapes, the supervisor over workers that misbehave."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu import caps, compiled, disktier, parity, peers, ratio, recovery  # noqa: E402
from gpu.generated import GeneratedBlock, GeneratedTensors, Pieces  # noqa: E402
from gpu.meter import MeteredCuda, Meters  # noqa: E402
from gpu.record import FINAL, Record, read_cases, record_path  # noqa: E402
from gpu.running import Bench  # noqa: E402
from gpu.supervise import Card, Supervisor, judged  # noqa: E402

from lowmem_flux2.errors import DoesNotFit, UsageError  # noqa: E402
from lowmem_flux2.planning.plan import Placement  # noqa: E402
from lowmem_flux2.runtime.layout import allocate  # noqa: E402
from lowmem_flux2.runtime.quantize import STORED, convert  # noqa: E402
from lowmem_flux2.runtime.streaming import BlockStreamer  # noqa: E402
from lowmem_flux2.runtime.transport import CudaTransport  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("suite")
    yield Bench(device="cpu", tiny=True, profile="auto", scratch=folder / "scratch", out=folder / "out")
    torch.set_num_threads(before)


def run(part: Any, bench: Bench, name: str) -> dict[str, Any]:
    """One case of a part, here; its figures must be JSON."""
    (case,) = [case for case in part.cases(bench) if case.name == name]
    result: dict[str, Any] = json.loads(json.dumps(case.run(bench)))
    assert result["line"]
    return result


# ------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("name", ["dev-nf4", "klein-4b-int4"])
def test_parity(name: str, bench: Bench) -> None:
    result = run(parity, bench, name)
    assert result["met"] is True
    assert set(result["variants"]) == set(parity.VARIANTS)
    assert 0.1 < result["deviation"] < 100  # latents that tell one weight from another


def test_parity_sees_a_wrong_byte(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read = GeneratedBlock.read_into

    def broken(block: GeneratedBlock, span: torch.Tensor, direct: bool = False) -> None:
        read(block, span, direct)
        span[len(span) // 2] ^= direct << 3  # in blocks that are read from disk

    monkeypatch.setattr(GeneratedBlock, "read_into", broken)
    result = run(parity, bench, "dev-int8")
    assert result["met"] is False
    wrong = [name for name, variant in result["variants"].items() if not variant["bit_equal"]]
    assert wrong == ["disk", "mixed"]


def test_caps_put_predicted_beside_measured(bench: Bench) -> None:
    result = run(caps, bench, "klein-9b-2gib")
    assert result["met"] is True
    assert [stage["stage"] for stage in result["stages"]] == ["encode", "denoise", "decode"]
    for stage in result["stages"]:
        assert stage["predicted"]["peak_ram_bytes"] > 0
        assert stage["measured"]["peak_ram_bytes"] > 0
    assert len(result["step_s"]) == result["steps"] == caps.STEPS["klein-9b"]
    assert min(result["step_s"]) > 0


def test_a_cap_that_is_too_small_is_a_result(bench: Bench) -> None:
    with pytest.raises(DoesNotFit):
        run(caps, bench, "dev-0.0625gib")


def test_ratio(bench: Bench) -> None:
    result = run(ratio, bench, "klein-9b-int8")
    assert result["bit_equal"] is True
    assert result["ratio"] == pytest.approx(
        result["streamed"]["step_median_s"] / result["resident"]["step_median_s"], rel=1e-6
    )
    (stage,) = [stage for stage in result["streamed"]["stages"] if stage["stage"] == "denoise"]
    blocks = stage["placements"]["pinned"]
    assert stage["transfers"]["copies"] == blocks * ratio.STEPS
    assert stage["transfers"]["h2d_bytes"] > 0
    assert stage["transfers"]["bytes_per_s"] > 0
    assert result["resident"]["stages"][0]["transfers"]["copies"] == 0


def test_peers_and_ours_do_the_same_work(bench: Bench) -> None:
    first = "klein-9b-block-stream-record"
    with pytest.raises(RuntimeError, match="not on record"):
        run(peers, bench, f"ours-at-{first}")
    record = Record.open(record_path(bench.out, bench.machine.hardware.name, "peers"), {})
    for name in (first, "klein-9b-model", "dev-block-stream-record"):
        result = run(peers, bench, name)
        assert len(result["later_step_s"]) == peers.STEPS - 1
        record.add(name, "ran", result)
    for name in (first, "dev-block-stream-record"):
        assert run(peers, bench, f"ours-at-{name}")["latents_equal_peers"] is True


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_recovery(stage: str, bench: Bench) -> None:
    result = run(recovery, bench, f"klein-4b-{stage}")
    assert result["met"] is True
    assert result["ran_out"] == 1
    assert result["bit_equal_picture"] is (stage != "decode") or result["largest_picture_difference"] < 0.1


def test_disk_tier(bench: Bench) -> None:
    first, again = (run(disktier, bench, "klein-9b-int8") for _ in range(2))
    assert first["met"] is again["met"] is True
    assert first["written"]["bytes"] == first["streamed_bytes_per_step"]
    assert again["written"] is None  # once


def test_disk_tier_keeps_to_its_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disktier, "MOST_BYTES", 1000)
    with pytest.raises(DoesNotFit, match="DISK"):
        run(disktier, bench, "dev-nf4")


def test_compiled_blocks(bench: Bench) -> None:
    result = run(compiled, bench, "klein-9b-int8")
    assert result["bit_equal_streamed"] is True
    assert result["relative_difference_to_eager"] < 0.01


# -------------------------------------------------------------------------------------------------- made-up weights


@pytest.mark.parametrize("form", ["plain", *STORED])
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (1000, 96), (7, 128)])
def test_stored_tensors_of_a_weight_belong_together(form: str, rows: int, columns: int) -> None:
    """Expanding what was filled in gives rows of the piece's own weights: scales and packed values are not shifted."""
    pieces = Pieces(seed=1, piece_weights=1 << 10)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    holder = nn.ModuleDict({"proj": linear})
    convert(holder, form, torch.float32)
    block = GeneratedBlock.of(holder, "block.3.", torch.float32, pieces)
    span = allocate(block.layout.total_bytes, CPU)
    block.read_into(span)
    piece = pieces.get("plain", columns, torch.float32)
    start = piece.start("block.3.proj.weight" if form == "plain" else "block.3.proj")
    expected = piece.tensors["weight"][(torch.arange(rows) + start) % piece.rows]
    streamer = BlockStreamer([holder], [block], [Placement.GPU], CPU, 1, 1)
    (loaded,) = streamer.round()
    found = loaded["proj"].weight if form == "plain" else loaded["proj"].dequantize()
    error = float((found - expected).norm() / expected.norm())
    assert error < {"plain": 1e-9, "int8": 0.02, "fp8": 0.2, "nf4": 0.15, "int4": 0.15}[form]
    streamer.close()


def test_weights_are_the_same_at_every_reading_and_differ_between_blocks() -> None:
    def spans(seed: int) -> list[torch.Tensor]:
        pieces = Pieces(seed, piece_weights=1 << 12)
        made = []
        for prefix in ("blocks.0.", "blocks.1.", "blocks.0."):
            module = nn.Sequential(nn.Linear(64, 512, bias=False, device="meta"))
            block = GeneratedBlock.of(module, prefix, torch.bfloat16, pieces)
            made.append(allocate(block.layout.total_bytes, CPU))
            block.read_into(made[-1])
        return made

    first, second, again = spans(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, spans(1)[0])


def test_token_rows_are_those_of_the_whole_embedding() -> None:
    tensors = GeneratedTensors(Pieces(piece_weights=1 << 10), columns=32)
    whole = torch.empty(1500, 32)
    tensors.read_into("model.embed_tokens.weight", whole)
    rows = torch.tensor([0, 3, 1499, 700])
    assert torch.equal(tensors.read_rows("model.embed_tokens.weight", rows, torch.float32), whole[rows])


def test_norms_and_biases_change_nothing() -> None:
    pieces = Pieces(piece_weights=1 << 10)
    for name, value in (("norm.weight", 1.0), ("conv.bias", 0.0), ("bn.running_mean", 0.0), ("bn.running_var", 1.0)):
        made = torch.full((5,), 7.0)
        pieces.fill_plain(name, made)
        assert made.tolist() == [value] * 5


def test_meters_count_copies_and_waits_after_loading() -> None:
    pieces, meters = Pieces(piece_weights=1 << 10), Meters()
    with init_empty_weights():
        blocks = [nn.Linear(64, 64, bias=False) for _ in range(3)]
    sources = [GeneratedBlock.of(block, f"{index}.", torch.float32, pieces) for index, block in enumerate(blocks)]
    placements = [Placement.PINNED, Placement.DISK, Placement.PAGEABLE]
    streamer = BlockStreamer(blocks, sources, placements, CPU, 2, 4, transport=meters.transport("denoise", CPU))
    meters.restart("denoise")
    for _ in range(4):
        list(streamer.round())
    streamer.close()
    found = meters.transfers("denoise")
    assert found is not None
    assert found.copies == 4 * 2  # on a CPU, disk blocks are read straight into their slot
    assert found.h2d_bytes == 4 * 2 * 64 * 64 * 4
    assert found.copy_s > 0
    assert found.host_waited_s > 0
    assert found.bytes_per_s == found.h2d_bytes / found.copy_s
    assert meters.transfers("decode") is None


class Queue:
    """A stand-in for a CUDA stream: how far it has come, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def wait_event(self, event: Moment) -> None:
        self.now = max(self.now, event.at)


class Moment:
    """A stand-in for a CUDA event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at = 0.0

    def record(self, queue: Queue) -> None:
        self.at = queue.now

    def elapsed_time(self, later: Moment) -> float:
        return 1000 * (later.at - self.at)


def test_the_cuda_meter_times_copies_and_the_compute_streams_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, copies = Queue(), Queue()
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)

    def copy(self: CudaTransport, source: torch.Tensor, target: torch.Tensor) -> None:
        copies.now += 0.5

    monkeypatch.setattr(CudaTransport, "copy", copy)
    meter = MeteredCuda(torch.device("cuda"))
    copied, freed = meter.event(), meter.event()
    span = torch.zeros(1000, dtype=torch.uint8)
    for _ in range(3):  # the copy takes 0.5 s, the kernels that need it 0.3 s and hold up the next copy
        meter.copy_waits(freed)
        meter.copy(span, span)
        meter.record_copy(copied)
        meter.compute_waits(copied)
        compute.now += 0.3
        meter.record_compute(freed)
    found = meter.counts.transfers()
    assert (found.copies, found.h2d_bytes) == (3, 3000)
    assert found.copy_s == pytest.approx(1.5)
    assert found.compute_waited_s == pytest.approx(1.5)
    assert found.bytes_per_s == pytest.approx(2000)


# ---------------------------------------------------------------------------------------------------- the supervisor

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
    assert record["versions"]["torch"] == torch.__version__
    assert record["tiny"] is True
    assert [case["case"] for case in record["cases"]] == ["klein-4b-2gib", "klein-4b-0.0625gib"]
