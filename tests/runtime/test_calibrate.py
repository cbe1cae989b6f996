"""Calibration measures for real, within its time; what fails or has no time left keeps what was assumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from lowmem_flux2.calibrating import combined
from lowmem_flux2.errors import RunError
from lowmem_flux2.planning.activations import decode_activation_bytes
from lowmem_flux2.planning.detect import detect
from lowmem_flux2.planning.expansion import TRAFFIC
from lowmem_flux2.planning.hardware import Hardware, value_of
from lowmem_flux2.planning.sources import resolve_model, shipped_configs
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.runtime import measurements, transfers
from lowmem_flux2.runtime.calibrate import Calibrator, Measured
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.measurements import Bench, Reading, hidden_size

CPU = torch.device("cpu")
SMALL_FILE = 4 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a toy, so that every measurement is quick."""
    monkeypatch.setattr(measurements, "HIDDEN_SIZES", (256,))
    monkeypatch.setattr(transfers, "COPY_BYTES", SMALL_FILE)
    monkeypatch.setattr(transfers, "READ_BYTES", SMALL_FILE)
    monkeypatch.setattr(transfers, "LEAST_FILE_BYTES", 2 * SMALL_FILE)
    monkeypatch.setattr(transfers, "MOST_FILE_BYTES", 4 * SMALL_FILE)


@pytest.fixture
def assumed() -> Hardware:
    return detect("cpu", calibrated=False)


def bench(slice_s: float = 0.2) -> Bench:
    return Bench(CPU, "fp32", 256, slice_s)


