"""The suite for CUDA cards works: its parts on a CPU with toy shapes, its made-up weights, its meters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_smoke  # noqa: E402
from gpu import caps, compiled, disktier, parity, peers, ratio, recovery  # noqa: E402
from gpu.generated import GeneratedBlock, GeneratedStreamer, GeneratedTensors, Pieces  # noqa: E402
from gpu.meter import MeteredCuda, Meters  # noqa: E402
from gpu.record import Record, record_path  # noqa: E402
from gpu.running import Bench  # noqa: E402

from lowmem_flux2.errors import DoesNotFit  # noqa: E402
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


PARTS = (caps, compiled, disktier, parity, peers, ratio, recovery)
START_S = 25
"""A generous start of a worker on a card: imports, the context."""


def test_each_part_of_the_smoke_run_has_time_for_a_case(tmp_path: Path) -> None:
    bench = Bench(device="cpu", tiny=False, profile="auto", scratch=tmp_path, out=tmp_path)
    firsts = {part.__name__.rpartition(".")[2]: part.cases(bench)[0].guess_s for part in PARTS}
    assert {*gpu_smoke.SHARES, *gpu_smoke.BEYOND} == {*firsts, "tests"}
    assert [part for part, seconds in gpu_smoke.SHARES.items() if seconds < firsts[part] + START_S] == []
    assert sum(gpu_smoke.SHARES.values()) == gpu_smoke.BUDGET_S - gpu_smoke.ENDS_S


def test_the_smoke_run_keeps_its_time_and_goes_on_where_some_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of its own: the first part takes its share and is cut short, the others a second each."""
    now = [0.0]
    monkeypatch.setattr(gpu_smoke.time, "monotonic", lambda: now[0])
    given: list[tuple[str, float]] = []

    def run(part: str, seconds: float) -> dict[str, Any]:
        is_first = not given
        given.append((part, seconds))
        now[0] += seconds if is_first else 1.0
        return {"part": part, "cut_short": is_first, "passed": True}

    done = gpu_smoke.in_order(run, 0.0, 540.0, tmp_path, [])
    shares = gpu_smoke.SHARES
    assert [part for part, _ in given] == [*shares, *gpu_smoke.BEYOND, "parity"]
    assert given[0] == ("parity", shares["parity"])
    assert given[1] == ("caps", shares["caps"])
    assert given[2] == ("recovery", shares["recovery"] + shares["caps"] - 1)  # what caps left over too
    assert given[-1][1] == 540 - gpu_smoke.ENDS_S - now[0] + 1
    assert json.loads((tmp_path / "smoke.json").read_text()) == {"budget_s": 540.0, "parts": done}
    now[0] = 540.0 - gpu_smoke.ENDS_S - gpu_smoke.LEAST_S + 1
    assert gpu_smoke.in_order(run, 0.0, 540.0, tmp_path, []) == []  # too late to begin anything


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
    name = ratio.cases(bench)[0].name  # unquantized
    plain = run(ratio, bench, name)
    assert plain["over_unquantized"]["step"] == {}
    Record.open(record_path(bench.out, bench.machine.hardware.name, "ratio"), {}).add(name, "ran", plain)
    result = run(ratio, bench, "klein-9b-w8a8")
    assert result["bit_equal"] is True
    assert result["over_unquantized"]["step"].keys() == {"streamed", "resident"}
    resident = result["resident"]["step_median_s"] / plain["resident"]["step_median_s"]
    assert result["over_unquantized"]["step"]["resident"] == pytest.approx(resident)
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
    assert (
        error
        < {
            "plain": 1e-9,
            "int8": 0.02,
            "w8a8": 0.02,
            "int6": 0.04,
            "fp8": 0.2,
            "nf4": 0.15,
            "nf4-mixed": 0.15,
            "int4": 0.15,
        }[form]
    )
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


def test_resident_blocks_made_in_place_are_those_that_come_through_the_host() -> None:
    pieces = Pieces(piece_weights=1 << 10)
    holder = nn.ModuleDict({"proj": nn.Linear(64, 96, device="meta")})
    convert(holder, "nf4", torch.float32)
    block = GeneratedBlock.of(holder, "block.3.", torch.float32, pieces)
    streamer = GeneratedStreamer([holder], [block], [Placement.GPU], CPU, 1, 1)
    span = streamer._spans[0]
    loaded = span.clone()
    span.fill_(7)
    streamer._load_through_host([0])
    streamer.close()
    for place in block.layout.places:
        assert torch.equal(place.view(span), place.view(loaded))


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
