"""A full-size klein-4b-shaped checkpoint for the benchmarks: seeded random bf16 weights, 15.7 GB, never downloaded.

python benchmarks/klein_checkpoint.py --folder /var/tmp/klein-4b
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 << 30
ROOT = Path(__file__).resolve().parents[1]


def ensure_checkpoint(folder: Path) -> None:
    """Write the checkpoint unless it is there: whole under its name, or not at all."""
    if folder.exists():
        return
    print(f"writing {folder} ...", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(partial)
    partial.rename(folder)


def write_checkpoint(folder: Path) -> None:
    """A klein-4b-shaped diffusers folder; random weights of a scale that keeps activations finite, norms at one."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    configs = ROOT / "lowmem_flux2" / "assets" / "configs" / "flux2-klein-4b"
    shutil.copytree(configs, folder)
    shutil.copytree(ROOT / "lowmem_flux2" / "assets" / "shapes" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    with init_empty_weights():
        transformer = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(configs / "transformer"))
        vae = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(configs / "vae"))
        encoder = Qwen3ForCausalLM(Qwen3Config.from_pretrained(configs / "text_encoder"))
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name, module in (("transformer", transformer), ("vae", vae), ("text_encoder", encoder)):
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        _write_shards(folder / name, stem, module, pool)


def _write_shards(folder: Path, stem: str, module: Any, pool: Any) -> None:
    import torch
    from safetensors.torch import save_file

    shards: list[dict[str, Any]] = [{}]
    held = 0
    places: dict[str, str] = {}
    written: list[Path] = []

    def flush() -> None:
        nonlocal held
        path = folder / f"{stem}-{len(written):05d}.safetensors"
        save_file(shards[-1], path)
        written.append(path)
        places.update(dict.fromkeys(shards[-1], path.name))
        shards[-1], held = {}, 0

    tied = "lm_head.weight"
    for number, (name, tensor) in enumerate(module.state_dict().items()):
        if name == tied and module.config.tie_word_embeddings:
            continue
        count = tensor.numel()
        if not tensor.is_floating_point():
            value = torch.ones(tuple(tensor.shape), dtype=tensor.dtype)
        elif tensor.ndim < 2:
            value = torch.full(tuple(tensor.shape), 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        else:
            start = number * 7919 % (1 << 20)
            repeats = -(-(count + start) // len(pool))
            value = pool.repeat(repeats)[start : start + count].reshape(tensor.shape)
            value = value * (0.5 / (count // tensor.shape[0]) ** 0.5)
        shards[-1][name] = value.contiguous()
        held += count * 2
        if held > SHARD_BYTES:
            flush()
    if shards[-1]:
        flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="written there unless it exists")
    ensure_checkpoint(parser.parse_args().folder)


if __name__ == "__main__":
    main()
