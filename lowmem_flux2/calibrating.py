"""``lowmem-flux2 calibrate``: measure this machine, or fit it to reports, and write the profile that planning takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowmem_flux2.errors import UsageError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.detect import calibration_path, detect, find_card, identity_of, read_host
from lowmem_flux2.planning.fit import OVERHEADS, Accuracy, Observation, accuracy, fit
from lowmem_flux2.planning.flops import compute_rate, decode_flops
from lowmem_flux2.planning.hardware import Hardware, profile_text, value_of, with_value
from lowmem_flux2.planning.identity import Identity
from lowmem_flux2.planning.nvml import NvmlCard, card_processes
from lowmem_flux2.planning.plan import EVERY_STAGE, Stage
from lowmem_flux2.planning.profile_file import parse_file, rate_text
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.report import Report, read_report, write_atomically
from lowmem_flux2.runtime.calibrate import Calibrator, Measured
from lowmem_flux2.runtime.measurements import VAE_OF
from lowmem_flux2.runtime.picture import check_writable
from lowmem_flux2.units import MIB, format_bytes

LITTLE_READ_BYTES = 32 * MIB
"""A load that reads no more says the same with a warm page cache as with a cold one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for.

    Args:
        output: where to write; None for where ``--profile auto`` looks.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seconds: for all measurements.
        folder: on the disk to measure; None for the cache folder.
        reports: fit to the reports in this folder, and measure nothing.
        force: replace the file that is there.
    """

    output: Path | None
    device: str
    seconds: float
    folder: Path | None
    reports: Path | None
    force: bool


@dataclass(frozen=True, slots=True)
class _Here:
    """This machine, the device that it computes on, and what its provenance begins with."""

    device: str
    card: NvmlCard | None
    identity: Identity
    date: str


def calibrate(wanted: Wanted, out: Console) -> Path:
    """Measure or fit, print what was assumed beside it, and write the profile.

    Raises:
        UsageError: nothing to calibrate with, or a file in the way; before anything is measured.
    """
    card = find_card(wanted.device)
    device = "cpu" if card is None else wanted.device.replace("auto", "cuda")
    here = _Here(device, card, identity_of(card, read_host()), datetime.now(UTC).date().isoformat())
    path = _target(wanted, here.identity)
    found = _fitted(wanted.reports, here, out) if wanted.reports is not None else _measured(wanted, here, out)
    title = f"{here.identity}, calibrated {here.date}"
    text = profile_text(replace(found, calibrated=here.date), title, here.identity)
    parse_file(text, path)
    write_atomically(path, text)
    used = "--profile auto takes it from now on" if wanted.output is None else f"use it with --profile {path}"
    out.print(f"wrote {path}: {used}", soft_wrap=True)
    return path


def _target(wanted: Wanted, identity: Identity) -> Path:
    """The file to write; told about now what would stop it then."""
    path = wanted.output
    if path is None:
        path = calibration_path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable("--output", path)
    if path.exists() and not wanted.force:
        raise UsageError(f"{path} exists: replace it with --force, or write elsewhere with -o")
    return path


# ---------------------------------------------------------------------------------------------------------- measuring


def _measured(wanted: Wanted, here: _Here, out: Console) -> Hardware:
    """Measure everything; what could not be measured stays as the nearest profile assumes it."""
    assumed = detect(here.device, calibrated=False)
    with out.status("starting") as status:

        def tell(label: str, number: int, total: int) -> None:
            status.update(f"measuring {label} ({number} of {total})")
            if not out.is_terminal:
                out.print(f"measuring {label}")

        folder = wanted.folder or cache_folder()
        measured = Calibrator(here.device, assumed, folder, wanted.seconds, tell).run()
    source = f"measured {here.date} on {here.identity} with torch {metadata.version('torch')}: "
    found = combined(assumed, measured, source)
    if here.card is not None:
        found = _with_others(found, here.card, source, out)
    out.print(_comparison(assumed, found))
    for failure in measured.failures:
        out.print(f"not measured: {failure}", style="yellow", soft_wrap=True)
    return found


def combined(assumed: Hardware, measured: Measured, source: str) -> Hardware:
    """What was assumed, with every measured number in its place.

    The decoder's time becomes a share of the matmul rate; the overheads are fitted to the runs of the embedded model
    once the rates are known, so that they hold what the rates do not explain.

    Args:
        source: what each number's provenance begins with.
    """
    found = assumed
    for reading in measured.readings:
        found = with_value(found, reading.field, reading.value, source + reading.how)
    if found.h2d_pageable_bytes_per_s > found.h2d_pinned_bytes_per_s:  # one of the two is only assumed
        how = f"{found.provenance['h2d_pinned_bytes_per_s']}; no less than from pageable memory"
        found = with_value(found, "h2d_pinned_bytes_per_s", found.h2d_pageable_bytes_per_s, how)
    reserve = assumed.vram_reserve_bytes - assumed.context_bytes + found.context_bytes
    found = replace(found, vram_reserve_bytes=min(reserve, max(found.vram_bytes - MIB, 0)))
    if (decoded := measured.decoded) is not None:
        vae = spec_from_configs(VAE_OF, VAE_OF, shipped_configs(VAE_OF)).vae
        rate = decode_flops(vae, decoded.px, decoded.px) / decoded.timing.median_s
        words = f"the VAE's decoder in {decoded.dtype} at {decoded.px} px: {rate / 1e12:.4g} TFLOP/s, {decoded.timing}"
        found = with_value(found, "convolution_share", rate / compute_rate(found, decoded.dtype), source + words)
    runs = [one for number, report in enumerate(measured.runs) for one in observations_of(report, number == 0)]
    if runs:
        found = fit(found, runs, f"{source}{len(measured.runs)} runs of the embedded model", OVERHEADS).hardware
    return found


def _with_others(found: Hardware, card: NvmlCard, source: str, out: Console) -> Hardware:
    """Say who else is on the card, and how much of it is free for us, in the file and on the screen."""
    holding = found.vram_reserve_bytes - found.context_bytes
    names = [
        f"{one.name} (process {one.pid}) {'unknown' if one.used_bytes is None else format_bytes(one.used_bytes)}"
        for one in card_processes(card.uuid)
    ]
    others = ", ".join(names) or "no other process seen"
    out.print(
        f"VRAM: {format_bytes(found.vram_bytes - holding)} of {format_bytes(found.vram_bytes)} free for us; {others}",
        soft_wrap=True,
    )
    words = f"{source}context, and {format_bytes(holding)} that driver and others held ({others})"
    return with_value(found, "vram_reserve_bytes", found.vram_reserve_bytes, words)


def _comparison(assumed: Hardware, found: Hardware) -> Table:
    """Every number: what it was, and what it is; the file says how it was measured."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "assumed", "measured"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for field, source in found.provenance.items():
        if field == "compute_capability" or (found.device == "cpu" and field in _OF_A_GPU):
            continue
        before, after = (quantity(field, value_of(hardware, field)) for hardware in (assumed, found))
        table.add_row(field, before, after if source != assumed.provenance.get(field) else "-")
    return table


