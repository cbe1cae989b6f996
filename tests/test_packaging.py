"""The wheel works from any directory: built, installed into a fresh environment, run from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_wheel_carries_profiles_configs_and_the_embedded_checkpoint(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        size = sum(item.file_size for item in archive.infolist() if "/assets/shapes/" in item.filename)
    assert {"lowmem_flux2/profiles/rtx-3060-12gb.toml", "lowmem_flux2/py.typed"} <= names
    assert "lowmem_flux2/assets/configs/flux2-dev/transformer/config.json" in names
    assert "lowmem_flux2/assets/shapes/model_index.json" in names
    assert not any(name.startswith(("tests/", "tools/", "benchmarks/")) for name in names)
    assert size < 12_000_000


def test_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)],
        check=True,
        capture_output=True,
    )
    # The dependencies (torch among them) are those of the environment that runs the tests; an editable install there is
    # not seen, since a .pth file inside a folder added by a .pth file is not read.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import lowmem_flux2; print(lowmem_flux2.__file__)").strip()
    assert Path(where).is_relative_to(home)
    assert "rtx-3060-12gb" in run(binaries / "lowmem-flux2", "profiles", "list")
    run(binaries / "lowmem-flux2", "plan", "-m", "flux2-dev", "--profile", "rtx-4090-24gb", "--max-ram", "96GiB")
    run(
        python,
        "-m",
        "lowmem_flux2",
        "generate",
        "-p",
        "a red circle in the center on a blue background",
        "--steps",
        "1",
    )
    assert len(list(elsewhere.glob("out_*.png"))) == 1
