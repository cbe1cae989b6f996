"""The command line. Each command parses once, into frozen objects, and hands over.

A command imports what it needs when it is called: torch only to run, and the planner not for ``--help``, which has to
answer at once.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from lowmem_flux2 import listing
from lowmem_flux2 import options as opt
from lowmem_flux2.errors import Interrupted, LowMemFlux2Error, NotExecutable, RunError, UsageError
from lowmem_flux2.flags import FitFlags, RequestFlags, flattened
from lowmem_flux2.version import __version__

app = typer.Typer(
    name="lowmem-flux2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FLUX.2 pictures on a 6-24 GB card. Says peak VRAM, peak RAM and seconds before it runs, then keeps to them.",
)
app.add_typer(listing.app, name="profiles")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@app.command()
@flattened
def generate(
    context: typer.Context,
    flags: RequestFlags,
    fit: FitFlags,
    seed: opt.Seed = None,
    plan: opt.PlanFile = None,
    output: opt.Output = "out_{seed}.png",
    report: opt.ReportFile = None,
    dry_run: opt.DryRun = False,
    no_metadata: opt.NoMetadata = False,
    quiet: opt.Quiet = False,
    cache_dir: opt.CacheDir = None,
    prompt_cache: opt.PromptCacheSize = None,
    no_prepare: opt.NoPrepare = False,
    allow_format_change: opt.AllowFormatChange = False,
    save_latents: opt.SaveLatents = None,
    from_latents: opt.FromLatents = None,
    manifest: opt.ManifestFile = None,
) -> None:
    """Make pictures from prompts.

    lowmem-flux2 generate -p "a large red circle in the center on a blue background" -s 0
    """
    from lowmem_flux2 import arguments, preparing
    from lowmem_flux2.folders import cache_folder
    from lowmem_flux2.planning.explain import explain
    from lowmem_flux2.planning.job import Machine, plan_job, replay, resolve_machine
    from lowmem_flux2.planning.plan import read_plan
    from lowmem_flux2.planning.workload import image_seeds
    from lowmem_flux2.runtime.cache import prompt_cache_limit, prompt_files
    from lowmem_flux2.runtime.picture import OutputPattern, check_writable
    from lowmem_flux2.runtime.running import Running

    prompt_bytes = prompt_cache_limit(prompt_cache)
    pattern = OutputPattern(output)
    if report is not None:
        if dry_run:
            raise UsageError("--report: --dry-run measures nothing; use 'plan --json'")
        check_writable("--report", report)
    if save_latents is not None:
        check_writable("--save-latents", save_latents)
    selection = arguments.selection_of(fit)
    goes_on, decodes = (arguments.words_to_go_on(context, decodes=decodes) for decodes in (False, True))
    again = shlex.join(["lowmem-flux2", *sys.argv[1:]])

    def running(machine: Machine) -> Running:
        options = (flags.offline, not no_prepare, allow_format_change)
        return Running(machine.device_name, cache_folder(cache_dir), prompt_bytes, *options)

    if manifest is not None and (flags.prompt_file is None or from_latents is not None):
        raise UsageError("--manifest is of a --prompt-file batch: give one, or leave it out")
    if from_latents is not None:
        arguments.check_all_is_in_the_file(flags, selection, seed, plan)
        machine = resolve_machine(fit.profile, fit.device, selection.max_ram_bytes)
        arguments.check_caps(selection, machine)
        with _interruptible():
            from lowmem_flux2.generating import Output, Parts, go_on

            written = Output(pattern, report, save_latents, not no_metadata, quiet, out, err, goes_on, decodes, again)
            parts = Parts(flags.model, flags.text_encoder, flags.vae, flags.tokenizer, cache_dir)
            go_on(from_latents, parts, machine, selection, running(machine), written, dry_run)
        return
    if flags.prompt_file is not None:
        from lowmem_flux2 import batching

        if save_latents is not None:
            raise UsageError("--save-latents: a --prompt-file batch keeps its latents itself until they are decoded")
        kept = batching.Kept(pattern, manifest, not no_metadata, preparing.cache_of(cache_dir))
        started = batching.start(flags, fit, selection, seed, kept, plan)
        if not quiet or dry_run or started.is_done:
            out.print(started.explained(), soft_wrap=started.is_done)
        if not dry_run and not started.is_done:
            with _interruptible():
                from lowmem_flux2.generating import Output

                written = Output(pattern, report, None, not no_metadata, quiet, out, err, goes_on, decodes, again)
                started.carry_out(running(started.asked.machine), written)
        return
    prompts = arguments.read_prompts(flags.prompt, flags.prompt_file)
    if plan is not None:
        replayed = read_plan(plan)
        arguments.check_nothing_is_chosen(selection)
        asked = arguments.resolve(arguments.after(flags, replayed), fit, selection, prompts, cache=cache_dir)
        made = replay(replayed, asked.source, asked.machine, asked.request, plan, selection)
    else:
        asked = arguments.resolve(flags, fit, selection, prompts, cache=cache_dir)
        prepared = preparing.prepared_of(asked.source, preparing.cache_of(cache_dir))
        made = plan_job(asked.source, asked.machine, asked.request, selection, running=True, prepared=prepared)
    seeds = image_seeds(seed, asked.request.num_images)
    may_be_cached = prompt_bytes and asked.request.caption_upsample_temperature is None
    if may_be_cached and prompt_files(cache_folder(cache_dir)) and not made.not_executable:
        from lowmem_flux2.runtime.prompt_cache import expecting_cached  # torch is imported only where it can matter

        made = expecting_cached(made, asked.source, asked.request, asked.machine.device_name, cache_folder(cache_dir))
    if not quiet or dry_run:
        out.print(explain(made, asked.source.spec))
        if warning := preparing.room_warning(made, preparing.cache_of(cache_dir)):
            err.print(warning, style="yellow", soft_wrap=True)
    if dry_run:
        return
    if made.not_executable:
        raise NotExecutable(
            "no plan that this version can carry out fits; the one above needs: " + "; ".join(made.not_executable)
        )
    with _interruptible():
        from lowmem_flux2.generating import Output, carry_out

        again += "" if seed is not None else f" -s {seeds[0]}"
        written = Output(pattern, report, save_latents, not no_metadata, quiet, out, err, goes_on, decodes, again)
        carry_out(asked, made, running(asked.machine), seeds, written)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C while running is exit code 130, a full disk or memory 5; typer on its own would make them 1."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None
    except (OSError, MemoryError) as error:
        raise RunError(f"failed while running: {error or type(error).__name__}") from error


@app.command()
@flattened
def plan(
    flags: RequestFlags,
    fit: FitFlags,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, to read or to replay.")] = False,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Also what could be planned instead: memory against time, and each neighbour."),
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Print what is planned on every card, or on --profile's, as Markdown.")
    ] = False,
    cache_dir: opt.CacheDir = None,
) -> None:
    """Say what would run, where, and what it would cost; loads nothing.

    lowmem-flux2 plan -m flux2-dev --profile rtx-3060-12gb --max-ram 32GiB
    """
    if table:
        from lowmem_flux2.planning.hardware import list_profiles
        from lowmem_flux2.tables import MODELS, document

        typed = (replace(flags, model=None), replace(fit, profile="auto"), as_json, pareto, cache_dir)
        if typed != (RequestFlags(), FitFlags(), False, False, None):
            raise UsageError("--table plans each model's own defaults: leave out all flags but -m and --profile")
        profiles = list_profiles() if fit.profile == "auto" else [fit.profile]
        sys.stdout.write(document(profiles, MODELS if flags.model is None else [flags.model]))
        return
    from lowmem_flux2.planned import print_plans

    print_plans(flags, fit, cache_dir, out, err, as_json=as_json, pareto=pareto)


@app.command()
@flattened
def simulate(
    flags: RequestFlags,
    fit: FitFlags,
    every_block: Annotated[
        bool, typer.Option("--every-block", help="Run all blocks, layers and tiles, not only those that differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Run a plan's stages on fake tensors, full-size and without weights: simulated beside predicted bytes.

    lowmem-flux2 simulate -m flux2-klein-4b --profile rtx-3060-12gb
    """
    from lowmem_flux2 import arguments
    from lowmem_flux2.planning.job import plan_job

    prompts = arguments.read_prompts(flags.prompt, flags.prompt_file)
    asked = arguments.resolve(flags, fit, arguments.selection_of(fit), prompts, without_prompt="(no prompt)")
    made = plan_job(asked.source, asked.machine, asked.request, asked.selection)
    from lowmem_flux2.simulating import compare, table_of

    found = compare(made, asked.source.spec, asked.source.configs, every_block=every_block)
    if as_json:
        sys.stdout.write(json.dumps([each.to_json() for each in found], indent=2) + "\n")
    else:
        out.print(table_of(found))


