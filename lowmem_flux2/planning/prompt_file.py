"""Prompt files: text with one prompt a line, or JSONL with what differs from line to line.

    {"prompt": "a red circle", "width": 512, "height": 256, "seed": 7, "num_images": 2}
    {"prompt": "a fox in ink", "steps": 8, "guidance": 4, "negative_prompt": "colour"}
    {"prompt": "a lighthouse", "caption_upsample": 0.15}

What a line leaves out is what the flags say. A ``.jsonl`` file is JSONL, any other is text.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowmem_flux2.errors import UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line, as written; None takes what the flag of that name says.

    Args:
        seed: of its first image; the next ones count on.
        num_images: images of this prompt.
        image: files of reference images.
        lora: each FILE or FILE:SCALE.
        caption_upsample: temperature; 0 for the prompt as it is.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_images: int | None = None
    negative_prompt: str | None = None
    image: tuple[str, ...] | None = None
    lora: tuple[str, ...] | None = None
    steps: int | None = None
    guidance: float | None = None
    caption_upsample: float | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A line and where it is, for messages: ``prompts.jsonl:3``, or ``-p``."""

    line: PromptLine
    where: str


_KEYS = tuple(field.name for field in fields(PromptLine))
_LISTS = ("image", "lora")


@cache
def _adapter() -> TypeAdapter[PromptLine]:
    """Made when the first such line is read: no other command waits for it."""
    from pydantic import TypeAdapter

    return TypeAdapter(PromptLine)


def read_prompt_file(path: Path) -> tuple[Located, ...]:
    """The lines of a prompt file that are not blank.

    Raises:
        UsageError: cannot be read, without a prompt, or a line that is wrong: file, line, key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-file {path}: cannot read it: {error}") from None
    # Not splitlines, which also splits at characters that JSON allows in a string.
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UsageError(f"--prompt-file {path}: there is no prompt in it")
    is_jsonl = path.suffix.lower() in JSONL
    if not is_jsonl and _is_object(numbered[0][1]):
        raise UsageError(f"{path}:{numbered[0][0]}: this line is JSON, but the file's name does not end in .jsonl")
    located = []
    for number, line in numbered:
        where = f"{path}:{number}"
        located.append(Located(_parsed(line, where) if is_jsonl else PromptLine(line), where))
    return tuple(located)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys, none of which JSON would take the last of."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UsageError(f"{where}: the key {twice!r} is there more than once")
    return found


def _parsed(line: str, where: str) -> PromptLine:
    try:
        raw: Any = json.loads(line, object_pairs_hook=partial(_once, where))
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f'{where}: must be a JSON object, such as {{"prompt": "a red circle"}}')
    for key in raw:
        if key not in _KEYS:
            raise UsageError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
    for key in _LISTS:  # one may be written without brackets
        if isinstance(raw.get(key), str):
            raw[key] = [raw[key]]
    from pydantic import ValidationError

    try:
        parsed = _adapter().validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "prompt"
        raise UsageError(f"{where}: {key}: {first['msg']}") from None
    if not parsed.prompt.strip():
        raise UsageError(f"{where}: the prompt is empty: say what to draw")
    return parsed
