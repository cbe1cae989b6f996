"""The prepared stores that a plan needs, made where they are missing."""

from __future__ import annotations

from dataclasses import replace

from lowmem_flux2.errors import CheckpointMissing
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import Plan, StagePlan
from lowmem_flux2.planning.preparation import prepared_as
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.runtime.observer import Observer
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.running import Running
from lowmem_flux2.runtime.store import EntryDamaged, PreparedStore, find


def prepared_stores(plan: Plan, source: ModelSource, running: Running, observer: Observer) -> dict[str, PreparedStore]:
    """The prepared store of each component that the plan quantizes and loads, by ``StagePlan.prepared_as``.

    Raises:
        CheckpointMissing: one is not there and must not be made; says the command that makes it.
    """
    return {
        stage.prepared_as: _store(stage, source, running, observer)
        for stage in plan.stages
        if FORMATS[stage.weight_format].is_prepared and not plan.is_cached(stage)
    }


def at_hand(stage: StagePlan, source: ModelSource, running: Running) -> Support:
    """What the stage's component can run in: all that is supported, or what is prepared where no more may be."""
    if running.may_prepare:
        return SUPPORTED
    assert source.folder is not None
    asked = (source.folder, prepared_as(stage, source.spec))
    formats = {
        name
        for name in SUPPORTED.weight_formats
        if not FORMATS[name].is_prepared or find(*asked, name, stage.compute_dtype, running.cache) is not None
    }
    return replace(SUPPORTED, weight_formats=frozenset(formats))


def _store(stage: StagePlan, source: ModelSource, running: Running, observer: Observer) -> PreparedStore:
    assert source.folder is not None
    asked = (prepared_as(stage, source.spec), stage.weight_format, stage.compute_dtype)
    try:
        found = find(source.folder, *asked, running.cache)
    except EntryDamaged:
        if not running.may_prepare:
            raise
        found = None
    if found is not None:
        return found
    if not running.may_prepare:
        raise CheckpointMissing(
            f"{asked[0]} in {stage.weight_format} is not prepared, and --no-prepare was given; run: "
            f"lowmem-flux2 prepare -m {source.spec.source} --component {asked[0]} "
            f"--weight-format {stage.weight_format} --dtype {stage.compute_dtype} --cache-dir {running.cache}"
        )
    made = prepare(
        source.folder,
        source.spec,
        *asked,
        running.cache,
        on_start=lambda blocks: observer.stage_started("prepare", blocks),
        on_block=observer.advanced,
        on_event=observer.event,
    )
    observer.stage_finished("prepare")
    return made
