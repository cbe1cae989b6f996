"""Where prepared weights are kept. Imports no torch: listing them must be quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MANIFEST = "manifest.json"
"""Written last into an entry: what has it is whole."""


def cache_folder(given: Path | None = None) -> Path:
    """``--cache-dir``, else LOWMEM_FLUX2_CACHE, else the platform's cache folder."""
    if given is not None:
        return given
    if "LOWMEM_FLUX2_CACHE" in os.environ:
        return Path(os.environ["LOWMEM_FLUX2_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "lowmem-flux2"
