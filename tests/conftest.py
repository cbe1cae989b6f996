"""Fixtures shared by all tests; torch is imported only by those that ask for a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
