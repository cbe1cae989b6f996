"""Versions of the libraries, as reports and pictures record them."""

from __future__ import annotations

import platform
from importlib import metadata

from lowmem_flux2.version import __version__


def versions() -> dict[str, str]:
    """Versions of everything that decides pixels."""
    found = {"lowmem_flux2": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "safetensors"):
        found[name] = metadata.version(name)
    return found
