"""Do times come out right on a CPU? Predicted / measured per stage: as assumed, calibrated, and fitted to reports.

    python benchmarks/calibration_cpu.py --folder /var/tmp/calibration --out benchmarks/results

Writes a random model of about 300 MB, calibrates this machine (45 s), runs the tiny test model, the embedded one and
the random one, each in a process of its own from a cold page cache, and prices the plan of every run three times: with
the constants that are assumed, with the calibration, and with the calibration fitted to half of the runs (the other
half is what is shown for it). Set OMP_NUM_THREADS=1 on a machine that others use too: two threads of which one is
preempted wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large red circle in the center on a blue background"
TURNS = 4


def write_model(folder: Path) -> None:
    """A klein-shaped folder with random bf16 weights: 3 double and 8 single blocks of width 768, 340 MB in all."""
    import shutil

    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shapes = ROOT / "lowmem_flux2" / "assets" / "shapes"
    folder.mkdir(parents=True)
    shutil.copytree(shapes / "tokenizer", folder / "tokenizer")
    shutil.copytree(shapes / "scheduler", folder / "scheduler")
    assert FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler")
    torch.manual_seed(0)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=json.loads((shapes / "text_encoder" / "config.json").read_text())["vocab_size"],
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=28,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=3,
        num_single_layers=8,
        attention_head_dim=128,
        num_attention_heads=6,
        joint_attention_dim=3 * 512,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(64, 128, 256, 256), sample_size=256)
    for name, module in (("text_encoder", encoder), ("transformer", transformer), ("vae", vae)):
        torch.nn.Module.to(module, torch.bfloat16).save_pretrained(folder / name)
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    index = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.42.1", "is_distilled": True, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def evict(folder: Path) -> None:
    """Put a model's files out of the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(model: str, flags: list[str], report: Path) -> None:
    command = [sys.executable, "-m", "lowmem_flux2", "generate", "-q", "-m", model, "-p", PROMPT, "-s", "0"]
    command += ["--device", "cpu", "--prompt-cache", "off", "-o", str(report.with_suffix(".png"))]
    command += ["--report", str(report), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{model}: exit code {done.returncode}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="models, reports and the calibration; reused")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=45)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    # Its own cache folder: an older calibration of this machine must not be what is assumed.
    os.environ["LOWMEM_FLUX2_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(ROOT / "tests"))
    from lowmem_flux2.calibrating import observations_of
    from lowmem_flux2.planning.detect import detect, identify
    from lowmem_flux2.planning.fit import accuracy, fit
    from lowmem_flux2.planning.hardware import load_profile
    from lowmem_flux2.report import read_report

    middle, tiny_folder, reports = folder / "middle", folder / "tiny", folder / "reports"
    if not middle.exists():
        write_model(middle)
    if not tiny_folder.exists():
        import tiny

        tiny.write_klein(tiny_folder, is_distilled=True)
    reports.mkdir(exist_ok=True)
    made = folder / "calibration.toml"
    load_before = os.getloadavg()
    command = [sys.executable, "-m", "lowmem_flux2", "calibrate", "--device", "cpu", "--seconds"]
    subprocess.run([*command, str(arguments.seconds), "-o", str(made), "--force"], check=True)
    runs = {
        "tiny": (str(tiny_folder), ["-W", "128", "-H", "128", "--steps", "8"]),
        "shapes": ("shapes", ["--steps", "20"]),
        "middle 256 px": (str(middle), ["-W", "256", "-H", "256", "--steps", "4"]),
        "middle 512 px": (str(middle), ["-W", "512", "-H", "512", "--steps", "2"]),
        "middle 256 px, disk": (str(middle), ["-W", "256", "-H", "256", "--steps", "4", "--placement", "disk"]),
    }
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for number, (name, (model, flags)) in enumerate(runs.items()):
            report = reports / f"{number}-{turn}.json"
            evict(Path(model) if Path(model).is_dir() else ROOT / "lowmem_flux2" / "assets" / "shapes")
            run(model, flags, report)
            found[name].append(read_report(report))
    assumed, calibrated = detect("cpu", calibrated=False), load_profile(str(made))
    half = [one for each in found.values() for report in each[::2] for one in observations_of(report)]
    fitted = fit(calibrated, half, "fitted").hardware
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": str(identify("cpu")),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "seconds": arguments.seconds,
        "turns": TURNS,
        "calibration": {key: value for key, value in asdict(calibrated).items() if key != "provenance"},
        "predicted_over_measured": {},
    }
    print(f"{'':22}{'stage':10}{'assumed':>9}{'calibrated':>12}{'fitted':>9}   median of predicted / measured")
    for name, each in found.items():
        everything = [one for report in each for one in observations_of(report)]
        unseen = [one for report in each[1::2] for one in observations_of(report)]
        columns = {
            "assumed": accuracy(assumed, everything),
            "calibrated": accuracy(calibrated, everything),
            "fitted": accuracy(fitted, unseen),
        }
        record["predicted_over_measured"][name] = {
            kind: {stage: asdict(one) for stage, one in by_stage.items()} for kind, by_stage in columns.items()
        }
        for stage in columns["assumed"]:
            figures = [columns[kind][stage].median for kind in columns]
            print(f"{name:22}{stage:10}{figures[0]:9.2f}{figures[1]:12.2f}{figures[2]:9.2f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "calibration-cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
