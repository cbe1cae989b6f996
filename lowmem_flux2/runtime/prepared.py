"""The prepared stores that a plan needs, made where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from lowmem_flux2.errors import CheckpointMissing
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import Plan, StagePlan
from lowmem_flux2.planning.preparation import prepared_as
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.runtime.cache import EntryDamaged
from lowmem_flux2.runtime.observer import Observer
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.store import PreparedStore, find


def prepared_stores(
    plan: Plan, source: ModelSource, running: Running, observer: Observer, event: Callable[[str], None]
) -> dict[str, PreparedStore]:
    """The prepared store of each component that the plan quantizes and loads, by ``StagePlan.prepared_as``.

    Args:
        event: told of what is damaged and made anew, and of other processes that are waited for.

    Raises:
        CheckpointMissing: one is not there and must not be made; says the command that makes it.
        EntryDamaged: one is damaged, and must not be made.
    """
    return {
        stage.prepared_as: prepared_store(stage, source, running, observer, event)
        for stage in plan.stages
        if FORMATS[stage.weight_format].is_prepared and not plan.is_cached(stage)
    }


def at_hand(stage: StagePlan, source: ModelSource, running: Running) -> Support:
    """What the stage's component can run in: all that is supported, or what is prepared where no more may be."""
    if running.may_prepare:
        return SUPPORTED
    assert source.folder is not None
    asked = (source.folder, prepared_as(stage, source.spec))

    def is_there(name: str) -> bool:
        with suppress(EntryDamaged):
            return not FORMATS[name].is_prepared or find(*asked, name, stage.compute_dtype, running.cache) is not None
        return False

    return replace(SUPPORTED, weight_formats=frozenset(filter(is_there, SUPPORTED.weight_formats)))


def prepared_store(
    stage: StagePlan,
    source: ModelSource,
    running: Running,
    observer: Observer,
    event: Callable[[str], None],
    damage: EntryDamaged | None = None,
) -> PreparedStore:
    """The store of one stage: what is there, unless ``damage`` was found in it while it was read.

    Raises:
        CheckpointMissing, EntryDamaged: as ``prepared_stores``.
    """
    assert source.folder is not None
    asked = (prepared_as(stage, source.spec), stage.weight_format, stage.compute_dtype)
    if running.may_prepare:
        return prepare(
            source.folder,
            source.spec,
            *asked,
            running.cache,
            on_start=lambda blocks: observer.stage_started("prepare", blocks),
            on_block=observer.advanced,
            on_end=lambda: observer.stage_finished("prepare"),
            on_event=event,
            damage=damage,
        )
    if damage is not None:
        raise damage
    found = find(source.folder, *asked, running.cache)
    if found is None:
        raise CheckpointMissing(
            f"{asked[0]} in {stage.weight_format} is not prepared, and --no-prepare was given; run: "
            f"lowmem-flux2 prepare -m {source.spec.source} --component {asked[0]} "
            f"--weight-format {stage.weight_format} --dtype {stage.compute_dtype} --cache-dir {running.cache}"
        )
    return found