def test_a_calibration_measures_everything(small: None, assumed: Hardware, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    calibrator = Calibrator("cpu", assumed, tmp_path / "new", 4, lambda *step: told.append(step))
    measured = calibrator.run()
    assert measured.failures == []
    assert [number for _, number, _ in told] == list(range(1, told[0][2] + 1))
    assert len(measured.runs) >= 2
    assert list((tmp_path / "new").iterdir()) == []  # the file of noise is gone
    found = combined(assumed, measured, "measured today: ")
    fields = [f"matmul_flops_per_s.{kind}" for kind in assumed.matmul_flops_per_s]
    fields += ["attention_flops_per_s", "convolution_share", "h2d_pageable_bytes_per_s", "disk_read_bytes_per_s"]
    fields += ["load_share", "libraries_host_bytes", "memory_bytes_per_s"]
    fields += [f"expand_bytes_per_s.{name}" for name in TRAFFIC]
    for field in fields:
        assert found.provenance[field].startswith("measured today: "), field
        assert value_of(found, field) > 0
    assert 100e6 < found.libraries_host_bytes < 4e9
    moved = [
        field
        for field in ("block_overhead_s", "stage_setup_s", "layer_overheads")
        if "embedded" in found.provenance[field]
    ]
    assert moved, "the embedded model told nothing"


@torch.no_grad()
def test_what_convolutions_hold_is_measured_and_is_what_the_decoder_takes(assumed: Hardware) -> None:
    """The full-size decoder at 192 px: every allocation that torch's profiler sees, kernels' own too."""
    dtype = "bf16" if "bf16" in assumed.matmul_flops_per_s else "fp32"  # elsewhere bf16 is only emulated
    copies = measurements.convolution_copies(Bench(CPU, dtype, 256)).value
    assert 0.9 < copies < 2.1
    side = 192
    config = dict(shipped_configs("flux2-klein-4b")["vae"])
    decoder = AutoencoderKLFlux2.from_config(config).decoder.to(DTYPES[dtype]).eval()
    latents = torch.randn(1, 32, side // 8, side // 8).to(DTYPES[dtype])
    peak = measurements.peak_bytes(partial(decoder, latents), CPU)
    spec = resolve_model("flux2-klein-4b").spec
    request = make_request(spec, ("x",), width=side, height=side)
    workload = workload_of(request, spec)
    predicted = decode_activation_bytes(spec.vae, workload, 0, DTYPES[dtype].itemsize, copies)
    assert predicted == pytest.approx(peak, rel=0.06)


def test_rates_are_of_the_right_size(assumed: Hardware) -> None:
    """Against a measurement of this test's own, in the same moment, within a factor of ten: no slip of a unit."""
    rows, weight = torch.randn(64, 256), torch.randn(9 * 256, 256)
    torch.nn.functional.linear(rows, weight)
    start, runs = time.perf_counter(), 20
    for _ in range(runs):
        torch.nn.functional.linear(rows, weight)
    mine = runs * 2 * 64 * 9 * 256**2 / (time.perf_counter() - start)
    theirs = measurements.matmul(bench(), "fp32").value
    assert 0.1 < theirs / mine < 10


def test_int8_and_attention_say_what_they_measured() -> None:
    assert "tokens x 256" in measurements.matmul(bench(), "int8").how
    assert "SDPA in fp32, 2 heads" in measurements.attention(bench()).how


def test_a_block_reaches_a_share_of_its_linears() -> None:
    reading = measurements.block_share(bench(), 1e6, 1e12)  # linears this slow hide the rest of the block
    assert reading.value == 1.0
    assert 0 < measurements.block_share(bench(), 1e14, 1e14).value < 0.5


def test_time_bounds_a_measurement() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.05)

    timing = bench(0.12).time(work)
    assert 1 <= timing.repeats <= 3
    assert timing.repeats == calls - 1
    calls = 0
    assert bench(0.01).time(work).repeats == calls == 1  # the warm-up took it all
    grown = bench(1)
    sizes: list[int] = []

    def sized(size: int) -> Callable[[], object]:
        sizes.append(size)
        return lambda: time.sleep(size * 1e-3)

    assert grown.grown(sized, 4, 100_000)[0] == sizes[-1]
    assert 4 < sizes[-1] < 1000


def test_hidden_sizes_follow_the_free_memory() -> None:
    assert hidden_size(torch.device("cuda"), 80 << 30) == 6144
    assert hidden_size(torch.device("cuda"), 4 << 30) == 4096
    assert hidden_size(CPU, 80 << 30) == 3072
    assert hidden_size(CPU, 1 << 30) == 1024


def test_one_failure_is_told_and_keeps_what_was_assumed(
    small: None, assumed: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Sequence[Reading]:
        raise RuntimeError("no such instruction\nat 0x7f")

    monkeypatch.setattr(measurements, "attention", fail)
    monkeypatch.setattr(Calibrator, "_embedded", fail)
    monkeypatch.setattr(measurements, "decode", fail)
    monkeypatch.setattr(transfers, "disk", fail)
    measured = Calibrator("cpu", assumed, tmp_path, 1.5).run()
    assert "attention: no such instruction" in measured.failures
    assert any("a whole block: needs the matmul and the attention rate" in line for line in measured.failures)
    found = combined(assumed, measured, "measured today: ")
    for field in ("attention_flops_per_s", "convolution_share", "disk_read_bytes_per_s", "block_overhead_s"):
        assert value_of(found, field) == value_of(assumed, field)
        assert found.provenance[field] == assumed.provenance[field]
    assert found.provenance["matmul_flops_per_s.fp32"].startswith("measured today: ")


def test_no_time_is_told(small: None, assumed: Hardware, tmp_path: Path) -> None:
    measured = Calibrator("cpu", assumed, tmp_path, -1).run()
    assert all("give more with --seconds" in line for line in measured.failures)
    assert combined(assumed, measured, "x").matmul_flops_per_s == assumed.matmul_flops_per_s


def test_a_disk_without_room_is_told(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MOST_FILE_BYTES", SMALL_FILE)
    with pytest.raises(RunError, match="has room for"):
        transfers.disk(bench(), tmp_path)


def test_a_disk_reading_says_how_cold_it_was(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = transfers.disk(bench(), tmp_path)
    assert "O_DIRECT" in read.how or "posix_fadvise" in read.how or "dropping caches" in read.how
    assert load.field == "load_share"
    monkeypatch.setattr(transfers, "_is_cached", lambda descriptor: True)
    monkeypatch.setattr(transfers, "_DROP_CACHES", tmp_path / "none" / "drop_caches")
    assert "could not be evicted" in transfers.disk(bench(), tmp_path)[1].how


def test_pageable_faster_than_what_is_assumed_of_pinned_lifts_it(assumed: Hardware) -> None:
    """A profile in which pageable copies are the faster ones would be refused."""
    measured = Measured([Reading("h2d_pageable_bytes_per_s", 2 * assumed.h2d_pinned_bytes_per_s, "copied")])
    found = combined(assumed, measured, "measured: ")
    assert found.h2d_pinned_bytes_per_s == found.h2d_pageable_bytes_per_s
