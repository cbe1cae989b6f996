"""The manifest of a batch: what was asked for, how it is being made, and how far each image has come.

A JSON file beside the pictures, replaced whole. It freezes what decides bits: each group of lines with its plan, the
composition of its batches, every seed and file name. Beside it, while the batch is not done, is a folder of parts:

    out.prompts.manifest.json
    out.prompts.parts/embeddings_0_3.safetensors     the batch of prompts 3 of encode job 0
                      latents_1_2.safetensors        denoised batch 2 of group 1
                      under_way.safetensors          of the batch that Ctrl-C stopped
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lowmem_flux2.errors import ManifestMismatch, UsageError
from lowmem_flux2.planning.batches import negatives_of, prompt_batches
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.prompt_file import PromptLine
from lowmem_flux2.planning.workload import Request

FORMAT = "lowmem-flux2 batch 1"
SUFFIX, PARTS = ".manifest.json", ".parts"
SHOWN_DIFFERENCES = 5

State = Literal["pending", "latents", "done"]


@dataclass(frozen=True, slots=True)
class ImageState:
    """One image.

    Args:
        line: index of its prompt in the batch.
        path: file name, relative to the manifest's folder.
        state: ``latents`` are denoised and saved, ``done`` is a picture in its file.
        latents: file in the folder of parts.
        sha256: of the picture's file.
    """

    line: int
    seed: int
    path: str
    state: State = "pending"
    latents: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Prompts that go through the text encoder in one stage.

    Args:
        batches: their composition.
    """

    request: Request
    plan: Plan
    batches: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Lines of equal size, steps and all else: one plan for all of them.

    Args:
        encode: index of the encode job that all its prompts and negative prompts are in.
        images: indexes of the batch's images, in the request's order.
        batches: of the same, as they are denoised together.
        is_upsampled: the request's prompts are those that the text encoder made of the lines'.
    """

    request: Request
    plan: Plan
    encode: int
    images: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    is_upsampled: bool = False

    @property
    def is_to_be_upsampled(self) -> bool:
        return self.request.caption_upsample_temperature is not None and not self.is_upsampled


def own_encode(group: Group) -> EncodeJob:
    """The prompts of one group, as those of one run are encoded."""
    request = replace(group.request, caption_upsample_temperature=None)
    batches = prompt_batches(request.prompts, group.plan.stage("encode").batch_size)
    if group.plan.workload.guidance_passes == 2:
        batches += [batch for batch in negatives_of(batches, request.negative_prompt) if batch not in batches]
    return EncodeJob(request, group.plan, tuple(dict.fromkeys(batches)))


@dataclass(frozen=True, slots=True)
class StoppedBatch:
    """The batch that was stopped between two steps; its latents are in the folder of parts."""

    group: int
    batch: int
    step: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a batch.

    Args:
        lines: its prompts with what they say.
        options: what was typed, as text, by flag; compared, never obeyed.
        weights: fingerprint of each component.
        versions: of the libraries that began it.
    """

    lines: tuple[PromptLine, ...]
    options: Mapping[str, str]
    weights: Mapping[str, str]
    versions: Mapping[str, str]
    encodes: tuple[EncodeJob, ...]
    groups: tuple[Group, ...]
    images: tuple[ImageState, ...]
    stopped: StoppedBatch | None = None

    def with_image(self, index: int, state: ImageState) -> Manifest:
        images = list(self.images)
        images[index] = state
        return replace(self, images=tuple(images))

    def with_upsampled(self, number: int, prompts: tuple[str, ...]) -> Manifest:
        """With the prompts that the text encoder made of a group's."""
        group = self.groups[number]
        group = replace(group, request=replace(group.request, prompts=prompts), is_upsampled=True)
        groups = (*self.groups[:number], group, *self.groups[number + 1 :])
        encodes = (*self.encodes[: group.encode], own_encode(group), *self.encodes[group.encode + 1 :])
        return replace(self, groups=groups, encodes=encodes)

    def count(self, state: State) -> int:
        return sum(image.state == state for image in self.images)

    def pending_batches(self, group: int) -> list[int]:
        """Numbers of the group's batches with an image that is neither denoised nor done."""
        batches = enumerate(self.groups[group].batches)
        return [number for number, batch in batches if any(self.images[at].state == "pending" for at in batch)]

    def check(
        self, lines: Sequence[PromptLine], options: Mapping[str, str], requests: Sequence[Request], path: Path
    ) -> None:
        """Compare with what is asked for now.

        Raises:
            ManifestMismatch: shows what differs.
        """
        found = [*_options_that_differ(self.options, options), *_lines_that_differ(self.lines, lines)]
        if not found:  # the model's own defaults may have changed, or a file that a line names
            pairs = [
                (group.request, replace(asked, prompts=group.request.prompts) if group.is_upsampled else asked)
                for group, asked in zip(self.groups, requests, strict=False)
            ]
            found = [words for begun, asked in pairs for words in _fields_that_differ("", begun, asked)]
            if len(self.groups) != len(requests):
                found.append(f"groups of alike lines: manifest {len(self.groups)}, here {len(requests)}")
        if found:
            raise _mismatch(found, path)

    def check_weights(self, weights: Mapping[str, str], path: Path) -> None:
        """Compare the model with the one that began.

        Raises:
            ManifestMismatch: shows what differs.
        """
        found = [
            f"{name}: manifest has the weights {was}, here are {weights.get(name, 'none')}"
            for name, was in self.weights.items()
            if weights.get(name) != was
        ]
        if found:
            raise _mismatch(found, path)


