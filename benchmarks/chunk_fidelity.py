"""What chunks of tokens do to pixels on this CPU in bf16: pictures of `shapes` at 256x256, in chunks of 64 and whole.

    python benchmarks/chunk_fidelity.py        # prints a line a picture, writes results/chunk-fidelity.json

Where matmuls round a row alike however many there are, pictures are bit-equal; with AMX they are not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_flux2 import Engine
from lowmem_flux2.fidelity import prompts_for
from lowmem_flux2.planning.identity import cpu_model
from lowmem_flux2.report import write_atomically

RESULT = Path(__file__).parent / "results" / "chunk-fidelity.json"
SIDE_PX, STEPS, CHUNK_TOKENS, SEED = 256, 20, 64, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    found: list[float | None] = []
    with Engine("shapes", dtype="bf16") as engine:
        for number, prompt in enumerate(prompts_for("shapes", None, asked.images)):
            size: dict[str, Any] = {"num_inference_steps": STEPS, "height": SIDE_PX, "width": SIDE_PX}
            plan = engine.plan(engine.request(prompt, **size))
            stages = (
                replace(stage, chunk_tokens=CHUNK_TOKENS) if stage.stage == "denoise" else stage
                for stage in plan.stages
            )
            whole, chunked = (
                np.asarray(engine.generate(prompt, **size, seed=SEED + number, output_type="np", plan=each).images)
                for each in (plan, replace(plan, stages=tuple(stages)))
            )
            error = float(np.square(whole - chunked).mean())
            found.append(-10 * float(np.log10(error)) if error else None)
            print(f"{prompt}: {'bit-equal' if found[-1] is None else f'PSNR {found[-1]:.1f} dB'}", flush=True)
    psnrs = [psnr for psnr in found if psnr is not None]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "amx_bf16": bool(torch.cpu.get_capabilities().get("amx_bf16")),
        "chunk_tokens": CHUNK_TOKENS,
        "image_tokens": (SIDE_PX // 16) ** 2,
        "pictures": len(found),
        "bit_equal": len(found) - len(psnrs),
        "psnr_db": {"median": float(np.median(psnrs)), "worst": min(psnrs)} if psnrs else None,
    }
    write_atomically(asked.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
