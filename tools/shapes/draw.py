"""The world of the `shapes` checkpoint: its prompts, its held-out split and the drawings it learns from.

A prompt reads ``a [small|large] COLOUR SHAPE (at the left|in the center|at the right) on a COLOUR background``;
without a size word the shape is of medium size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PICTURE = 64
"""Width and height, in pixels, that the checkpoint is trained for."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (7.0, 9.0), "": (11.5, 13.5), "large": (16.0, 18.0)}
"""Size word -> least and greatest radius in pixels."""
POSITIONS: dict[str, float] = {"at the left": 20.0, "in the center": 32.0, "at the right": 44.0}
"""Position phrase -> horizontal centre in pixels."""

COLOUR_JITTER = 8
"""Greatest deviation of a drawn channel from its nominal value, in 1/255."""
JITTER_X = 1.5
JITTER_Y = 2.0
SQUARE_HALF = 0.9
"""Half the side of a square, and ..."""
CROSS_HALF = 0.34
"""... half the width of a bar of a cross, as fractions of the radius."""

HELD_OUT_SEED = 7
HELD_OUT_SHARE = 0.1

Triple = tuple[str, str, str]


def with_article(words: str) -> str:
    """Put the fitting indefinite article before `words`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Spec:
    """What one picture shows."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    @property
    def prompt(self) -> str:
        """The sentence of the grammar that describes this picture."""
        thing = with_article(f"{self.size} {self.colour} {self.shape}".strip())
        return f"{thing} {self.position} on {with_article(self.background)} background"

    @property
    def triple(self) -> Triple:
        """The combination by which pictures are held out of training."""
        return self.colour, self.shape, self.background


SPECS: tuple[Spec, ...] = tuple(
    Spec(size, colour, shape, position, background)
    for size in SIZES
    for colour in COLOURS
    for shape in SHAPES
    for position in POSITIONS
    for background in COLOURS
    if background != colour
)


def _held_out_triples() -> frozenset[Triple]:
    triples = [(c, s, b) for c in COLOURS for s in SHAPES for b in COLOURS if b != c]
    return frozenset(random.Random(HELD_OUT_SEED).sample(triples, round(len(triples) * HELD_OUT_SHARE)))


HELD_OUT: frozenset[Triple] = _held_out_triples()
"""Colour/shape/background triples that no training picture shows."""

TRAIN_SPECS: tuple[Spec, ...] = tuple(s for s in SPECS if s.triple not in HELD_OUT)
TEST_SPECS: tuple[Spec, ...] = tuple(s for s in SPECS if s.triple in HELD_OUT)


def parse(prompt: str) -> Spec:
    """Read a prompt of the grammar; raise ValueError for any other text."""
    try:
        return _BY_PROMPT[prompt]
    except KeyError:
        raise ValueError(f"not a prompt of the shapes grammar: {prompt!r}") from None


_BY_PROMPT = {spec.prompt: spec for spec in SPECS}


def sample_specs(count: int, seed: int) -> list[Spec]:
    """Draw `count` specs at random, every second one from the held-out triples."""
    rng = random.Random(seed)
    return [rng.choice(TEST_SPECS if i % 2 else TRAIN_SPECS) for i in range(count)]


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Distance in pixels of the points (x, y) from the outline of a shape at the origin, negative inside.

    The y axis points down, as in pictures; triangles point up and fill the box of half-size `radius`.
    """
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(ax, ay) - radius * SQUARE_HALF
    if shape == "triangle":
        return torch.maximum(y - radius, (2 * ax - y - radius) / 5**0.5)
    if shape == "cross":
        bar = radius * CROSS_HALF
        horizontal = torch.maximum(ax - radius, ay - bar)
        vertical = torch.maximum(ax - bar, ay - radius)
        return torch.minimum(horizontal, vertical)
    raise ValueError(f"unknown shape {shape!r}")


def draw(specs: Sequence[Spec], generator: torch.Generator | None = None) -> Tensor:
    """Draw one picture per spec, each with random colours, radius and place within the bounds of its words.

    Returns a float tensor (len(specs), 3, PICTURE, PICTURE) in [-1, 1].
    """
    if not specs:
        return torch.empty(0, 3, PICTURE, PICTURE)
    axis = torch.arange(PICTURE, dtype=torch.float32) + 0.5
    chance = torch.rand(len(specs), 9, generator=generator)
    pictures = []
    for spec, u in zip(specs, chance, strict=True):
        low, high = SIZES[spec.size]
        radius = low + (high - low) * u[0]
        x = POSITIONS[spec.position] + JITTER_X * (2 * u[1] - 1)
        y = PICTURE / 2 + JITTER_Y * (2 * u[2] - 1)
        distance = signed_distance(spec.shape, (axis - x)[None, :], (axis - y)[:, None], radius)
        cover = (0.5 - distance).clamp(0, 1)
        ink, paper = _jittered(spec.colour, u[3:6]), _jittered(spec.background, u[6:9])
        pictures.append(cover * ink + (1 - cover) * paper)
    return torch.stack(pictures) * 2 - 1


def _jittered(colour: str, chance: Tensor) -> Tensor:
    nominal = torch.tensor(COLOURS[colour], dtype=torch.float32)
    return ((nominal + COLOUR_JITTER * (2 * chance - 1)) / 255).clamp(0, 1).view(3, 1, 1)
