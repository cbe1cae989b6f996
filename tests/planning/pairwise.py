"""Few cases that hold every pair of values of every two factors: an all-pairs covering array."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """As many cases as the two largest factors have pairs, the same ones for a seed.

    The two largest factors are laid out in full; each further column is drawn at random and improved by swaps until it
    makes all its pairs with the columns before it.

    Raises:
        ValueError: a column was not found; another seed may find it.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    levels = {name: range(len(factors[name])) for name in names}
    rows = list(product(levels[names[0]], levels[names[1]]))
    columns = [[row[0] for row in rows], [row[1] for row in rows]]
    generator = random.Random(seed)
    for name in names[2:]:
        columns.append(_column(columns, len(levels[name]), generator))
    return [
        {name: factors[name][column[at]] for name, column in zip(names, columns, strict=True)}
        for at in range(len(rows))
    ]


def missing_pairs(cases: Sequence[Mapping[str, Any]], factors: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Pairs of values that no case holds."""
    return [
        (one, first, other, second)
        for one, other in combinations(factors, 2)
        for first, second in product(factors[one], factors[other])
        if not any(case[one] == first and case[other] == second for case in cases)
    ]


def _column(columns: Sequence[Sequence[int]], levels: int, generator: random.Random) -> list[int]:
    count = len(columns[0])
    for _ in range(50):
        column = [at % levels for at in range(count)]
        generator.shuffle(column)
        missing = _missing(columns, column, levels)
        for _ in range(4000):
            if not missing:
                return column
            one, other = generator.sample(range(count), 2)
            column[one], column[other] = column[other], column[one]
            now = _missing(columns, column, levels)
            if now > missing:
                column[one], column[other] = column[other], column[one]
            else:
                missing = now
    raise ValueError(f"no column of {levels} levels found")


def _missing(columns: Sequence[Sequence[int]], column: Sequence[int], levels: int) -> int:
    return sum((max(other) + 1) * levels - len(set(zip(other, column, strict=True))) for other in columns)
