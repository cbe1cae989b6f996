"""A model cut to the blocks that differ: what repeats is run twice, and stands for the others.

Blocks of one kind have one shape, so a third one in the same place makes the same tensors as the second and frees them
at the same points. Tests compare the peaks with those of whole models.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_flux2.planning.formats import MIXED
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Placement, StagePlan

REPEATS_RUN = 2
"""The first block of a row meets what came before it, the second is as all that follow; and resident blocks are loaded
through two buffers."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A model folder of configs alone, its spec and stage, and how many blocks each of its blocks stands for."""

    folder: Path
    model: ModelSpec
    stage: StagePlan
    repeats: tuple[int, ...]


def cut_transformer(folder: Path, model: ModelSpec, stage: StagePlan, into: Path) -> Cut | None:
    """Keep two blocks of each kind, one of each placement, and as many streamed ones as there are slots.

    None in ``MIXED``, where it depends on how many blocks there are in how many bits each rests.
    """
    placed = stage.block_placements
    if stage.weight_format == MIXED:
        return None
    doubles = model.transformer.num_double
    kept, repeats = [], []
    for kind in (placed[:doubles], placed[doubles:]):
        chosen, counts = _chosen(kind, stage.slots, REPEATS_RUN)
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
    """Keep a layer before each tap, two before the last, and as ``cut_transformer`` of placements.

    None where nothing would be left out. The number of layers between two taps decides nothing else: states tapped so
    far, most before the last tap, and one hidden state, which in a row's first layer is the tapped one.
    """
    dims = model.text_encoder
    taps = len(dims.out_layers)
    chosen, repeats = _chosen(stage.block_placements, stage.slots, taps - 1 + REPEATS_RUN)
    gaps = [after - before for before, after in zip((0, *dims.out_layers), dims.out_layers, strict=False)]
    if len(chosen) >= dims.layers_used or gaps[-1] < REPEATS_RUN or min(gaps) < 1:
        return None
    layers = len(chosen) + (1 if dims.num_layers > dims.layers_used else 0)
    cut = replace(dims, num_layers=layers, out_layers=(*range(1, taps), len(chosen)))
    _copy_configs(folder, into, "text_encoder", {"num_hidden_layers": layers}, nested="text_config")
    return Cut(
        into,
        replace(model, text_encoder=cut),
        replace(stage, block_placements=tuple(chosen)),
        tuple(repeats),
    )


def _chosen(placed: Sequence[Placement], slots: int, least: int) -> tuple[list[Placement], list[int]]:
    """Placements of at least ``least`` blocks, where there are so many, and how many blocks each stands for."""
    counts = Counter(placed)
    streamed = sum(count for placement, count in counts.items() if placement is not Placement.GPU)
    kept = Counter(dict.fromkeys(counts, 1))
    kept[Placement.GPU] = min(REPEATS_RUN, counts[Placement.GPU])
    while kept.total() < min(least, len(placed)) or kept.total() - kept[Placement.GPU] < min(slots, streamed):
        is_short = kept.total() - kept[Placement.GPU] < min(slots, streamed)
        left = {
            placement: counts[placement] - kept[placement]
            for placement in counts
            if not is_short or placement is not Placement.GPU
        }
        kept[max(left, key=lambda placement: left[placement])] += 1
    chosen = [placement for placement in counts for _ in range(kept[placement])]
    repeats = [
        counts[placement] - kept[placement] + 1 if number == 0 else 1
        for placement in counts
        for number in range(kept[placement])
    ]
    return chosen, repeats


def _copy_configs(folder: Path, into: Path, component: str, changed: dict[str, Any], nested: str | None) -> None:
    for part in (component, "scheduler"):
        shutil.copytree(folder / part, into / part, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    path = into / component / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    section = config.get(nested, config)
    section.update(changed)
    if section.get("layer_types"):
        section["layer_types"] = section["layer_types"][: changed["num_hidden_layers"]]
    path.write_text(json.dumps(config), encoding="utf-8")
