"""What ``bench --fidelity`` compares: every choice that changes pixels, against one setting, and the controls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.step_caches import PRESETS, FirstBlock, StepCache, Taylor
from lowmem_flux2.planning.support import SUPPORTED
from lowmem_flux2.planning.tiles import TILE_SIDES_PX, tile_is_sound

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing changed against another variant (``against``); ``kind`` groups rows of the table.

    ``shift`` is added to every seed, ``rotation`` gives picture i the prompt of picture i + rotation.
    """

    name: str
    kind: str
    against: str = REFERENCE
    dtype: str = ""
    weight_format: str = ""
    text_weight_format: str = ""
    step_cache: str = "off"
    vae_tile: str = "off"
    scale: int = 1
    steps_divisor: int = 1
    shift: int = 0
    rotation: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all variants share. ``width``, ``height`` and ``steps`` of 0 are the model's own.

    ``batch`` images are denoised together, in every variant: a batch's composition decides how kernels round. The
    machine, its caps and the cache folder change no pixel.
    """

    model: str
    prompts: tuple[str, ...]
    seed: int
    dtype: str
    steps: int
    width: int
    height: int
    batch: int = 16
    profile: str = "auto"
    device: str = "auto"
    max_vram: str | None = None
    max_ram: str | None = None
    cache: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What decides the pictures."""
        machine = ("profile", "device", "max_vram", "max_ram", "cache")
        return {name: value for name, value in asdict(self).items() if name not in machine}


def variants(setting: Setting, width: int, height: int) -> list[Variant]:
    """Every supported choice that changes pixels, and the controls. The references come before what is compared."""
    quantized = [name for name in FORMATS if FORMATS[name].is_prepared and name in SUPPORTED.weight_formats]
    quantized.sort(key=lambda name: FORMATS[name].weight_error)
    others = [name for name in ("fp32", "bf16") if name != setting.dtype]
    found = [Variant(REFERENCE, "reference"), Variant("repeated", "control")]
    found += [Variant(f"compute in {name}", "dtype", dtype=name) for name in others]
    found += [Variant(f"transformer {name}", "weights", weight_format=name) for name in quantized]
    found += [Variant(f"text encoder {name}", "text weights", text_weight_format=name) for name in quantized]
    found += [
        Variant(f"step cache {name}", "step cache", step_cache=text) for name, text in _step_caches(setting.steps)
    ]
    found += _tiles(width, height)
    return [
        *found,
        Variant("half the steps", "control", steps_divisor=2),
        Variant("another seed", "control", shift=len(setting.prompts)),
        *([Variant("another prompt", "control", rotation=1)] if len(set(setting.prompts)) > 1 else []),
    ]


def _step_caches(steps: int) -> list[tuple[str, str]]:
    """Names and texts: the presets and some thresholds, where they skip a step, and one that is exact."""
    caches: dict[str, StepCache] = {**PRESETS, "taylor 6": Taylor(interval=6, warmup=3)}
    caches |= {f"first-block {threshold}": FirstBlock(threshold=threshold) for threshold in (0.1, 0.2, 0.3)}
    caches["first-block 0.2, order 0"] = FirstBlock(threshold=0.2, order=0)
    found = [(name, str(cache)) for name, cache in caches.items() if cache.computed_steps(steps) < steps]
    return [("first-block 0", str(FirstBlock(threshold=0.0))), *found] if found else []


def _tiles(width: int, height: int) -> list[Variant]:
    """VAE tiles at the model's own size where one is sound, else (small models) at the first larger one with one."""
    for scale in (1, 2, 3, 4):
        sides = [px for px in (*TILE_SIDES_PX, 64) if tile_is_sound(scale * width, scale * height, px)]
        if sides:
            untiled = REFERENCE if scale == 1 else f"{scale * width} x {scale * height} px"
            larger = [] if scale == 1 else [Variant(untiled, "reference", scale=scale)]
            return larger + [Variant(f"tiles {px} px", "tiles", untiled, vae_tile=str(px), scale=scale) for px in sides]
    return []
