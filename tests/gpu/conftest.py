"""What needs a CUDA card: ``pytest -m gpu tests/gpu``. Elsewhere these files are not collected at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Look for a card only where these tests are asked for: every other run hides it, and should not import torch."""
    if config.option.markexpr == "gpu":
        import torch

        if torch.cuda.is_available():
            return None
    return True


@pytest.fixture(autouse=True)
def uncapped() -> Iterator[None]:
    """Leave no cap, no cached memory and no error behind."""
    import torch

    yield
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