_OF_A_GPU = frozenset(
    {"vram_bytes", "vram_reserve_bytes", "context_bytes", "pinnable_bytes", "pin_bytes_per_s", "cuda_host_bytes"}
)


def quantity(field: str, value: float) -> str:
    """A number of ``Hardware`` for people, by the unit in its name."""
    if field.partition(".")[0].endswith("_bytes_per_s"):
        return rate_text(value)
    if "_flops_per_s" in field:
        return f"{value / 1e12:.3g} TFLOP/s"
    if field.endswith("_bytes"):
        return format_bytes(value)
    return f"{value * 1e3:.3g} ms" if field.endswith("_s") else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------ reports


def observations_of(report: Report, is_first: bool = True) -> Iterator[Observation]:
    """What a run says about the machine; nothing for a stage that ran out of memory, and was begun again, nor of
    upsampling, which is planned for texts as long as they may get.

    Loading says nothing where the page cache had what it read.
    """
    if report.spec is None:
        return
    for measured in report.stages:
        is_told = measured.stage != "upsample"
        if any(event.startswith(f"{measured.stage}: ") and "; going on with " in event for event in report.events):
            is_told = False
        if not is_told:
            continue
        stage = report.plan.stage(measured.stage)  # type: ignore[arg-type]
        planned, read = stage.cost.disk_bytes, measured.disk_read_bytes
        is_warm = planned > LITTLE_READ_BYTES and read is not None and read < planned / 2
        yield Observation(
            stage=stage,
            model=report.spec,
            workload=report.plan.workload,
            load_s=None if is_warm else measured.load_s,
            run_s=measured.time_s - measured.load_s,
            step_s=(measured.step_s or None) if measured.stage == "denoise" else None,
            is_first=is_first,
        )


def _fitted(folder: Path, here: _Here, out: Console) -> Hardware:
    """Fit this machine, as it is assumed or calibrated now, to the reports of runs on it.

    Raises:
        UsageError: no report of this machine; says why not, file by file.
    """
    assumed = detect(here.device)
    used, refused = read_reports(folder, here.identity)
    for reason in refused:
        out.print(f"not used: {reason}", style="yellow", soft_wrap=True)
    observations = [one for report in used for one in observations_of(report)]
    if not observations:
        raise UsageError(f"--from-reports {folder}: no report of a run on this machine, which is {here.identity}")
    result = fit(assumed, observations, f"fitted {here.date} to {len(used)} reports of {here.identity}")
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("constant", "before", "fitted"):
        table.add_column(heading, justify="left" if heading == "constant" else "right")
    for one in result.moved:
        table.add_row(one.name, quantity(one.name, one.before), quantity(one.name, one.after))
    out.print(f"{len(used)} reports used, {len(refused)} not")
    out.print(table)
    out.print(_errors(accuracy(assumed, observations), accuracy(result.hardware, observations)))
    return result.hardware


def read_reports(folder: Path, identity: Identity) -> tuple[list[Report], list[str]]:
    """The reports of runs on this machine, and a line for each JSON file that is none.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"--from-reports {folder}: there is no such folder")
    used: list[Report] = []
    refused: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = read_report(path)
        except UsageError as error:
            refused.append(str(error))
            continue
        if report.machine is None or report.spec is None:
            refused.append(f"{path}: it does not say on which machine, or with which model")
        elif report.machine != identity:
            refused.append(f"{path}: another machine's: {report.machine}")
        else:
            used.append(report)
    return used, refused


def _errors(before: Mapping[Stage, Accuracy], after: Mapping[Stage, Accuracy]) -> Table:
    """Predicted / measured seconds per stage, before and after the fit."""
    table = Table(show_edge=False, pad_edge=False, title="predicted / measured", title_justify="left")
    for heading in ("stage", "runs", "median before", "after", "worst before", "after"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in (stage for stage in EVERY_STAGE if stage in before):
        was, now = before[stage], after[stage]
        figures: Sequence[float] = (was.median, now.median, was.worst, now.worst)
        table.add_row(stage, str(was.count), *(f"{figure:.2f}" for figure in figures))
    return table
