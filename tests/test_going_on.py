"""The commands that a stopped run prints have every flag that matters, whatever was typed."""

from __future__ import annotations

from enum import Enum
from typing import Any, get_args

import typer
from hypothesis import given
from hypothesis import strategies as st

from lowmem_flux2.arguments import IN_THE_FILE, NOT_AGAIN, OF_DECODING, OF_STEPS, words_to_go_on
from lowmem_flux2.cli import app

KINDS = next(each.callback for each in app.registered_commands if each.callback.__name__ == "generate").__annotations__
"""What each parameter is, Annotated."""
GENERATE = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
PARAMETERS = {parameter.name: parameter for parameter in GENERATE.params}
GROUPS = IN_THE_FILE | NOT_AGAIN | OF_DECODING | OF_STEPS


def words_of(parameter: Any) -> st.SearchStrategy[list[str]]:
    """One way to type the parameter."""
    flag = st.sampled_from(parameter.opts)
    kinds = [get_args(KINDS[parameter.name])[0], *get_args(get_args(KINDS[parameter.name])[0])]
    kind = next((kind for kind in kinds if isinstance(kind, type)), str)
    if kind is bool:
        return flag.map(lambda text: [text])
    values: st.SearchStrategy[Any] = st.text("ab 'ö$/.-", min_size=1, max_size=6).map(lambda text: f"x{text}")
    if issubclass(kind, Enum):
        values = st.sampled_from([each.value for each in kind])
    elif kind in (int, float):
        values = st.integers(1, 4096) if kind is int else st.floats(0.5, 9)
    return st.tuples(flag, values.map(str)).map(list)


@st.composite
def typed(draw: st.DrawFn) -> list[str]:
    wanted = draw(st.lists(st.sampled_from(list(GENERATE.params)), unique=True))
    return [word for parameter in wanted for word in draw(words_of(parameter))]


def parsed(words: list[str]) -> typer.Context:
    context: typer.Context = GENERATE.make_context("generate", list(words))
    return context


@given(typed(), st.booleans())
def test_they_are_parsed_into_what_was_typed(words: list[str], decodes: bool) -> None:
    begun = parsed(words)
    again = parsed(list(words_to_go_on(begun, decodes=decodes)))
    for name in PARAMETERS:
        kept = name not in GROUPS or name in (OF_DECODING if decodes else OF_STEPS)
        kept |= name == "model" and any(begun.params[part] for part in ("text_encoder", "vae", "tokenizer"))
        expected = begun.params.get(str(name)) if kept else parsed([]).params.get(str(name))
        assert again.params.get(str(name)) == expected, name


def test_every_flag_is_thought_of() -> None:
    """A flag that no list has is taken along; lists have no name that is no flag."""
    assert set(PARAMETERS) >= GROUPS
    taken = {name for name in PARAMETERS if name not in GROUPS | {"help"}}
    assert taken == {
        *(
            "text_encoder",
            "vae",
            "tokenizer",
            "offline",
            "profile",
            "device",
            "max_vram",
            "max_ram",
            "report",
            "no_metadata",
        ),
        *("quiet", "cache_dir", "prompt_cache", "no_prepare", "allow_format_change"),
    }
