"""Out of memory while running: what ran out, what goes on, and how that is said."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from lowmem_flux2.planning.batches import Batch, negatives_of, prompt_batches
from lowmem_flux2.planning.ladder import Resource
from lowmem_flux2.planning.plan import FormatChange, Placement, Plan, Stage, StagePlan
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.runtime.cache import EntryDamaged
from lowmem_flux2.runtime.device import exhausted, release_memory


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Whose memory ran out, and what the error said of it."""

    resource: Resource
    details: str

    @property
    def what(self) -> str:
        return "out of memory" if self.resource == "device" else "out of RAM"


def out_of_memory(attempt: Callable[[], None]) -> Exhausted | None:
    """Try it. Returns before anything is done about a failure: the error's traceback holds tensors.

    Raises:
        Exception: whatever else went wrong.
    """
    try:
        attempt()
    except (MemoryError, RuntimeError, OSError) as error:
        resource = exhausted(error)
        if resource is None:
            raise
        text = str(error).rpartition("DefaultCPUAllocator: ")[2]
        return Exhausted(resource, text.partition(". ")[0].partition("\n")[0] or "no details")
    return None


def failure_of(
    attempt: Callable[[], None], mend: Callable[[EntryDamaged], None], device: torch.device
) -> Exhausted | None:
    """``out_of_memory``, tried again with each damaged entry of the store mended that it comes upon."""
    while True:
        try:
            return out_of_memory(attempt)
        except EntryDamaged as error:
            damage = error.with_traceback(None)  # which holds tensors
            damage.__cause__ = damage.__context__ = None
        release_memory(device, after_failure=True)
        mend(damage)


@dataclass(frozen=True, slots=True)
class Begun:
    """How far the images of a stage have come: those under way, with the steps they have done, and those not begun."""

    partly: tuple[int, ...] = ()
    not_yet: tuple[int, ...] = ()
    step: int = 0


def begun_images(images: int, batch_size: int, finished_batches: int, step: int) -> Begun:
    """Of a denoise stage that has finished so many batches, and so many steps of the next."""
    first = finished_batches * batch_size
    under_way = range(first, min(first + batch_size, images)) if step else range(first, first)
    return Begun(tuple(under_way), tuple(range(first + len(under_way), images)), step)


def begun_prompts(request: Request, batch_size: int, wanted: Collection[Batch], made: Collection[Batch]) -> Begun:
    """Of an encode stage that has made these of the wanted batches; an image may need its prompt and a negative one."""
    partly: list[int] = []
    not_yet: list[int] = []
    batches = prompt_batches(request.prompts, batch_size)
    first = 0
    for pair in zip(batches, negatives_of(batches, request.negative_prompt), strict=True):
        images = range(first, first + len(pair[0]) * request.num_images_per_prompt)
        first = images.stop
        needed = [batch for batch in pair if batch in wanted]
        left = [batch for batch in needed if batch not in made]
        if left:
            (not_yet if left == needed else partly).extend(images)
    return Begun(tuple(partly), tuple(not_yet))


def with_format_change(before: Plan, lower: Plan, name: Stage, begun: Begun) -> Plan:
    """The lower plan; it records a change of the weight format, for images that are not finished."""
    was, is_now = before.stage(name).weight_format, lower.stage(name).weight_format
    if was == is_now:
        return lower
    change = FormatChange(name, was, is_now, begun.partly, begun.not_yet, begun.step)
    return replace(lower, format_changes=(*lower.format_changes, change))


def rung_words(current: StagePlan, lower: StagePlan) -> str:
    """A rung in a few words."""
    if lower.tile_px:
        return f"tiles of {lower.tile_px} px"
    words = f"{lower.count(Placement.GPU)} of {len(lower.block_placements)} blocks resident, {lower.slots} slots"
    if lower.chunk_tokens != current.chunk_tokens:
        words += f", chunks of {lower.chunk_tokens} tokens"
    if lower.weight_format != current.weight_format:
        words += f", and {lower.weight_format} weights in place of {current.weight_format}, which changes the picture"
    return words


def last_rung(name: Stage, failure: Exhausted) -> str:
    """What is wrong and what to do, where no plan has a lower peak."""
    advice = {
        "upsample": "or upsample fewer prompts at a time",
        "encode": "or take a smaller --text-weight-format",
        "reference": "or reduce the reference images with --image-size",
        "denoise": "or ask for a smaller picture, a smaller --weight-format, or allow one with --allow-format-change",
        "decode": "or ask for a smaller picture",
    }
    user = "the device" if failure.resource == "device" else "RAM"
    remedy = f"close what else uses {user}, {advice[name]}"
    return f"{name}: {failure.what}, and no plan has a lower peak ({failure.details}); {remedy}"
