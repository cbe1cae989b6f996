"""``lowmem-flux2 bench``, parsed: which of the two benches, of what, on which machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from typer import Context

from lowmem_flux2.arguments import resolve, selection_of, typed_words
from lowmem_flux2.errors import UsageError
from lowmem_flux2.flags import FitFlags, RequestFlags
from lowmem_flux2.planning.sources import EMBEDDED
from lowmem_flux2.units import parse_bytes

PROMPT = "a large red circle in the center on a blue background"
ITS_OWN = frozenset({"cap", "fidelity", "images", "output", "seed", "weight_format", "text_weight_format"})
"""Parameters that are no flags of ``generate``, or that each run has its own of."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was typed besides the request and the machine.

    Args:
        seed: of the first picture.
        caps: on the compute device's memory; None for some of the bench's own.
        fidelity: compare pictures, not memory and time.
        images: pictures a variant, of ``fidelity``.
        output: folder for the results.
        cache: folder of prepared weights.
    """

    seed: int
    caps: list[str] | None
    fidelity: bool
    images: int
    output: Path
    cache: Path | None


def bench(context: Context, flags: RequestFlags, fit: FitFlags, wanted: Wanted, console: Console) -> None:
    """Run the bench that was asked for.

    Raises:
        UsageError: flags that do not go with it.
        DoesNotFit: the request does not fit the machine at all.
    """
    if wanted.fidelity:
        _compare_pictures(flags, fit, wanted, console)
        return
    from lowmem_flux2.bench import MemoryBench, run_bench

    if flags.prompt_file is not None:
        raise UsageError("bench: --prompt-file goes with --fidelity; give one --prompt")
    try:
        caps = tuple(sorted({parse_bytes(cap) for cap in wanted.caps or ()}))
    except UsageError as error:
        raise UsageError(f"--cap: {error}") from None
    asked = resolve(flags, fit, selection_of(fit), tuple(flags.prompt or (PROMPT,)), cache=wanted.cache)
    capped = "max_ram" if asked.machine.hardware.device == "cpu" else "max_vram"
    if caps and getattr(fit, capped) is not None:
        raise UsageError(f"bench: --cap and --{capped.replace('_', '-')} cap the same memory; leave one out")
    words = typed_words(context, ITS_OWN | {capped})
    if flags.prompt is None:
        words = *words, "--prompt", PROMPT
    run_bench(MemoryBench(asked, words, wanted.seed, caps), wanted.output, console)


def _compare_pictures(flags: RequestFlags, fit: FitFlags, wanted: Wanted, console: Console) -> None:
    from lowmem_flux2.fidelity import measure_fidelity, prompts_for
    from lowmem_flux2.variants import Setting

    if wanted.caps:
        raise UsageError("bench --fidelity: --cap is of the other bench; cap with --max-vram and --max-ram")
    taken = RequestFlags(
        model=flags.model, prompt_file=flags.prompt_file, width=flags.width, height=flags.height, steps=flags.steps
    )
    machine = FitFlags(
        profile=fit.profile, device=fit.device, dtype=fit.dtype, max_vram=fit.max_vram, max_ram=fit.max_ram
    )
    if (flags, fit) != (taken, machine):
        raise UsageError(
            "bench --fidelity takes -m, --prompt-file, -W, -H, --steps, -s, --images, --dtype, --profile, --device, "
            "--max-vram, --max-ram, --cache-dir and -o: the rest is what it compares, or the model's own"
        )
    model = flags.model or EMBEDDED
    setting = Setting(
        model,
        prompts_for(model, flags.prompt_file, wanted.images),
        wanted.seed,
        fit.dtype,
        flags.steps or 0,
        flags.width or 0,
        flags.height or 0,
        # A batch of a large model's pictures takes more memory than most cards have.
        batch=16 if model == EMBEDDED else 1,
        profile=fit.profile,
        device=fit.device,
        max_vram=fit.max_vram,
        max_ram=fit.max_ram,
        cache=wanted.cache,
    )
    measure_fidelity(setting, wanted.output, console)
