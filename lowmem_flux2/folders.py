"""Where this program keeps what it makes for itself: prepared weights, prompt cache, calibrations."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
