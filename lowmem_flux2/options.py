"""The options that commands share: each flag's name, meaning and help text, once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Prefer(StrEnum):
    quality = "quality"
    balanced = "balanced"
    speed = "speed"
    memory = "memory"


class Placed(StrEnum):
    auto = "auto"
    resident = "resident"
    pinned = "pinned"
    pageable = "pageable"
    disk = "disk"


class Prepared(StrEnum):
    both = "both"
    transformer = "transformer"
    text_encoder = "text_encoder"
    whole_text_encoder = "whole_text_encoder"

    @property
    def components(self) -> tuple[str, ...]:
        return ("text_encoder", "transformer") if self is Prepared.both else (self.value,)


ASK, FIT, LOOK = "What to draw", "How to fit it", "Output"
Prompts = Annotated[
    list[str] | None, typer.Option("-p", "--prompt", help="What to draw; repeat for several.", rich_help_panel=ASK)
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="A text file with one prompt a line, or a .jsonl file with prompt, width, height, seed, ... of each. "
        "A killed or interrupted batch goes on when the same command is given again.",
        rich_help_panel=ASK,
    ),
]
ManifestFile = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        help="Where a --prompt-file batch keeps how far it is.  [default: beside the pictures, by -o and the file]",
        rich_help_panel=LOOK,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="shapes (embedded, the default), flux2-dev, flux2-klein-4b, flux2-klein-9b, flux2-klein-base-4b, "
        "flux2-klein-base-9b, flux2-klein-9b-kv, a diffusers folder, a single file (safetensors or GGUF), or a hub id.",
        rich_help_panel=ASK,
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        help="For a model that is a single file: a file, folder, name or hub id with its text encoder. Default: the "
        "released model of the file's shape.",
        rich_help_panel=ASK,
    ),
]
Vae = Annotated[
    str | None, typer.Option(help="The same for its VAE. Default: as the text encoder.", rich_help_panel=ASK)
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="For a text encoder that is a file: a folder, name or hub id with its tokenizer. Default: the one beside "
        "that file, else the released model's.",
        rich_help_panel=ASK,
    ),
]
Width = Annotated[
    int | None,
    typer.Option("-W", "--width", help="Pixels, a multiple of 16. Default: the model's.", rich_help_panel=ASK),
]
Height = Annotated[
    int | None,
    typer.Option("-H", "--height", help="Pixels, a multiple of 16. Default: the model's.", rich_help_panel=ASK),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.", rich_help_panel=ASK)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.", rich_help_panel=ASK)]
NumImages = Annotated[int | None, typer.Option(help="Images per prompt. Default: 1.", rich_help_panel=ASK)]
Negative = Annotated[
    str | None, typer.Option(help="What to avoid; klein base models with guidance above 1 only.", rich_help_panel=ASK)
]
Length = Annotated[
    int | None,
    typer.Option(help="Text tokens, padded to exactly this many. Default: the model's.", rich_help_panel=ASK),
]
OutLayers = Annotated[
    str | None,
    typer.Option(
        "--text-encoder-out-layers",
        metavar="N,N,N",
        help="Other hidden states of the text encoder than the model's own; for experiments.",
        rich_help_panel=ASK,
    ),
]
References = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Reference image; repeat for up to 10, in the order that the prompt counts them. 'plan' takes WxH too.",
        rich_help_panel=ASK,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Reference images are reduced to at most this many pixels squared, 64 to 2048. Default: 1024.",
        rich_help_panel=ASK,
    ),
]
CaptionUpsample = Annotated[
    float | None,
    typer.Option(
        "--caption-upsample",
        metavar="TEMPERATURE",
        help="Let the text encoder rewrite each prompt first, sampled at this temperature (0.15 is advised); dev only.",
        rich_help_panel=ASK,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="Add a LoRA (safetensors, diffusers', BFL's or kohya's keys) to the transformer; repeat for several.",
        rich_help_panel=ASK,
    ),
]
ProfileName = Annotated[
    str,
    typer.Option(
        "--profile", help="auto (this machine), a name of 'profiles list', or a TOML file.", rich_help_panel=FIT
    ),
]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1 or cpu.", rich_help_panel=FIT)]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, bf16, fp16 or fp32.", rich_help_panel=FIT)]
MaxVram = Annotated[
    str | None, typer.Option(help="Hard cap on our VRAM, CUDA context included: 8GiB.", rich_help_panel=FIT)
]
MaxRam = Annotated[str | None, typer.Option(help="Cap on our RAM: 24GiB.", rich_help_panel=FIT)]
WeightFormat = Annotated[
    str,
    typer.Option(
        help="How the transformer's weights are stored: auto, bf16, fp16, fp32, int8, w8a8, int6, fp8, nf4, nf4-mixed "
        "or int4.",
        rich_help_panel=FIT,
    ),
]
TextFormat = Annotated[
    str, typer.Option("--text-weight-format", help="Text encoder weights: as --weight-format.", rich_help_panel=FIT)
]
Preferred = Annotated[
    Prefer, typer.Option("--prefer", help="What to spend on what: see the README.", rich_help_panel=FIT)
]
PlacementName = Annotated[
    Placed, typer.Option("--placement", help="Where streamed blocks rest; auto decides for each.", rich_help_panel=FIT)
]
StepCache = Annotated[
    str,
    typer.Option(
        metavar="auto|off|fine|fair|coarse|SPEC",
        help="Forecast some steps from earlier ones, which changes pixels: taylor:interval=2 or "
        "first-block:threshold=0.2, then order=, warmup=, last= after commas. auto: for speed, where it is measured.",
        rich_help_panel=FIT,
    ),
]
VaeTile = Annotated[
    str, typer.Option(help="auto, off, or tile side in pixels. Tiles change pixels slightly.", rich_help_panel=FIT)
]
BatchSize = Annotated[
    int, typer.Option(min=0, help="Images denoised together; 0 lets the planner choose.", rich_help_panel=FIT)
]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.", rich_help_panel=ASK)]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.", rich_help_panel=ASK)]
Seed = Annotated[
    int | None,
    typer.Option("-s", "--seed", help="Image i uses seed + i. Drawn, and recorded, if not given.", rich_help_panel=ASK),
]
Output = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        help="PNG name with {seed}, {index}, {model}; an existing file is never overwritten.",
        rich_help_panel=LOOK,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="Carry out this plan file (from plan --json) instead of making one.", rich_help_panel=FIT
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report", help="Write predicted and measured figures as JSON, replacing the file.", rich_help_panel=LOOK
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and explain, load nothing.", rich_help_panel=LOOK)]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Keep prompt, seed and plan out of the PNG.", rich_help_panel=LOOK)
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Print nothing but warnings, errors and file names.", rich_help_panel=LOOK)
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        help="Folder of prepared weights and the prompt cache.  [default: LOWMEM_FLUX2_CACHE, else the platform's]",
        rich_help_panel=FIT,
    ),
]
PromptCacheSize = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache",
        metavar="SIZE|off",
        help="Disk for embeddings of prompts, so that a repeated prompt loads no text encoder.  "
        "[default: LOWMEM_FLUX2_PROMPT_CACHE, else 1GiB]",
        rich_help_panel=FIT,
    ),
]
NoPrepare = Annotated[
    bool, typer.Option("--no-prepare", help="Refuse to quantize weights that are not prepared.", rich_help_panel=FIT)
]
AllowFormatChange = Annotated[
    bool,
    typer.Option(
        "--allow-format-change",
        help="When memory runs out and nothing else helps, go on with a smaller weight format: changes the picture.",
        rich_help_panel=FIT,
    ),
]
SaveLatents = Annotated[
    Path | None,
    typer.Option(help="Keep the denoised latents in this file too, before they are decoded.", rich_help_panel=LOOK),
]
FromLatents = Annotated[
    Path | None,
    typer.Option(
        help="Go on with the latents of an earlier run: decode them, after the steps that an interrupted run lacks; "
        "prompt, seed and size are the file's.",
        rich_help_panel=ASK,
    ),
]
