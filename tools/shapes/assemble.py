"""Make the `shapes` checkpoint, in the layout of FLUX.2 [klein] and in bf16, of the parts that train.py left.

python tools/shapes/assemble.py WORK lowmem_flux2/assets/shapes --steps 20 --guidance 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from draw import PICTURE
from train import STEPS, TEXT_LENGTH
from transformers import AutoTokenizer, Qwen3ForCausalLM

LIMIT_MB = 12.0


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of FLUX.2 [klein]."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def assemble(parts: Path, out: Path, steps: int, guidance: float) -> None:
    """Write the checkpoint, with the defaults of its use, to `out`; other files there stay."""
    dtype = torch.bfloat16
    pipeline = Flux2KleinPipeline(
        scheduler=make_scheduler(),
        vae=AutoencoderKLFlux2.from_pretrained(parts / "vae", dtype=dtype),
        text_encoder=Qwen3ForCausalLM.from_pretrained(parts / "text_encoder", dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(parts / "transformer", dtype=dtype),
        is_distilled=False,
    )
    pipeline.save_pretrained(out)
    defaults = {
        "height": PICTURE,
        "width": PICTURE,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": TEXT_LENGTH,
        "is_distilled": False,
    }
    (out / "lowmem_flux2.json").write_text(json.dumps(defaults, indent=2) + "\n")
    for path in out.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def folder_megabytes(folder: Path) -> float:
    """Size of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Assemble the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder that train.py wrote to")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps to record as the default")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale to record as the default")
    options = parser.parse_args()
    assemble(options.parts, options.out, options.steps, options.guidance)
    size = folder_megabytes(options.out)
    print(f"{options.out}: {size:.2f} MB")
    if size > LIMIT_MB:
        raise SystemExit(f"more than {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
