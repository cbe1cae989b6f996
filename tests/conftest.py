"""Fixtures shared by all tests; torch is imported only by those that ask for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "200"  # consoles are made at import, by whichever test is first
os.environ["LOWMEM_FLUX2_PROMPT_CACHE"] = "off"  # tests of encoding encode; those of the cache turn it on


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU: tests compare with CPU pipelines. Those that need one are in tests/gpu, run with ``-m gpu``."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures that outlive a test: never the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_FLUX2_CACHE", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; subprocesses inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOWMEM_FLUX2_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 FLUX.2 dev checkpoint, toy-sized. Shared: do not write into it."""
    import tiny

    return tiny.write_dev(tmp_path_factory.mktemp("tiny") / "dev")


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 FLUX.2 klein base checkpoint (two guidance passes), toy-sized. Shared: do not write into it."""
    import tiny

    return tiny.write_klein(tmp_path_factory.mktemp("tiny") / "klein")


@pytest.fixture(scope="session")
def tiny_klein_distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 FLUX.2 klein distilled checkpoint, toy-sized. Shared: do not write into it."""
    import tiny

    return tiny.write_klein(tmp_path_factory.mktemp("tiny") / "klein-distilled", is_distilled=True)
