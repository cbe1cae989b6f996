"""A contact sheet: pictures of a reference, of variants of it, and how they differ, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lowmem_flux2.runtime.similarity import Pictures

LEAST_CELL_PX, MOST_CELL_PX = 128, 384
LINE_PX, GAP_PX = 14, 6
AMPLIFIED = 8
"""Differences are shown this many times larger: 1/255 would not be seen."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture (height, width, 3) in [0, 1] beside the reference's, with a line of text."""

    title: str
    reference: NDArray[np.float32]
    variant: NDArray[np.float32]


def contact_sheet(rows: Sequence[Row], columns: int = 2) -> Image.Image:
    """``columns`` triples a line: original, variant, difference times AMPLIFIED."""
    height, width = rows[0].reference.shape[:2]
    scale = min(max(LEAST_CELL_PX / width, 1.0), MOST_CELL_PX / width)
    cell_w, cell_h = round(width * scale), round(height * scale)
    triple = 3 * cell_w + 4 * GAP_PX
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * triple, lines * (cell_h + LINE_PX + GAP_PX) + LINE_PX + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, 2), f"original, variant, difference x {AMPLIFIED}", fill="black")
    for number, row in enumerate(rows):
        left = number % columns * triple + GAP_PX
        top = number // columns * (cell_h + LINE_PX + GAP_PX) + LINE_PX + GAP_PX
        pen.text((left, top), row.title, fill="black")
        shown: tuple[Pictures, ...] = (row.reference, row.variant, AMPLIFIED * np.abs(row.variant - row.reference))
        for place, picture in enumerate(shown):
            image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
            resampled = image.resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(resampled, (left + place * (cell_w + GAP_PX), top + LINE_PX))
    return sheet