def _mismatch(found: Sequence[str], path: Path) -> ManifestMismatch:
    more = len(found) - SHOWN_DIFFERENCES
    shown = [*found[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
    return ManifestMismatch(
        f"{path} is of another batch:\n  "
        + "\n  ".join(shown)
        + "\ngive what it was begun with to go on with it, another --manifest FILE to begin this one beside it, "
        f"or remove it and {parts_of(path)} to begin anew; finished pictures stay in any case"
    )


def _options_that_differ(begun: Mapping[str, str], asked: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*begun, *asked]):
        was, is_now = begun.get(name, "not given"), asked.get(name, "not given")
        if was != is_now:
            yield f"{name}: manifest {was}, here {is_now}"


def _lines_that_differ(begun: Sequence[PromptLine], asked: Sequence[PromptLine]) -> Iterator[str]:
    if len(begun) != len(asked):
        yield f"prompts: manifest {len(begun)}, here {len(asked)}"
    for number, (line, other) in enumerate(zip(begun, asked, strict=False), 1):
        yield from _fields_that_differ(f"prompt {number}: ", line, other)


def _fields_that_differ(prefix: str, begun: PromptLine | Request, asked: PromptLine | Request) -> Iterator[str]:
    for field in fields(begun):
        was, is_now = getattr(begun, field.name), getattr(asked, field.name)
        if was != is_now:
            yield f"{prefix}{field.name}: manifest {_words(was)}, here {_words(is_now)}"


def _words(value: object) -> str:
    return "not given" if value is None else repr(value)


def manifest_path(pattern: str, prompt_file: Path) -> Path:
    """Where a batch's manifest is, if nothing else is said: ``out_{seed}.png`` gives ``out.prompts.manifest.json``."""
    path = Path(pattern)
    folder = path.parent
    while "{" in str(folder):
        folder = folder.parent
    stem = path.stem
    for field in ("{seed}", "{index}", "{model}"):
        stem = stem.replace(field, "")
    words = [word for word in (stem.strip("_-. "), prompt_file.stem) if word]
    return folder / (".".join(words) + SUFFIX)


def parts_of(path: Path) -> Path:
    """The folder of parts that belongs to a manifest."""
    return path.with_name(path.name.removesuffix(SUFFIX).removesuffix(".json") + PARTS)


def to_json(manifest: Manifest) -> dict[str, Any]:
    raw = asdict(replace(manifest, encodes=(), groups=()))
    raw["encodes"] = [_job(job) | {"batches": job.batches} for job in manifest.encodes]
    raw["groups"] = [
        _job(group)
        | {
            "encode": group.encode,
            "images": group.images,
            "batches": group.batches,
            "is_upsampled": group.is_upsampled,
        }
        for group in manifest.groups
    ]
    return {"format": FORMAT, **raw}


def _job(job: EncodeJob | Group) -> dict[str, Any]:
    return {"request": asdict(job.request), "plan": job.plan.to_json(), "plan_digest": job.plan.digest}


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Replace the file, whole. The temporary one is among the parts, where a killed process leaves nothing for good."""
    temporary = parts_of(path) / ".manifest.tmp"
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(to_json(manifest), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


_NOUNS: tuple[Any, ...] = (ImageState, EncodeJob, Group, StoppedBatch, Manifest)
for _noun in _NOUNS:
    _noun.__pydantic_config__ = ConfigDict(extra="forbid")
_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def read_manifest(path: Path) -> Manifest:
    """Read what ``write_manifest`` wrote.

    Raises:
        UsageError: unreadable, or not a manifest of this version.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise UsageError(f"{path}: not a manifest that this version wrote; give another --manifest FILE")
        for name in ("encodes", "groups"):
            for entry in raw[name]:
                del entry["plan_digest"]
                entry["plan"] = Plan.from_json(entry["plan"], str(path))
        return _MANIFEST.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: not a manifest of this version: {where}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a readable manifest: {type(error).__name__}: {error}") from None