@app.command()
def prepare(
    model: opt.Model = None,
    text_encoder: opt.TextEncoder = None,
    vae: opt.Vae = None,
    tokenizer: opt.Tokenizer = None,
    weight_format: Annotated[
        str,
        typer.Option(
            "--weight-format", help="int8 (serves w8a8 too), int6, fp8, nf4, nf4-mixed (need bitsandbytes) or int4."
        ),
    ] = "int8",
    component: Annotated[
        opt.Prepared,
        typer.Option("--component", help="Both, if not given; whole_text_encoder is for upsampling captions."),
    ] = opt.Prepared.both,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    cache_dir: opt.CacheDir = None,
    list_all: Annotated[bool, typer.Option("--list", help="List what is prepared.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything that is prepared; name what is damaged.")
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", help="Remove an entry of --list, by its name; 'prompts' is the prompt cache."),
    ] = None,
) -> None:
    """Quantize a checkpoint once, block by block, so that no later start does it again.

    lowmem-flux2 prepare -m flux2-dev --weight-format int8
    """
    from lowmem_flux2 import preparing
    from lowmem_flux2.planning.job import resolve_machine
    from lowmem_flux2.planning.sources import EMBEDDED, resolve_model

    cache = preparing.cache_of(cache_dir)
    if list_all:
        out.print(preparing.listing(cache))
    elif verify:
        preparing.verify(cache, out)
    elif remove is not None:
        preparing.remove(cache, remove)
        out.print(f"removed {remove}", soft_wrap=True)
    else:
        source = resolve_model(
            model or EMBEDDED,
            revision=revision,
            offline=offline,
            text_encoder=text_encoder,
            vae=vae,
            tokenizer=tokenizer,
            cache=cache_dir,
        )
        machine = resolve_machine("auto", device)
        with _interruptible():
            preparing.prepare_all(source, machine, weight_format, component.components, dtype, cache, offline, out, err)


