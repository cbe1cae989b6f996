"""Fixtures of the runtime tests: one thread, a cheap gc, and the stock pipelines, each loaded once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lowmem_flux2.runtime.engine  # noqa: F401  # imported before the freeze

Stock = Callable[[str, str], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, so that runs beside other work stay quick; and what is imported by now is left out of each gc."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tiny_dev: Path, tiny_klein: Path, tiny_klein_distilled: Path) -> dict[str, Path]:
    """The tiny checkpoints by form."""
    return {"dev": tiny_dev, "klein": tiny_klein, "distilled": tiny_klein_distilled}


@pytest.fixture(scope="session")
def stock(folders: dict[str, Path]) -> Stock:
    """``stock(form, dtype)``: the stock pipeline with aligned weights."""
    loaded: dict[tuple[str, str], Any] = {}

    def load(form: str, dtype: str) -> Any:
        if (form, dtype) not in loaded:
            loaded[form, dtype] = tiny.load_stock(folders[form], DTYPES[dtype], align=True)
        return loaded[form, dtype]

    return load
