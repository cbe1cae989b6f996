"""Batches of prompts from a file: made in one go, killed, interrupted and gone on with, to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import torch
from command_line import Run, runner, signals_in
from PIL import Image

from lowmem_flux2.planning.sources import resolve_model

PROMPTS = ["a red circle", "a blue dog", "a green square"]
ASKED = ["-W", "96", "-H", "64", "--steps", "2", "-s", "7", "--max-sequence-length", "64", "--dtype", "fp32"]
LINES: list[dict[str, Any]] = [
    {"prompt": PROMPTS[0], "num_images": 2},
    {"prompt": PROMPTS[1], "width": 64, "height": 64, "steps": 3},
    {"prompt": PROMPTS[2], "seed": 100, "num_images": 2},
    {"prompt": PROMPTS[1], "num_images": 2},
]
NAMES = {"out_7.png", "out_8.png", "out_9.png", "out_100.png", "out_101.png", "out_12.png", "out_13.png"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)
    return runner(monkeypatch, capfd)


def write_lines(*lines: dict[str, Any], name: str = "p.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def batch(folder: Path, *more: str, file: str = "p.jsonl") -> list[str]:
    return ["generate", "-q", "-m", str(folder), "--prompt-file", file, *ASKED, "--batch-size", "2", *more]


def pictures() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path.cwd().glob("*.png")}


@pytest.fixture(scope="module")
def expected(tiny_dev: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pictures of an unbroken run of LINES on the tiny dev checkpoint."""
    from lowmem_flux2 import cli

    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_lines(*LINES)
        patch.setattr(sys, "argv", ["lowmem-flux2", *batch(tiny_dev)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        found = pictures()
    manifest = json.loads((folder / "out.p.manifest.json").read_text())
    assert {image["state"] for image in manifest["images"]} == {"done"}
    assert [image["seed"] for image in manifest["images"]] == [7, 8, 9, 100, 101, 12, 13]
    assert [group["batches"] for group in manifest["groups"]] == [[[0, 1], [3, 4], [5, 6]], [[2]]]
    assert [len(job["batches"]) for job in manifest["encodes"]] == [1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["out.p.manifest.json", "p.jsonl", *NAMES])
    return found


def test_every_line_is_made_as_it_asks(expected: dict[str, bytes], tmp_path: Path) -> None:
    assert set(expected) == NAMES
    for name, made in expected.items():
        (tmp_path / name).write_bytes(made)
    odd = Image.open(tmp_path / "out_9.png")
    assert odd.size == (64, 64)
    assert (odd.text["steps"], odd.text["prompt"], odd.text["seed"]) == ("3", PROMPTS[1], "9")
    plain = Image.open(tmp_path / "out_101.png")
    assert plain.size == (96, 64)
    assert (plain.text["steps"], plain.text["prompt"], plain.text["seed"]) == ("2", PROMPTS[2], "101")
    assert len(set(expected.values())) == len(expected)


def test_each_component_is_loaded_as_seldom_as_can_be(
    run: Run, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two guidance passes, of which one group has a negative prompt: all are encoded in one stage."""
    from lowmem_flux2.runtime.decode import Decoder
    from lowmem_flux2.runtime.denoise import Denoiser
    from lowmem_flux2.runtime.encode import TextEncoder

    loads: list[str] = []
    for owner in (TextEncoder, Denoiser, Decoder):
        before = owner.__init__

        def counted(self: Any, *arguments: Any, before: Any = before, name: str = owner.__name__, **named: Any) -> None:
            loads.append(name)
            before(self, *arguments, **named)

        monkeypatch.setattr(owner, "__init__", counted)
    lines = [*LINES, {"prompt": PROMPTS[0], "negative_prompt": "a cat"}]
    write_lines(*lines)
    ran = run(*batch(tiny_klein, "--guidance", "4", "--report", "r.json"))
    assert ran.code == 0, ran.err
    assert loads == ["TextEncoder", *["Denoiser"] * 3, *["Decoder"] * 3]
    assert sorted(path.name for path in Path.cwd().glob("r*.json")) == [f"r_{number}.json" for number in range(1, 4)]
    again = run(*batch(tiny_klein, "--guidance", "4"))
    assert again.code == 0
    assert "all 8 images are done" in again.out
    assert len(loads) == 7


@pytest.mark.parametrize("more", [[], ["--guidance", "4", "--negative-prompt", "a cat"]])
def test_lines_that_are_alike_make_what_one_run_makes(more: list[str], run: Run, tiny_klein: Path) -> None:
    asked = ["generate", "-q", "-m", str(tiny_klein), *ASKED, *more, "--num-images", "2", "--batch-size", "4"]
    prompts = [word for prompt in PROMPTS for word in ("-p", prompt)]
    assert run(*asked, *prompts, "-o", "one_{seed}.png").code == 0
    Path("p.txt").write_text("\n".join(PROMPTS[1:]))
    ran = run(*asked, "-p", PROMPTS[0], "--prompt-file", "p.txt", "--report", "report.json")
    assert ran.code == 0, ran.err
    found = pictures()
    for seed in range(7, 13):
        assert found[f"one_{seed}.png"] == found[f"out_{seed}.png"]
    report = json.loads(Path("report.json").read_text())
    assert [stage["stage"] for stage in report["measured"]["stages"]] == ["encode", "denoise", "decode"]
    assert [image["seed"] for image in report["images"]] == list(range(7, 13))


def test_a_line_has_its_own_lora(run: Run, tiny_dev: Path) -> None:
    dims = resolve_model(str(tiny_dev)).spec.transformer
    file = loras.write(Path("added.safetensors"), loras.diffusers_keys(loras.factors(dims, size=0.3)))
    write_lines(*[{"prompt": PROMPTS[0], "seed": 7, **more} for more in ({}, {"lora": f"{file}:0.5"}, {"lora": []})])
    ran = run(*batch(tiny_dev, "--lora", str(file), "-o", "out_{index}.png"))
    assert ran.code == 0, ran.err
    plain = ["generate", "-q", "-m", str(tiny_dev), *ASKED, "-p", PROMPTS[0]]
    for index, flags in enumerate((["--lora", str(file)], ["--lora", f"{file}:0.5"], [])):
        assert run(*plain, *flags, "-o", f"one_{index}.png").code == 0
        assert Path(f"one_{index}.png").read_bytes() == Path(f"out_{index}.png").read_bytes()
    assert len(set(pictures().values())) == 3
    assert "0.5" in Image.open("out_1.png").text["lora"]
    assert "lora" not in Image.open("out_2.png").text


def test_a_line_has_its_own_reference_images(run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_flux2.runtime.forward import Forward

    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(noise.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(name)
    given: list[dict[str, Any]] = [{"image": "a.png"}, {"image": ["b.png", "a.png"]}, {}]
    write_lines(*[{"prompt": PROMPTS[0], "seed": 7, **more} for more in given])
    mine = batch(tiny_dev, "-o", "out_{index}.png")
    with monkeypatch.context() as patch:
        signals_in(patch, Forward, "predict", 3)
        assert run(*mine).code == 130
    kept = Path("a.png").read_bytes()
    Path("a.png").write_bytes(Path("b.png").read_bytes())
    changed = run(*mine)
    assert changed.code == 2 and "a.png: manifest " in changed.err
    Path("a.png").write_bytes(kept)
    ran = run(*mine)
    assert ran.code == 0, ran.err
    plain = ["generate", "-q", "-m", str(tiny_dev), *ASKED, "-p", PROMPTS[0]]
    for index, names in enumerate((["a.png"], ["b.png", "a.png"], [])):
        flags = [word for name in names for word in ("--image", name)]
        assert run(*plain, *flags, "-o", f"one_{index}.png").code == 0
        assert Path(f"one_{index}.png").read_bytes() == Path(f"out_{index}.png").read_bytes()


@pytest.mark.parametrize("step_cache", ["taylor:interval=3,warmup=2", "first-block:threshold=1.0,warmup=2"])
def test_a_step_cache_goes_on_where_it_was(
    step_cache: str, run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits after the stop are made of what the cache kept before it."""
    from lowmem_flux2.runtime.denoise import Denoiser
    from lowmem_flux2.runtime.forward import Forward

    write_lines({"prompt": PROMPTS[0], "steps": 7})
    command = batch(tiny_dev, "--step-cache", step_cache)
    assert run(*command, "-o", "whole_{seed}.png").code == 0
    with monkeypatch.context() as patch:
        signals_in(patch, Forward, "predict", 3)
        stopped = run(*command, "-o", "then_{seed}.png")
    assert stopped.code == 130 and "steps of the next batch" in stopped.err
    begun: list[int] = []
    real = Denoiser.denoise

    def denoise(self: Any, *given: Any, **named: Any) -> Any:
        begun.append(named["progress"].step)
        return real(self, *given, **named)

    monkeypatch.setattr(Denoiser, "denoise", denoise)
    assert run(*command, "-o", "then_{seed}.png").code == 0
    assert begun[0] >= 2
    assert Path("whole_7.png").read_bytes() == Path("then_7.png").read_bytes()


def test_a_batch_is_interrupted_again_and_again(
    run: Run, tiny_dev: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In encode; in a step of the first and of the second batch; at once; while pictures are made."""
    from lowmem_flux2.runtime.decode import Decoder
    from lowmem_flux2.runtime.encode import TextEncoder
    from lowmem_flux2.runtime.forward import Forward

    write_lines(*LINES)
    stops: list[tuple[type, str, int, int, str]] = [
        (TextEncoder, "_begin", 1, 1, "0 of 7 images are done, 0 denoised"),
        (Forward, "predict", 1, 1, "0 of 7 images are done, 0 denoised, 1 steps of the next batch"),
        (Forward, "predict", 2, 1, "0 of 7 images are done, 2 denoised, 1 steps of the next batch"),
        (Forward, "predict", 1, 2, "0 of 7 images are done, 2 denoised, 1 steps of the next batch"),
        (Decoder, "decode", 3, 1, "3 of 7 images are done, 4 denoised"),
        (Decoder, "decode", 3, 2, "5 of 7 images are done, 2 denoised"),
    ]
    command = shlex.join(["lowmem-flux2", *batch(tiny_dev)])
    for owner, name, call, signals, said in stops:
        with monkeypatch.context() as patch:
            signals_in(patch, owner, name, call, signals)
            stopped = run(*shlex.split(command)[1:])
        assert stopped.code == 130, stopped.err
        assert f"interrupted: {said}: out.p.manifest.json" in stopped.err
        command = next(line for line in stopped.err.splitlines() if line.startswith("  lowmem-flux2 generate"))
    with monkeypatch.context() as patch:
        for owner in (TextEncoder, Forward):
            patch.setattr(owner, "__init__", lambda *_, **__: pytest.fail("nothing is left but to decode"))
        last = run(*shlex.split(command)[1:])
    assert last.code == 0, last.err
    assert len(last.out.splitlines()) == 2
    assert pictures() == expected
    assert not Path("out.p.parts").exists()


def test_a_failure_says_how_to_go_on(
    run: Run, tiny_dev: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_flux2.runtime.decode import Decoder

    write_lines(*LINES)
    with monkeypatch.context() as patch:
        patch.setattr(
            Decoder, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
        )
        failed = run(*batch(tiny_dev))
    assert failed.code == 5
    assert "decode: out of memory" in failed.err
    assert "0 of 7 images are done, 7 denoised: out.p.manifest.json; this goes on there:\n  lowmem-flux2" in failed.err
    # What is found to be gone or damaged is made again, and nothing else.
    latents = Path("out.p.parts/latents_0_1.safetensors")
    latents.write_bytes(latents.read_bytes()[:-1])
    Path("out_9.png").write_text("mine")
    again = run(*batch(tiny_dev))
    assert again.code == 0, again.err
    assert "its latents are gone or damaged" in again.err
    assert Path("out_9.png").read_text() == "mine"
    assert Path("out_9_2.png").read_bytes() == expected["out_9.png"]
    for name in NAMES - {"out_9.png"}:
        assert Path(name).read_bytes() == expected[name]
    Path("out_100.png").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in Path.cwd().glob("*.png")}
    last = run(*batch(tiny_dev))
    assert last.code == 0, last.err
    assert "out_100.png is gone: it is made again" in last.err
    assert Path("out_100.png").read_bytes() == expected["out_100.png"]
    assert all(Path(name).stat().st_mtime_ns == at for name, at in times.items())


def test_another_batch_is_refused_and_told_apart(run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_flux2.runtime.denoise import Denoiser

    folder = Path(shutil.copytree(tiny_dev, Path.cwd() / "model"))
    write_lines(*LINES)
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "__init__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*batch(folder)).code == 130
    write_lines(LINES[0] | {"prompt": "a cat", "width": 128}, *LINES[1:])
    ran = run(*batch(folder))
    assert ran.code == 2
    assert "out.p.manifest.json is of another batch:" in ran.err
    assert "prompt 1: prompt: manifest 'a red circle', here 'a cat'" in ran.err
    assert "prompt 1: width: manifest not given, here 128" in ran.err
    assert "another --manifest FILE" in ran.err and "remove it and out.p.parts" in ran.err
    write_lines(*LINES[1:])
    assert "prompts: manifest 4, here 3" in run(*batch(folder)).err
    write_lines(*LINES)
    for flags, said in (
        (["--guidance", "3"], "--guidance: manifest not given, here 3.0"),
        (["-s", "8"], "--seed: manifest 7, here 8"),
        (["--weight-format", "int8"], "--weight-format: manifest not given, here int8"),
        (["--no-metadata"], "--no-metadata: manifest not given, here given"),
    ):
        ran = run(*batch(folder), *flags)
        assert ran.code == 2 and said in ran.err, ran.err
    weights = next((folder / "transformer").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ran = run(*batch(folder))
    assert ran.code == 2 and "transformer: manifest has the weights" in ran.err
    weights.write_bytes(whole)  # the same again, at another time and in another place
    Path("elsewhere").mkdir()
    moved = folder.rename(Path.cwd() / "elsewhere" / "model")
    ran = run(*batch(moved))
    assert ran.code == 0, ran.err
    assert set(pictures()) == NAMES
    Path("out.p.manifest.json").write_text("{}")
    ran = run(*batch(moved))
    assert ran.code == 2 and "not a manifest that this version wrote" in ran.err
    dry = run(*batch(moved), "--manifest", "other.json", "--dry-run")
    assert dry.code == 0 and "1 of 2: 6 images, 6 to make" in dry.out
    assert not Path("other.json").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x", "widht": 64}', "p.jsonl:2: unknown key 'widht'; known: prompt, width"),
        ('{"prompt": "x", "width": "64"}', "p.jsonl:2: width: Input should be a valid integer"),
        ('{"prompt": "x", "width": 65}', "p.jsonl:2: width 65 px is not a multiple of"),
        ('{"width": 64}', "p.jsonl:2: prompt: "),
        ('["x"]', "p.jsonl:2: must be a JSON object"),
        ('{"prompt": "x"', "p.jsonl:2: not JSON"),
        ('{"prompt": "x", "seed": -1}', "p.jsonl:2: the seed must be"),
        ('{"prompt": "x", "num_images": 0}', "p.jsonl:2: the number of images"),
        ('{"prompt": "x", "negative_prompt": "y", "guidance": 1}', "p.jsonl:2: a negative prompt has no effect"),
        ('{"prompt": "x", "seed": 1, "seed": 2}', "p.jsonl:2: the key 'seed' is there more than once"),
        ('{"prompt": " "}', "p.jsonl:2: the prompt is empty"),
        ('{"prompt": "x", "lora": "none.safetensors"}', "p.jsonl:2: "),
        ('{"prompt": "x", "caption_upsample": 0.15}', "p.jsonl:2: caption upsampling: shapes is of the klein form"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str, run: Run) -> None:
    Path("p.jsonl").write_text('{"prompt": "a red circle"}\n' + line + "\n")
    ran = run("generate", "--prompt-file", "p.jsonl")
    assert ran.code == (4 if "lora" in line else 2)
    assert said in ran.err


def test_what_does_not_go_with_a_batch_is_refused(run: Run) -> None:
    Path("p.txt").write_text('{"prompt": "x"}\n')
    for arguments, said in (
        (["--prompt-file", "p.txt"], "p.txt:1: this line is JSON"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: cannot read it"),
        (["--prompt-file", "p.txt", "--save-latents", "x"], "--save-latents: a --prompt-file batch"),
        (["-p", "x", "--manifest", "m.json"], "--manifest is of a --prompt-file batch"),
    ):
        ran = run("generate", *arguments)
        assert ran.code == 2 and said in ran.err, ran.err


# ------------------------------------------------------------------------------------------------------------ killed


def written(folder: Path) -> set[tuple[str, int]]:
    """Every file that is there, as it is now."""
    found = set()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def test_killed_five_times_at_random_moments_it_ends_with_the_same_files(tmp_path: Path) -> None:
    """SIGKILL, to the command itself, after a random number of files that it replaced and a random moment more."""
    sizes = [{}, {"width": 48, "height": 64}]
    lines = [{"prompt": f"{PROMPTS[at % 3]} {at}", **sizes[at % 2]} for at in range(12)]
    asked = ["generate", "-q", "--prompt-file", "p.jsonl", "--steps", "2", "-s", "3", "--batch-size", "1"]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(Path(__file__).with_name("forking.py"))]
    moments = random.Random(6)
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as fork:
        assert fork.stdin is not None and fork.stdout is not None

        def start(folder: Path) -> int:
            more = ["--prompt-file", str(folder / "p.jsonl"), "-o", str(folder / "out_{index}.png")]
            fork.stdin.write(json.dumps([*asked, *more]) + "\n")
            fork.stdin.flush()
            return int(fork.stdout.readline())

        for folder in folders:
            folder.mkdir()
            (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        start(folders[0])
        assert int(fork.stdout.readline()) == 0
        codes = []
        for _ in range(5):
            changes, seen = moments.randrange(6), written(folders[1])
            before = len(seen)
            child = start(folders[1])
            while len(seen) <= changes + before and Path("/proc", str(child)).exists():
                seen |= written(folders[1])
            time.sleep(moments.uniform(0, 0.02))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            codes.append(int(fork.stdout.readline()))
        assert codes == [-signal.SIGKILL] * 5
        start(folders[1])
        assert int(fork.stdout.readline()) == 0
        fork.stdin.close()
    found = [{path.name: path.read_bytes() for path in folder.glob("*.png")} for folder in folders]
    assert len(found[0]) == 12
    assert found[0] == found[1]
    assert {path.name for path in folders[1].iterdir()} == {*found[0], "p.jsonl", "out.p.manifest.json"}
