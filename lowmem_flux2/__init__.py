"""lowmem_flux2: memory-optimized, low-VRAM inference for the FLUX.2 image models.

from lowmem_flux2 import Engine

with Engine(model="shapes") as engine:
    result = engine.generate(prompt="a large red circle in the center on a blue background", seed=0)
    result.images[0].save("circle.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_flux2.version import __version__

if TYPE_CHECKING:
    from lowmem_flux2.runtime.engine import Engine, Generation

__all__ = ["Engine", "Generation", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch only when the engine is asked for: ``lowmem-flux2 plan`` must start in half a second."""
    if name in ("Engine", "Generation"):
        from lowmem_flux2.runtime import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
