"""The grammar of the `shapes` checkpoint, its held-out split and its drawings."""

import re

import pytest
import torch
from draw import (
    COLOURS,
    HELD_OUT,
    PICTURE,
    POSITIONS,
    SHAPES,
    SIZES,
    SPECS,
    TEST_SPECS,
    TRAIN_SPECS,
    Spec,
    draw,
    parse,
    sample_specs,
)

GRAMMAR = re.compile(
    r"an? (?:(?:small|large) )?(?:red|green|blue|yellow|orange|purple|white|black) (?:circle|square|triangle|cross) "
    r"(?:at the left|in the center|at the right) on an? (?:red|green|blue|yellow|orange|purple|white|black) background"
)


def test_prompts_read_as_english() -> None:
    assert Spec("small", "orange", "cross", "at the left", "blue").prompt == (
        "a small orange cross at the left on a blue background"
    )
    assert Spec("", "orange", "circle", "in the center", "orange").prompt == (
        "an orange circle in the center on an orange background"
    )
    assert Spec("large", "white", "square", "at the right", "orange").prompt == (
        "a large white square at the right on an orange background"
    )


def test_every_prompt_fits_the_grammar_and_is_read_back() -> None:
    assert len(SPECS) == len(SIZES) * len(COLOURS) * len(SHAPES) * len(POSITIONS) * (len(COLOURS) - 1)
    assert len({spec.prompt for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert GRAMMAR.fullmatch(spec.prompt), spec.prompt
        assert spec.colour != spec.background
        assert parse(spec.prompt) == spec


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "a red circle on a blue background", "a red circle at the left on a red background"],
)
def test_other_text_is_not_read(prompt: str) -> None:
    with pytest.raises(ValueError, match="grammar"):
        parse(prompt)


def test_held_out_triples_are_fixed_and_apart_from_training() -> None:
    assert len(HELD_OUT) == 22
    assert len(TRAIN_SPECS) + len(TEST_SPECS) == len(SPECS)
    assert {spec.triple for spec in TEST_SPECS} == HELD_OUT
    assert not {spec.triple for spec in TRAIN_SPECS} & HELD_OUT
    # The split is part of the shipped checkpoint: another seed would turn trained triples into "held-out" ones.
    assert min(HELD_OUT) == ("black", "triangle", "red")
    assert max(HELD_OUT) == ("yellow", "triangle", "orange")


def test_every_word_occurs_in_training() -> None:
    for word in ("colour", "shape", "background", "size", "position"):
        assert {getattr(spec, word) for spec in TRAIN_SPECS} == {getattr(spec, word) for spec in SPECS}


def test_half_of_the_sampled_prompts_are_held_out() -> None:
    specs = sample_specs(200, seed=0)
    assert sum(spec.triple in HELD_OUT for spec in specs) == 100
    assert specs == sample_specs(200, seed=0)
    assert specs != sample_specs(200, seed=1)


def test_drawings_are_pictures_and_follow_their_seed() -> None:
    specs = sample_specs(8, seed=0)
    first, again, other = (draw(specs, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (8, 3, PICTURE, PICTURE)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert draw([]).shape == (0, 3, PICTURE, PICTURE)
