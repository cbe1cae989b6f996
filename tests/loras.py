"""Random LoRA files in every naming that is met, for a model's transformer. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from lowmem_flux2.planning.linears import linears_of, stored_weights
from lowmem_flux2.planning.models import TransformerSpec

Array = npt.NDArray[np.float32]
Factors = dict[str, tuple[Array, Array]]
"""By a module's name, A (rank, in_features) and B (out_features, rank)."""


def factors(
    dims: TransformerSpec, names: Iterable[str] | None = None, *, rank: int = 4, seed: int = 0, size: float = 0.2
) -> Factors:
    """Random factors of the named modules, in any naming; None for every Linear by diffusers' name."""
    noise, known = np.random.default_rng(seed), stored_weights(dims)
    made: Factors = {}
    for name in linears_of(dims) if names is None else names:
        stored = known[name]
        down = noise.standard_normal((rank, stored.columns)) / stored.columns**0.5
        up = size * noise.standard_normal((stored.rows, rank)) / rank**0.5
        made[name] = down.astype(np.float32), up.astype(np.float32)
    return made


def bfl_names(dims: TransformerSpec) -> list[str]:
    """Every module of BFL's own checkpoints."""
    ours = linears_of(dims)
    fused = ("to_qkv", "to_added_qkv")
    return [name for name in stored_weights(dims) if name not in ours and not name.endswith(fused)]


def diffusers_keys(made: Factors) -> dict[str, Array]:
    keys = {}
    for name, (down, up) in made.items():
        keys |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return keys


def bfl_keys(made: Factors) -> dict[str, Array]:
    return {key.replace("transformer.", "diffusion_model.", 1): value for key, value in diffusers_keys(made).items()}


def kohya_keys(made: Factors, alpha: float) -> dict[str, Array]:
    keys = {}
    for name, (down, up) in made.items():
        module = "lora_unet_" + name.replace(".", "_")
        keys |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        keys[f"{module}.alpha"] = np.array(alpha, dtype=np.float32)
    return keys


def write(path: Path, keys: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in keys.items()}, path, metadata)
    return path
