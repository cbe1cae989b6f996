"""A batch as it is asked for: lines and flags to groups of equal lines, seeds, file names and plans. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowmem_flux2.arguments import Asked, resolve
from lowmem_flux2.errors import CheckpointError, UsageError
from lowmem_flux2.flags import FitFlags, RequestFlags
from lowmem_flux2.planning.adapter_file import read_adapter
from lowmem_flux2.planning.batches import prompt_batches
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection
from lowmem_flux2.planning.prompt_file import Located, PromptLine, read_prompt_file
from lowmem_flux2.planning.upsampling import BATCH_PROMPTS
from lowmem_flux2.planning.workload import MAX_SEED, Request, guidance_passes, image_seeds
from lowmem_flux2.runtime.manifest import EncodeJob, Group, ImageState, Manifest, own_encode

GROUP_MOST_IMAGES = 64
"""Images that share a plan and a load of the transformer, and prompts that share one of the encoder: embeddings of all
are in RAM together, 15 MiB a prompt of dev's."""


@dataclass(frozen=True, slots=True)
class AskedGroup:
    """Lines of equal size, steps and all else.

    Args:
        asked: what flags and lines say together.
        lines: indexes of its lines.
    """

    asked: Asked
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """All lines, in groups, with the seeds that were given or drawn."""

    lines: tuple[PromptLine, ...]
    groups: tuple[AskedGroup, ...]
    seeds: tuple[int, ...]
    options: dict[str, str]

    @property
    def asked(self) -> Asked:
        """Of the first group: model, machine and selection are those of all."""
        return self.groups[0].asked

    @property
    def first_images(self) -> list[int]:
        """The index of each line's first image."""
        counts = {line: group.asked.request.num_images_per_prompt for group in self.groups for line in group.lines}
        return [sum(counts[line] for line in range(at)) for at in range(len(self.lines))]


def batch_request(
    flags: RequestFlags,
    fit: FitFlags,
    selection: Selection,
    seed: int | None,
    options: dict[str, str],
    cache: Path | None = None,
    *,
    to_plan: bool = False,
) -> BatchRequest:
    """Read the prompt file and resolve what each of its lines asks for.

    Args:
        options: more that was typed and decides the pictures, for the manifest.
        cache: the cache folder.
        to_plan: nothing is made of it, so that sizes may stand for reference images.

    Raises:
        UsageError, CheckpointError: a line that cannot be honoured: file, line and why.
    """
    assert flags.prompt_file is not None
    given = [Located(PromptLine(prompt), "-p") for prompt in flags.prompt or ()]
    located = (*given, *read_prompt_file(flags.prompt_file))
    alike: list[tuple[Asked, list[int]]] = []
    for members in _written_alike([each.line for each in located]):
        first = located[members[0]]
        try:
            line = _with_line(flags, first.line)
            stand_in = "(no prompt)" if to_plan else ""
            asked = resolve(line, fit, selection, (first.line.prompt,), without_prompt=stand_in, cache=cache)
            for lora in asked.request.loras if first.line.lora else ():
                read_adapter(lora, asked.source.spec)  # else planning would find what is wrong, and know no line
        except (UsageError, CheckpointError) as error:
            own = _OVERRIDES if isinstance(error, UsageError) else ("lora",)  # the model is the flags'
            if first.where == "-p" or all(getattr(first.line, key) is None for key in own):
                raise
            raise type(error)(f"{first.where}: {error}") from error
        bare = replace(asked, request=replace(asked.request, prompts=()))
        for other, others in alike:  # a line may say what the flags or the model's defaults say anyway
            if other.request == bare.request:
                others += members
                break
        else:
            alike.append((bare, list(members)))
    groups = []
    for asked, members in alike:
        for part in _parts(sorted(members), asked.request):
            prompts = tuple(located[at].line.prompt for at in part)
            groups.append(AskedGroup(replace(asked, request=replace(asked.request, prompts=prompts)), part))
    lines = tuple(each.line for each in located)
    options = {**_options(flags, selection, seed), "device": groups[0].asked.machine.hardware.device, **options}
    if not to_plan:
        options |= _references(groups)
    batch = BatchRequest(lines, tuple(groups), (), options)
    return replace(batch, seeds=_seeds(batch, located, seed))


_OVERRIDES = (
    *("width", "height", "num_images", "negative_prompt", "image", "lora", "steps", "guidance", "caption_upsample"),
)


def _written_alike(lines: Sequence[PromptLine]) -> list[list[int]]:
    """Indexes of lines that differ in their prompts and seeds alone."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, line in enumerate(lines):
        found.setdefault(tuple(getattr(line, key) for key in _OVERRIDES), []).append(index)
    return list(found.values())


def _with_line(flags: RequestFlags, line: PromptLine) -> RequestFlags:
    said = {key: getattr(line, key) for key in _OVERRIDES if getattr(line, key) is not None}
    if line.lora is not None:
        said["lora"] = list(line.lora)
    if line.image is not None:
        said["image"] = list(line.image)
        if not line.image:
            said["image_size"] = None
    return replace(flags, prompt=None, prompt_file=None, **said)


def _parts(lines: Sequence[int], request: Request) -> Iterator[tuple[int, ...]]:
    size = max(1, GROUP_MOST_IMAGES // request.num_images_per_prompt)
    if request.caption_upsample_temperature is not None:  # those of a group are rewritten together
        size = min(size, BATCH_PROMPTS)
    for at in range(0, len(lines), size):
        yield tuple(lines[at : at + size])


def _seeds(batch: BatchRequest, located: Sequence[Located], seed: int | None) -> tuple[int, ...]:
    """Image i has seed + i; a line's own seed counts from its first image."""
    counts = {line: group.asked.request.num_images_per_prompt for group in batch.groups for line in group.lines}
    seeds = image_seeds(seed, sum(counts.values()))
    for index, first in enumerate(batch.first_images):
        own = located[index].line.seed
        if own is not None:
            if not 0 <= own <= MAX_SEED - counts[index]:
                raise UsageError(f"{located[index].where}: the seed must be 0 to {MAX_SEED - counts[index]}, not {own}")
            seeds[first : first + counts[index]] = range(own, own + counts[index])
    return tuple(seeds)


