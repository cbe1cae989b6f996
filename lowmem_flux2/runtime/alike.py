"""A model cut to the blocks that differ: what repeats is run twice, and stands for the others.

Blocks of one kind have one shape, so a third one in the same place makes the same tensors as the second and frees them
at the same points. Tests compare the peaks with those of whole models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Placement, StagePlan

REPEATS_RUN = 2
"""The first block of a row meets what came before it, the second is as all that follow."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A model folder of configs alone, its spec and stage, and how many blocks each of its blocks stands for."""

    folder: Path
    model: ModelSpec
    stage: StagePlan
    repeats: tuple[int, ...]


def cut_transformer(folder: Path, model: ModelSpec, stage: StagePlan, into: Path) -> Cut:
    """Keep two blocks of each kind and placement, or as many as there are slots."""
    doubles, singles = model.transformer.num_double, model.transformer.num_single
    placed = stage.block_placements
    kept, repeats = [], []
    for kind in (placed[:doubles], placed[doubles:]):
        chosen, counts = _chosen(kind, max(REPEATS_RUN, stage.slots))
        kept.append(chosen)
        repeats += counts
    dims = replace(model.transformer, num_double=len(kept[0]), num_single=len(kept[1]))
    _copy_configs(
        folder, into, "transformer", {"num_layers": len(kept[0]), "num_single_layers": len(kept[1])}, nested=None
    )
    return Cut(
        into,
        replace(model, transformer=dims),
        replace(stage, block_placements=(*kept[0], *kept[1])),
        tuple(repeats),
    )


def cut_text_encoder(folder: Path, model: ModelSpec, stage: StagePlan, into: Path) -> Cut | None:
    """Keep two layers before each tap, and two or more of each placement. None where nothing would be left out.

    The number of layers between two taps decides nothing else: states tapped so far, and one hidden state.
    """
    dims = model.text_encoder
    taps = len(dims.out_layers)
    chosen, repeats = _chosen(stage.block_placements, max(REPEATS_RUN, stage.slots))
    per_tap = max(REPEATS_RUN, -(-len(chosen) // taps))
    count = taps * per_tap
    gaps = [after - before for before, after in zip((0, *dims.out_layers), dims.out_layers, strict=False)]
    if count >= dims.layers_used or min(gaps) < REPEATS_RUN:
        return None
    while len(chosen) < count:  # give back blocks that were left out, from the row with most of them
        at = max(range(len(chosen)), key=lambda index: repeats[index])
        repeats[at] -= 1
        chosen.insert(at + 1, chosen[at])
        repeats.insert(at + 1, 1)
    layers = count + (1 if dims.num_layers > dims.layers_used else 0)
    cut = replace(dims, num_layers=layers, out_layers=tuple(per_tap * (tap + 1) for tap in range(taps)))
    _copy_configs(folder, into, "text_encoder", {"num_hidden_layers": layers}, nested="text_config")
    return Cut(
        into,
        replace(model, text_encoder=cut),
        replace(stage, block_placements=tuple(chosen)),
        tuple(repeats),
    )


def _chosen(placed: Sequence[Placement], most: int) -> tuple[list[Placement], list[int]]:
    """At most ``most`` blocks of each placement, in order; the last of each stands for those left out."""
    kept: list[Placement] = []
    repeats: list[int] = []
    for placement in dict.fromkeys(placed):
        count = sum(1 for each in placed if each is placement)
        run = min(count, most)
        kept += [placement] * run
        repeats += [1] * (run - 1) + [count - run + 1]
    return kept, repeats


def _copy_configs(folder: Path, into: Path, component: str, changed: dict[str, Any], nested: str | None) -> None:
    for part in (component, "scheduler"):
        shutil.copytree(folder / part, into / part, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    path = into / component / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    section = config[nested] if nested in config else config
    section.update(changed)
    if section.get("layer_types"):
        section["layer_types"] = section["layer_types"][: changed["num_hidden_layers"]]
    path.write_text(json.dumps(config), encoding="utf-8")
