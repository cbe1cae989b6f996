"""``lowmem-flux2 generate``, after planning: run the plan, save each picture, report. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from lowmem_flux2.arguments import Asked
from lowmem_flux2.console import ConsoleObserver
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.report import ImageRecord, write_report
from lowmem_flux2.runtime.engine import Engine
from lowmem_flux2.runtime.images import to_pil
from lowmem_flux2.runtime.inputs import Inputs
from lowmem_flux2.runtime.picture import OutputPattern, describe, save_png
from lowmem_flux2.runtime.versions import versions


@dataclass(frozen=True, slots=True)
class Running:
    """What only a run needs to know: the device, and where weights may come from."""

    device: str
    offline: bool
    cache_dir: Path | None
    prompt_cache_bytes: int
    may_prepare: bool


def carry_out(
    asked: Asked,
    made: Plan,
    running: Running,
    pattern: OutputPattern,
    seeds: list[int],
    report_file: Path | None,
    *,
    metadata: bool,
    quiet: bool,
    out: Console,
    err: Console,
) -> None:
    """Carry the plan out, save each picture when it is decoded, print the report."""
    request = asked.request
    with ConsoleObserver(err, quiet) as observer:
        engine = Engine.of(
            asked.source,
            asked.machine,
            asked.selection,
            device=running.device,
            offline=running.offline,
            cache_dir=running.cache_dir,
            prompt_cache=running.prompt_cache_bytes,
            may_prepare=running.may_prepare,
            observer=observer,
        )
        saved: list[ImageRecord] = []

        def save(index: int, picture: torch.Tensor, carried_out: Plan) -> None:
            prompt = request.prompts[index // request.num_images_per_prompt]
            record = ImageRecord(None, seeds[index], prompt)
            texts = describe(request, carried_out, record, versions()) if metadata else {}
            path = save_png(to_pil(picture), pattern.path(seed=seeds[index], index=index, model=made.model), texts)
            saved.append(ImageRecord(str(path), seeds[index], prompt))
            out.print(f"{path}   seed {seeds[index]}", soft_wrap=True)

        result = engine.run(request, made, Inputs(on_picture=save), seeds)
    report = replace(result.report, images=tuple(saved))
    if not quiet:
        out.print(report.table())
    if report_file is not None:
        write_report(report, report_file)
