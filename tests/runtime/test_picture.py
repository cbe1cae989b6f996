"""Pictures on disk: names, metadata, and never over another file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowmem_flux2 import Engine
from lowmem_flux2.errors import UsageError
from lowmem_flux2.runtime import picture
from lowmem_flux2.runtime.picture import OutputPattern, describe, save_png

METADATA = {"prompt": "ein roter Kreis – 赤い円", "seed": "7", "model": "shapes"}


def plain(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 0, 0))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{steps}.png", "unknown field {steps}; known: {seed}, {index}, {model}"),
        ("{}.png", "unknown field {}"),
        ("{seed:05d}.png", "unknown field {seed}"),
        ("{seed!r}.png", "unknown field {seed}"),
        ("{seed.real}.png", "unknown field {seed.real}"),
        ("out_{seed.png", "expected '}'"),
        ("out}.png", "Single '}'"),
        ("out.jpg", "pictures are written as .png"),
        ("out", "pictures are written as .png"),
        (".png", "pictures are written as .png"),
        ("absent/out.png", "there is no folder absent; create it first"),
    ],
)
def test_refuses_a_pattern_it_cannot_honour(
    pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        OutputPattern(pattern)
    assert str(caught.value).startswith(f"--output {pattern}: ")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root can write to")
def test_refuses_a_folder_it_cannot_write_to() -> None:
    with pytest.raises(UsageError, match="the folder /proc cannot be written to"):
        OutputPattern("/proc/{seed}.png")


def test_fills_in_seed_index_and_model(tmp_path: Path) -> None:
    pattern = OutputPattern(f"{tmp_path}/{{model}}_{{seed}}_{{index}}.PNG")
    assert pattern.path(seed=7, index=2, model="org/name") == tmp_path / "org--name_7_2.PNG"
    assert OutputPattern("{{{seed}}}.png").path(seed=7, index=0, model="m") == Path("{7}.png")


def test_makes_a_folder_named_by_a_field(tmp_path: Path) -> None:
    path = OutputPattern(f"{tmp_path}/{{model}}/{{seed}}.png").path(seed=7, index=0, model="shapes")
    assert save_png(plain(), path, {}) == tmp_path / "shapes" / "7.png"


# --- files ----------------------------------------------------------------------------------------------------------


def test_metadata_is_read_back_by_pil(tmp_path: Path) -> None:
    saved = save_png(plain(9), tmp_path / "out.png", METADATA)
    with Image.open(saved) as read:
        assert read.text == METADATA  # type: ignore[attr-defined]
        assert read.tobytes() == plain(9).tobytes()
    assert names(tmp_path) == {"out.png"}


def test_without_metadata_nothing_is_written_of_it(tmp_path: Path) -> None:
    with Image.open(save_png(plain(), tmp_path / "out.png", {})) as read:
        assert read.text == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_never_overwrites(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    (tmp_path / "out_2.png").write_text("another's")
    saved = [save_png(plain(shade), tmp_path / "out.png", {}).name for shade in range(3)]
    assert saved == ["out.png", "out_3.png", "out_4.png"]
    assert (tmp_path / "out_2.png").read_text() == "another's"
    assert names(tmp_path) == {*saved, "out_2.png"}


def refuse_links(source: object, target: object) -> None:
    raise PermissionError("no hard links here")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_threads_that_save_at_once_each_get_a_file(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(lambda shade: save_png(plain(shade), tmp_path / "out.png", {}), range(24)))
    assert len(set(saved)) == 24
    assert set(tmp_path.iterdir()) == set(saved)  # nor is a temporary file left
    for shade, path in enumerate(saved):
        with Image.open(path) as read:
            assert read.getpixel((0, 0)) == (shade, 0, 0)


@pytest.mark.parametrize("broken", ["save", "link"])
def test_leaves_nothing_behind_on_failure(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if broken == "save":
        monkeypatch.setattr(Image.Image, "save", full)
    else:
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(picture.Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(plain(), tmp_path / "out.png", METADATA)
    assert not names(tmp_path)


# --- of an engine ---------------------------------------------------------------------------------------------------


def test_same_seed_and_plan_give_the_same_file(tiny_klein: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    engine = Engine(str(tiny_klein), dtype="fp32")
    request = engine.request("a red circle", **asked)
    plan = engine.plan(request)
    contents = []
    for run, seed in enumerate((5, 5, 6)):
        made = engine.generate("a red circle", **asked, seed=seed, plan=plan)
        texts = describe(request, made.report.plan, made.report.images[0], made.report.versions)
        saved = save_png(made.images[0], tmp_path / f"{run}.png", texts)
        contents.append(saved.read_bytes())
        with Image.open(saved) as read:
            assert read.size == (64, 64)
            assert read.text == texts  # type: ignore[attr-defined]
            assert read.text["seed"] == str(seed)  # type: ignore[attr-defined]
            assert read.text["plan"] == plan.digest  # type: ignore[attr-defined]
    assert contents[0] == contents[1] != contents[2]
