"""The bench of memory against latency: runs under falling caps, recorded as they come, beside what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, runner
from PIL import Image

from lowmem_flux2 import bench
from lowmem_flux2.arguments import resolve, selection_of
from lowmem_flux2.flags import FitFlags, RequestFlags

FLAGS = ("-m", "shapes", "--steps", "2", "--dtype", "fp32", "--weight-format", "fp32", "-o", "results")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capfd)


def test_caps_that_make_a_difference_are_run_compared_and_kept(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, fit = RequestFlags(steps=2), FitFlags(dtype="fp32", weight_format="fp32")
    asked = resolve(flags, fit, selection_of(fit), ("x",))
    least, most = bench.caps_of(asked, "fp32", 2)
    assert least < most
    ample = str(most + (64 << 20))
    ran = run("bench", *FLAGS, "--cap", "1MiB", "--cap", str(least), "--cap", ample)
    assert ran.code == 0, ran.err
    record = json.loads((here / "results" / "bench.json").read_text())
    too_small, lean, fast = record["results"]
    assert "does not fit" in too_small["failure"]
    assert lean["failure"] is None and fast["failure"] is None
    assert lean["blocks"] == "0/0/0/6" != fast["blocks"]
    assert lean["pixels_sha256"] == fast["pixels_sha256"]
    assert lean["predicted_peak_bytes"] <= least
    assert min(lean["step_s"], fast["step_s"], lean["measured_peak_bytes"], fast["predicted_step_s"]) > 0
    with Image.open(here / "results" / "bench.png") as picture:
        assert picture.width > 400

    monkeypatch.setattr(bench, "_run", lambda *_: pytest.fail("was run again"))
    again = run("bench", *FLAGS, "--cap", str(least), "--cap", ample)
    assert again.code == 0, again.err
    other = run("bench", *FLAGS, "--seed", "1", "--cap", str(least))
    assert other.code == 2 and "bench.json is of another bench" in other.err


def test_a_bench_in_which_nothing_fits_fails(here: Path, run: Run) -> None:
    ran = run("bench", *FLAGS, "--cap", "1MiB")
    assert ran.code == 5 and "does not fit" in ran.err
    assert "does not fit" in json.loads((here / "results" / "bench.json").read_text())["results"][0]["failure"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt-file", "p.txt"), "--prompt-file goes with --fidelity"),
        (("--cap", "8 apples"), "--cap: "),
        (("--cap", "1GiB", "--max-ram", "2GiB"), "--cap and --max-ram cap the same memory"),
        (("--fidelity", "--cap", "1GiB"), "--cap is of the other bench"),
        (("--fidelity", "--weight-format", "int8"), "bench --fidelity takes -m"),
        (("--max-vram", "1GiB"), "there is no VRAM on the cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str, ...], said: str, here: Path, run: Run) -> None:
    ran = run("bench", "-o", "results", *arguments)
    assert ran.code == 2 and said in ran.err, ran.err
    assert not (here / "results").exists()
