"""``lowmem-flux2 calibrate`` as a user meets it, and fits to the reports of real tiny runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import median

import pytest
from command_line import Run, runner

from lowmem_flux2.calibrating import quantity
from lowmem_flux2.planning.detect import calibration_path, detect, identify
from lowmem_flux2.planning.fit import accuracy, fit
from lowmem_flux2.planning.hardware import check_profile
from lowmem_flux2.planning.identity import Identity


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder, measuring at the shapes of a toy."""
    from lowmem_flux2.runtime import measurements, transfers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(measurements, "HIDDEN_SIZES", (256,))
    monkeypatch.setattr(transfers, "COPY_BYTES", 1 << 22)
    monkeypatch.setattr(transfers, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(transfers, "LEAST_FILE_BYTES", 1 << 23)
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    """Reports of real runs of two small models at a few sizes, and of some other things."""
    from lowmem_flux2 import Engine
    from lowmem_flux2.report import write_report

    folder = tmp_path_factory.mktemp("reports")
    for model, sides in (("shapes", (64, 96)), (str(tiny_klein), (64, 128))):
        engine = Engine(model, device="cpu", prompt_cache="off")
        for side in sides:
            for turn in range(2):
                made = engine.generate(
                    "a cat", width=side, height=side, num_inference_steps=3, seed=0, output_type="pt"
                )
                write_report(made.report, folder / f"{Path(model).name}-{side}-{turn}.json")
    return folder


def test_calibrate_writes_a_profile_that_auto_finds(run: Run) -> None:
    """One path through the command: measured, told, checked, found, and not overwritten."""
    ran = run("calibrate", "--device", "cpu", "--seconds", "2")
    assert ran.code == 0, ran
    identity = identify("cpu")
    assert identity is not None
    path = calibration_path(identity)
    for words in ("matmul_flops_per_s.fp32", "disk_read_bytes_per_s", str(path), "--profile auto takes it"):
        assert words in ran.out
    hardware = check_profile(path)
    assert detect("cpu").calibrated == hardware.calibrated != ""
    assert f"calibrated {hardware.calibrated}" in run("plan", "--device", "cpu").out
    assert "is a valid cpu profile" in run("profiles", "check", str(path)).out
    assert f"calibrated {hardware.calibrated}" in run("doctor").out
    again = run("calibrate", "--device", "cpu", "--seconds", "2")
    assert again.code == 2
    assert "--force" in again.err


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("expand_bytes_per_s.int8", 4.3e9, "4.3 GB/s"),
        ("disk_read_bytes_per_s", 1e9, "1 GB/s"),
        ("matmul_flops_per_s.bf16", 4.02e11, "0.402 TFLOP/s"),
        ("stage_setup_s", 0.02, "20 ms"),
        ("convolution_copies", 2.0, "2"),
    ],
)
def test_every_number_has_its_unit(field: str, value: float, text: str) -> None:
    assert quantity(field, value) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "there.toml"], "there.toml exists: replace it with --force"),
        (["-o", "no/such/folder.toml"], "there is no folder no/such"),
        (["-o", "folder"], "this is a folder"),
        (["--device", "cuda:7"], "cuda:7 is not there"),
        (["--device", "tpu"], "is not a device"),
        (["--from-reports", "nowhere"], "there is no such folder"),
        (["--from-reports", "folder"], "no report of a run on this machine"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "there.toml").write_text("mine")
    (tmp_path / "folder").mkdir()
    ran = run("calibrate", *arguments)
    assert ran.code == 2, ran
    assert said in ran.err
    assert "measuring" not in ran.out
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_a_fit_to_real_runs_predicts_them_better(reports: Path) -> None:
    """Over all stages of two models: the median error of a prediction falls, and is below a factor of two."""
    from lowmem_flux2.calibrating import observations_of, read_reports

    identity = identify("cpu")
    assert identity is not None
    used, refused = read_reports(reports, identity)
    assert (len(used), refused) == (8, [])
    observations = [one for report in used for one in observations_of(report)]
    assert len(observations) == 24
    assert all(one.step_s for one in observations if one.stage.stage == "denoise")
    assumed = detect("cpu", calibrated=False)
    fitted = fit(assumed, observations, "fitted").hardware
    before, after = (
        median(abs(log(one.median)) for one in accuracy(hardware, observations).values())
        for hardware in (assumed, fitted)
    )
    assert after < before
    assert after < log(2)


def test_from_reports_uses_this_machines_only(run: Run, reports: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(reports, tmp_path / "mixed"))
    first, second, third, *_ = sorted(mixed.iterdir())
    foreign = json.loads(first.read_text())
    foreign["machine"]["cpu"] = "Intel 8086"
    first.write_text(json.dumps(foreign))
    second.write_text(json.dumps({"results": []}))
    unknown = json.loads(third.read_text())
    unknown["machine"] = None
    third.write_text(json.dumps(unknown))
    ran = run("calibrate", "--device", "cpu", "--from-reports", str(mixed), "-o", "my.toml")
    assert ran.code == 0, ran
    for words in ("5 reports used, 3 not", "another machine's: Intel 8086", "not a report", "does not say on which"):
        assert words in ran.out
    for stage in ("encode", "denoise", "decode"):
        assert stage in ran.out
    found = check_profile(tmp_path / "my.toml")
    assert found.calibrated
    assert any(source.startswith("fitted ") and "to 5 reports of" in source for source in found.provenance.values())


def test_a_stage_that_ran_out_of_memory_says_nothing(reports: Path) -> None:
    from lowmem_flux2.calibrating import observations_of
    from lowmem_flux2.report import read_report

    report = read_report(sorted(reports.iterdir())[0])
    event = "denoise: out of memory (CUDA); going on with 3 of 5 blocks resident"
    stages = [one.stage.stage for one in observations_of(replace(report, events=(event,)))]
    assert stages == ["encode", "decode"]
    assert list(observations_of(replace(report, spec=None))) == []


def test_a_warm_page_cache_says_nothing_about_loading(reports: Path) -> None:
    from lowmem_flux2.calibrating import observations_of
    from lowmem_flux2.report import read_report

    report = read_report(sorted(reports.iterdir())[0])
    plan = report.plan
    large = replace(plan.stage("denoise"), cost=replace(plan.stage("denoise").cost, disk_bytes=1 << 30))
    plan = replace(plan, stages=(plan.stages[0], large, plan.stages[2]))
    for read, known in ((0, False), (1 << 30, True), (None, True)):
        measures = tuple(replace(one, disk_read_bytes=read) for one in report.stages)
        denoise = list(observations_of(replace(report, plan=plan, stages=measures)))[1]
        assert (denoise.load_s is not None) is known


def test_a_report_says_where_it_ran_and_reads_back(reports: Path) -> None:
    from lowmem_flux2.report import read_report

    report = read_report(sorted(reports.iterdir())[0])
    assert report.machine == identify("cpu")
    assert report.spec is not None
    assert report.spec.transformer.num_double >= 1
    assert Identity("a", 1) != report.machine