_ELSEWHERE = (
    *("prompt", "prompt_file", "offline", "max_vram_bytes", "max_ram_bytes"),
    *("model", "text_encoder", "vae", "revision"),
)
"""What decides no pixel, or is compared line by line, or by what is in the model's files; caps bind the plan whatever
they are."""


def _references(groups: Sequence[AskedGroup]) -> dict[str, str]:
    """What is in each reference image's file."""
    names = dict.fromkeys(one.name for group in groups for one in group.asked.request.references)
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] for name in names}


def _options(flags: RequestFlags, selection: Selection, seed: int | None) -> dict[str, str]:
    """What was typed, by flag, without what was left to its default."""
    typed = {**asdict(flags), **asdict(selection), "seed": seed}
    plain = {**asdict(RequestFlags()), **asdict(Selection()), "seed": None}
    found = {f"--{key.replace('_', '-')}": str(value) for key, value in typed.items() if value != plain[key]}
    return {key: value for key, value in found.items() if key[2:].replace("-", "_") not in _ELSEWHERE}


# ------------------------------------------------------------------------------------------------------- planning


def manifest_of(
    batch: BatchRequest, plan: Callable[[Asked], Plan], paths: Sequence[str], versions: dict[str, str]
) -> Manifest:
    """The batch with nothing done: every plan made, every batch's composition fixed.

    Args:
        plan: makes the plan for a request.
        paths: the file of each image, relative to the manifest.
    """
    images: list[ImageState | None] = [None] * len(batch.seeds)
    first = batch.first_images
    groups: list[Group] = []
    for group in batch.groups:
        made, repeats = plan(group.asked), group.asked.request.num_images_per_prompt
        indexes = tuple(first[line] + copy for line in group.lines for copy in range(repeats))
        for at, index in enumerate(indexes):
            images[index] = ImageState(group.lines[at // repeats], batch.seeds[index], paths[index])
        size = made.stage("denoise").batch_size
        batches = tuple(indexes[at : at + size] for at in range(0, len(indexes), size))
        groups.append(Group(group.asked.request, made, 0, indexes, batches))
    encodes: tuple[EncodeJob, ...]
    temperatures = [group.asked.request.caption_upsample_temperature for group in batch.groups]
    if len(groups) == 1 or any(temperatures):
        # As the prompts of one run are encoded; what upsampled ones will be is not known yet.
        encodes = tuple(own_encode(group) for group in groups)
        groups = [replace(group, encode=number) for number, group in enumerate(groups)]
    else:
        encodes, groups = _shared_encodes(batch, groups, plan)
    whole = tuple(image for image in images if image is not None)
    return Manifest(batch.lines, batch.options, {}, versions, encodes, tuple(groups), whole)


def _shared_encodes(
    batch: BatchRequest, groups: list[Group], plan: Callable[[Asked], Plan]
) -> tuple[tuple[EncodeJob, ...], list[Group]]:
    """Jobs that take the prompts of as many whole groups as belong together; equal prompts are encoded once."""
    spec = batch.asked.source.spec
    smallest = min(batch.groups, key=lambda group: group.asked.request.width * group.asked.request.height).asked
    jobs: list[dict[str, None]] = [{}]
    placed = []
    for group in groups:
        texts = dict.fromkeys(_texts(group, spec))
        if jobs[-1] and len(jobs[-1] | texts) > GROUP_MOST_IMAGES:
            jobs.append({})
        jobs[-1].update(texts)
        placed.append(replace(group, encode=len(jobs) - 1))
    encodes = []
    for texts in jobs:
        request = replace(
            smallest.request,
            prompts=tuple(texts),
            num_images_per_prompt=1,
            negative_prompt=None,
            references=(),
            loras=(),
        )
        if guidance_passes(spec, request.guidance_scale) == 2:  # negative prompts are among the texts
            request = replace(request, guidance_scale=1.0)
        made = plan(replace(smallest, request=request))
        batches = prompt_batches(request.prompts, made.stage("encode").batch_size)
        encodes.append(EncodeJob(request, made, tuple(batches)))
    return tuple(encodes), placed


def _texts(group: Group, spec: ModelSpec) -> list[str]:
    negative = group.request.negative_prompt or ""
    is_guided = guidance_passes(spec, group.request.guidance_scale) == 2
    return [*group.request.prompts, *([negative] if is_guided else [])]


def free_paths(names: Sequence[Path], folder: Path) -> list[str]:
    """A name for each image that no file and no other image has, relative to a folder."""
    taken: set[Path] = set()
    found = []
    for name in names:
        path, number = name, 1
        while path in taken or path.exists():
            number += 1
            path = name.with_name(f"{name.stem}_{number}{name.suffix}")
        taken.add(path)
        found.append(os.path.relpath(path.absolute(), folder.absolute()))
    return found
