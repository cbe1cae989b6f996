"""What the prepared store is known to hold, without torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_flux2.planning.job import plan_job, resolve_machine
from lowmem_flux2.planning.preparation import SPARE_BYTES
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import ModelSource, resolve_model
from lowmem_flux2.planning.workload import make_request
from lowmem_flux2.preparing import prepared_of, room_warning
from lowmem_flux2.units import format_bytes


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """Klein, as if its files lay in a folder."""
    return replace(resolve_model("flux2-klein-4b", offline=True), folder=tmp_path / "klein")


def entry(cache: Path, name: str, **manifest: object) -> None:
    folder = cache / "prepared" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_entries_of_this_model_are_found_by_their_manifests(tmp_path: Path, source: ModelSource) -> None:
    mine = {"component": "transformer", "weight_format": "int8", "dtype": "bf16", "source": str(source.folder)}
    entry(tmp_path, "a", **mine)
    entry(tmp_path, "b", **{**mine, "component": "text_encoder", "source": "/elsewhere"})
    entry(tmp_path, "c")
    entry(tmp_path, ".partial-d", **{**mine, "weight_format": "nf4"})
    assert set(prepared_of(source, tmp_path)) == {("transformer", "int8", "bf16")}
    assert not prepared_of(replace(source, folder=None), tmp_path)
    assert not prepared_of(source, tmp_path / "nothing")


def test_a_plan_says_what_is_left_to_prepare(tmp_path: Path, source: ModelSource) -> None:
    entry(tmp_path, "a", component="transformer", weight_format="int8", dtype="bf16", source=str(source.folder))
    request = make_request(source.spec, ("x",))
    selection = Selection(weight_format="int8", text_weight_format="int8")
    machine = resolve_machine("rtx-3060-12gb", "auto")
    before, after = (
        plan_job(source, machine, request, selection, prepared=prepared)
        for prepared in ((), prepared_of(source, tmp_path))
    )
    assert [each.component for each in before.preparations] == ["text_encoder", "transformer"]
    assert [each.component for each in after.preparations] == ["text_encoder"]


def test_a_plan_whose_store_finds_no_room_says_so(
    tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, machine = make_request(source.spec, ("x",)), resolve_machine("rtx-3060-12gb", "auto")
    plan = plan_job(source, machine, request, Selection(weight_format="int8", text_weight_format="bf16"))
    needed = sum(each.write_bytes for each in plan.preparations) + SPARE_BYTES
    for free, has_room in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        warning = room_warning(plan, tmp_path / "not" / "there" / "yet")
        assert has_room == (warning == "")
    assert format_bytes(needed) in warning
    assert "--cache-dir" in warning
    unquantized = plan_job(source, machine, request, Selection(weight_format="bf16", text_weight_format="bf16"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert room_warning(unquantized, tmp_path) == ""
