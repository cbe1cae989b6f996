"""The models of the suite: the real shapes from the shipped configs, cut to few blocks, or toys of the same form.

A subject is a diffusers folder without weights: configs, and the embedded model's tokenizer, whose ids every vocabulary
has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_flux2.planning.sources import ASSETS, EMBEDDED, ModelSource, resolve_model

NAMES = ("dev", "klein-9b", "klein-4b")
DEV_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
"""dev's messages hold lists of parts, the embedded model's template takes plain text."""

_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 2048,
}
_TINY: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "in_channels": 32,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 8, 8, 8],
        "joint_attention_dim": 96,
        "timestep_guidance_channels": 64,
    },
    "vae": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 4},
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to run: where its configs are, and what they say."""

    name: str
    folder: Path
    source: ModelSource


def subject(name: str, scratch: Path, *, tiny: bool = False, blocks: tuple[int, int] | None = None) -> Subject:
    """Write a subject's folder and resolve it.

    Args:
        name: of NAMES.
        tiny: toy widths, so that a CPU runs it in a second.
        blocks: only so many double- and single-stream blocks, at full width.
    """
    label = name if blocks is None else f"{name}-{blocks[0]}+{blocks[1]}"
    folder = scratch / "models" / (f"tiny-{label}" if tiny else label)
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(ASSETS / "configs" / f"flux2-{name}", folder)
    shutil.copytree(ASSETS / EMBEDDED / "tokenizer", folder / "tokenizer")
    if name == "dev":
        (folder / "tokenizer" / "chat_template.jinja").write_text(DEV_TEMPLATE)
    if tiny:
        _edit(folder / "transformer" / "config.json", _TINY["transformer"])
        _edit(folder / "vae" / "config.json", _TINY["vae"])
        _edit(folder / "text_encoder" / "config.json", _TINY_TEXT, section="text_config" if name == "dev" else None)
    if blocks is not None:
        counts = {"num_layers": blocks[0], "num_single_layers": blocks[1]}
        _edit(folder / "transformer" / "config.json", counts)
    return Subject(label, folder, resolve_model(str(folder)))


def _edit(path: Path, values: Mapping[str, Any], section: str | None = None) -> None:
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(values)
    path.write_text(json.dumps(config, indent=2) + "\n")