@app.command()
@flattened
def bench(
    context: typer.Context,
    flags: RequestFlags,
    fit: FitFlags,
    seed: opt.Seed = 0,
    cap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="A cap on VRAM (on a cpu, RAM) to run under; repeat for several.  [default: four, from the least that "
            "a plan needs to the most that it has a use for]",
        ),
    ] = None,
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="Measure what each choice that changes pixels costs in pixels instead.")
    ] = False,
    images: Annotated[
        int, typer.Option(min=2, help="With --fidelity: pictures a variant, the --prompt-file's prompts in turn.")
    ] = 64,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results; made if missing.")] = Path(
        "bench"
    ),
    cache_dir: opt.CacheDir = None,
) -> None:
    """Memory against latency: the same picture under falling caps on memory, in several weight formats.

    Each run is a process of its own, measured beside what was predicted; table, JSON, plot. Formats: --weight-format's,
    else the compute dtype, int8 and nf4. The same command goes on with a bench that was stopped.

    With --fidelity: many pictures by every weight format, step cache and VAE tile, compared; table, JSON, PNG.
    """
    from lowmem_flux2 import benching

    with _interruptible():
        benching.bench(context, flags, fit, benching.Wanted(seed or 0, cap, fidelity, images, output, cache_dir), out)


@app.command()
def calibrate(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Profile TOML to write; if not given, where --profile auto finds it."),
    ] = None,
    device: opt.Device = "auto",
    seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="About how long to measure; importing torch comes on top.")
    ] = 45,
    folder: Annotated[
        Path | None, typer.Option(help="A folder on the disk that weights lie on.  [default: the cache folder]")
    ] = None,
    from_reports: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: fit the machine's constants to the reports (generate --report) in there."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Measure this machine, so that predictions are its own: rates, overheads, disk, memory.

    lowmem-flux2 calibrate, then plan and generate as before
    """
    with _interruptible():
        from lowmem_flux2 import calibrating

        calibrating.calibrate(calibrating.Wanted(output, device, seconds, folder, from_reports, force), out)


@app.command()
def doctor() -> None:
    """Say what is installed and usable here, and what to do about the rest."""
    from lowmem_flux2.doctor import examine

    out.print(examine())


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"lowmem-flux2 {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only ``--version`` lives here."""


def main() -> NoReturn:
    """Entry point: every error raised on purpose becomes one message and its exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels when it is imported
    try:
        app()
    except LowMemFlux2Error as error:
        err.print(f"error: {error}", style="bold red", soft_wrap=True, markup=False)
        sys.exit(error.exit_code)
    sys.exit(0)
