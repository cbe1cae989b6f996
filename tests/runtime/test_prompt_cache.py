"""The prompt cache: hits are equal bit for bit, and nothing on the disk can fail a run."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.batches import waiting_bytes
from lowmem_flux2.runtime import checked, prompt_cache
from lowmem_flux2.runtime.cache import PROMPT_CACHE_BYTES, clear_prompts, prompt_cache_limit, prompt_files
from lowmem_flux2.runtime.checked import write_checked
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.layout import CheckpointBlock
from lowmem_flux2.runtime.prompt_cache import PromptCache

RED, BLUE = "a red circle", "a blue dog"
MIB = 1 << 20
ASKED: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64, "seed": 3}


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), dtype="fp32", **{"prompt_cache": "64MiB", **options})


def latents(made: Generation) -> torch.Tensor:
    images: torch.Tensor = made.images
    return images


def generate(folder: Path, prompts: list[str], options: dict[str, Any] | None = None, **asked: Any) -> Generation:
    with engine(folder, **(options or {})) as one:
        return one.generate(prompts, **{**ASKED, **asked}, output_type="latent")


class Counting:
    """Counts the encoder's loads, and the batches that go through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads = 0
        self.passes: list[list[tuple[str, ...]]] = []
        load, encode = TextEncoder.__init__, TextEncoder.encode

        def counted_load(*args: Any, **kwargs: Any) -> None:
            self.loads += 1
            load(*args, **kwargs)

        def counted_encode(encoder: TextEncoder, batches: Any, *args: Any) -> list[torch.Tensor]:
            self.passes.append(list(batches))
            return encode(encoder, batches, *args)

        monkeypatch.setattr(TextEncoder, "__init__", counted_load)
        monkeypatch.setattr(TextEncoder, "encode", counted_encode)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


# ------------------------------------------------------------------------------------------------------------ hits


@pytest.mark.parametrize("form", ["dev", "klein", "distilled"])
def test_a_repeated_run_loads_no_encoder_and_is_equal_bit_for_bit(
    form: str, folders: dict[str, Path], counting: Counting
) -> None:
    first = generate(folders[form], [RED, BLUE], guidance_scale=4.0)
    again = generate(folders[form], [RED, BLUE], guidance_scale=4.0)
    assert counting.loads == 1
    assert torch.equal(latents(first), latents(again))
    assert first.report.cached_prompts == ()
    assert again.report.cached_prompts == ((RED, BLUE, "") if form == "klein" else (RED, BLUE))
    assert [stage.stage for stage in again.report.stages] == ["denoise", "decode"][: 1 + (form != "dev")]
    assert len(again.report.events) == (form == "distilled")  # which says that guidance has no effect


def test_the_encoders_weights_are_not_loaded(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their fingerprint is taken: headers, times and a sample."""
    first = generate(tiny_klein, [RED])
    opened: list[str] = []
    load = TensorFile.__init__

    def noted(file: TensorFile, folder: Path, *args: Any) -> None:
        opened.append(folder.name)
        load(file, folder, *args)

    monkeypatch.setattr(TensorFile, "__init__", noted)
    assert torch.equal(latents(generate(tiny_klein, [RED])), latents(first))
    assert opened == ["transformer", "vae"]


def test_a_batch_is_kept_as_it_was_encoded(tiny_klein_distilled: Path, counting: Counting) -> None:
    """Who else is in a batch decides how kernels round, so neither half of a batch serves alone."""
    for prompts in ([RED, BLUE], [RED], [BLUE, RED], [RED, BLUE]):
        generate(tiny_klein_distilled, prompts)
    assert [batch for group in counting.passes for batch in group] == [(RED, BLUE), (RED,), (BLUE, RED)]


def one_by_one(made_by: Engine, prompts: list[str], **asked: Any) -> Generation:
    """With a plan that encodes each prompt as a batch of its own."""
    asked = {**ASKED, **asked}
    seed = asked.pop("seed")
    plan = made_by.plan(made_by.request(prompts, **asked))
    stages = tuple(replace(stage, batch_size=1) if stage.stage == "encode" else stage for stage in plan.stages)
    return made_by.generate(prompts, **asked, seed=seed, plan=replace(plan, stages=stages), output_type="latent")


def test_only_what_is_missing_is_encoded(tiny_klein: Path, counting: Counting) -> None:
    one_by_one(engine(tiny_klein), [RED], guidance_scale=4.0)
    made = one_by_one(engine(tiny_klein), [RED, BLUE, "a tree"], guidance_scale=4.0)
    assert counting.passes == [[(RED,), ("",)], [(BLUE,), ("a tree",)]]
    assert made.report.cached_prompts == (RED, "")
    assert made.report.plan.stage("encode").cached_batches == 2
    plain = one_by_one(engine(tiny_klein, prompt_cache="off"), [RED, BLUE, "a tree"], guidance_scale=4.0)
    assert torch.equal(latents(made), latents(plain))


def test_a_dozen_batches_go_through_the_encoder_in_one_pass(
    tiny_klein: Path, monkeypatch: pytest.MonkeyPatch, counting: Counting
) -> None:
    reads: list[str] = []
    read = CheckpointBlock.read_into

    def counted(block: CheckpointBlock, *args: Any, **kwargs: Any) -> None:
        reads.append(block.layout.places[0].stored_name)
        read(block, *args, **kwargs)

    monkeypatch.setattr(CheckpointBlock, "read_into", counted)
    prompts = [f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog", "house", "tree")]
    asked = {"num_inference_steps": 1, "guidance_scale": 4.0}
    with engine(tiny_klein, prompt_cache="off", placement="disk", batch_size=1) as one:
        together = latents(one_by_one(one, prompts, **asked))
        assert len(counting.passes) == 1
        assert len(counting.passes[0]) == 13  # the empty prompt once for all
        assert len([name for name in reads if name.startswith("model.layers.")]) == 27
        for at in (0, 11):
            alone = latents(one_by_one(one, [prompts[at]], **asked, seed=ASKED["seed"] + at))
            assert torch.equal(together[at : at + 1], alone)


def test_more_batches_than_may_wait_take_more_passes(
    tiny_klein_distilled: Path, monkeypatch: pytest.MonkeyPatch, counting: Counting
) -> None:
    prompts = ["red", "green", "blue", "white", "black"]
    with engine(tiny_klein_distilled, prompt_cache="off") as one:
        whole = latents(one_by_one(one, prompts))
        each = waiting_bytes(one.source.spec.text_encoder, 1, 64, torch.float32.itemsize)
        monkeypatch.setattr("lowmem_flux2.planning.batches.WAITING_MOST_BYTES", 3 * each)
        made = latents(one_by_one(one, prompts))
    assert [len(group) for group in counting.passes] == [5, 4, 1]
    assert torch.equal(made, whole)


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length": ({}, {"max_sequence_length": 48}),
    "dtype": ({"dtype": "bf16"}, {}),
    "weight format": ({"text_weight_format": "int8"}, {}),
    "case": ({}, {"prompt": "A red circle"}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_decides_bits_is_another_entry(case: str, tiny_klein: Path, counting: Counting) -> None:
    options, asked = OTHERWISE[case]
    generate(tiny_klein, [RED])
    with Engine(str(tiny_klein), **{"dtype": "fp32", "prompt_cache": "64MiB", **options}) as one:
        one.generate(**{"prompt": RED, **ASKED, **asked}, output_type="latent")
    assert counting.loads == 2


@pytest.mark.parametrize("changed", ["text_encoder/config.json", "tokenizer/tokenizer_config.json", "weights"])
def test_a_changed_encoder_is_another_entry(changed: str, tiny_klein: Path, tmp_path: Path, counting: Counting) -> None:
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    generate(folder, [RED])
    if changed == "weights":
        os.utime(next((folder / "text_encoder").glob("*.safetensors")))
    else:
        raw = json.loads((folder / changed).read_text())
        (folder / changed).write_text(json.dumps({**raw, "note": "changed"}))
    generate(folder, [RED])
    assert counting.loads == 2


def test_threads_and_versions_are_part_of_the_key(
    tiny_klein: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tiny_klein, [RED])
    with monkeypatch.context() as two:
        two.setattr(torch, "get_num_threads", lambda: 2)  # a thread pool beside other work makes the test slow
        generate(tiny_klein, [RED])
    version = prompt_cache.metadata.version
    monkeypatch.setattr(
        prompt_cache.metadata, "version", lambda name: "99" if name == "transformers" else version(name)
    )
    generate(tiny_klein, [RED])
    assert counting.loads == 3


def test_given_embeddings_are_neither_looked_up_nor_kept(tiny_klein: Path, counting: Counting, cache: Path) -> None:
    given = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with engine(tiny_klein) as one:
            asked = {**ASKED, "guidance_scale": 4.0}
            del asked["max_sequence_length"]
            one.generate(prompt_embeds=given, **asked, output_type="latent")
    assert counting.passes == [[("",)]]  # the empty negative prompt, once
    assert len(prompt_files(cache)) == 1


# ---------------------------------------------------------------------------------------------------------- bounds


@pytest.fixture
def kept(cache: Path) -> Callable[[int], PromptCache]:
    return lambda limit: PromptCache(cache, limit, "encoder", lambda text: pytest.fail(text))


EMBEDDINGS = torch.arange(25_600, dtype=torch.float32).reshape(1, 64, 400)  # 100 KiB


def test_the_least_recently_used_leave(kept: Callable[[int], PromptCache], cache: Path) -> None:
    prompts = kept(250 << 10)
    for second, name in enumerate(("first", "second")):
        prompts.put((name,), EMBEDDINGS)
        os.utime(prompts._path((name,)), (second, second))
    assert prompts.get(("first",)) is not None  # used now, so the second is the older one
    prompts.put(("third",), EMBEDDINGS)
    assert [prompts.get((name,)) is not None for name in ("first", "second", "third")] == [True, False, True]
    assert sum(entry.size_bytes for entry in prompt_files(cache)) <= 250 << 10


def test_what_is_larger_than_the_limit_is_not_kept(kept: Callable[[int], PromptCache], cache: Path) -> None:
    kept(1 << 20).put((RED,), EMBEDDINGS)
    kept(50 << 10).put((BLUE,), EMBEDDINGS)
    assert kept(1 << 20).get((BLUE,)) is None
    assert kept(1 << 20).get((RED,)) is not None  # nor does it drive out another


def test_what_a_killed_process_left_is_swept(kept: Callable[[int], PromptCache], cache: Path) -> None:
    kept(1 << 20).put((RED,), EMBEDDINGS)
    old, new = cache / "prompts" / ".old.tmp", cache / "prompts" / ".new.tmp"
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    kept(1 << 20).put((BLUE,), EMBEDDINGS)
    assert not old.exists()
    assert new.exists()  # another process may be writing it


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, None, PROMPT_CACHE_BYTES),
        (None, "2GiB", 2 << 30),
        (None, "off", 0),
        ("off", "2GiB", 0),
        ("0", None, 0),
        ("300MiB", None, 300 * MIB),
        (5 * MIB, "off", 5 * MIB),
    ],
)
def test_the_limit(given: Any, environment: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWMEM_FLUX2_PROMPT_CACHE", raising=False)
    if environment is not None:
        monkeypatch.setenv("LOWMEM_FLUX2_PROMPT_CACHE", environment)
    assert prompt_cache_limit(given) == expected


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--prompt-cache: .*or off"):
        prompt_cache_limit("lots")
    monkeypatch.setenv("LOWMEM_FLUX2_PROMPT_CACHE", "lots")
    with pytest.raises(UsageError, match=r"LOWMEM_FLUX2_PROMPT_CACHE: .*or off"):
        prompt_cache_limit()


def test_off_leaves_no_trace(tiny_klein: Path, cache: Path) -> None:
    generate(tiny_klein, [RED], {"prompt_cache": "off"})
    assert not (cache / "prompts").exists()


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def entry() -> bytes:
    file = io.BytesIO()
    write_checked(file, {"embeddings": EMBEDDINGS[:, :2, :50].contiguous()}, {})
    return file.getvalue()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(data: st.DataObject, entry: bytes, cache: Path) -> None:
    events: list[str] = []
    prompts = PromptCache(cache, MIB, "encoder", events.append)
    path = prompts._path((RED,))
    path.parent.mkdir(exist_ok=True)
    broken = bytearray(entry)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(entry) - 1))
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del broken[data.draw(st.integers(0, len(entry) - 1)) :]
    path.write_bytes(broken)
    found = prompts.get((RED,))
    assert found is None or torch.equal(found, EMBEDDINGS[:, :2, :50])  # a space of the header's padding may differ
    assert (found is None) == (not path.exists()) == (len(events) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_entry_is_a_safetensors_file(dtype: torch.dtype, kept: Callable[[int], PromptCache]) -> None:
    prompts = kept(MIB)
    prompts.put((RED,), EMBEDDINGS.to(dtype))
    path = prompts._path((RED,))
    assert torch.equal(load_file(path)["embeddings"], EMBEDDINGS.to(dtype))
    assert path.stat().st_size - EMBEDDINGS.to(dtype).nbytes <= prompt_cache.HEADER_MOST_BYTES
    found = prompts.get((RED,))
    assert found is not None
    assert found.dtype == dtype
    assert found.data_ptr() % 64 == 0


def test_a_damaged_entry_is_made_again(tiny_klein_distilled: Path, cache: Path, counting: Counting) -> None:
    first = generate(tiny_klein_distilled, [RED])
    (found,) = prompt_files(cache)
    content = bytearray(found.path.read_bytes())
    content[-5] ^= 4
    found.path.write_bytes(content)
    again = generate(tiny_klein_distilled, [RED])
    assert counting.loads == 2
    assert torch.equal(latents(first), latents(again))
    (event,) = again.report.events
    assert "damaged" in event
    assert generate(tiny_klein_distilled, [RED]).report.cached_prompts == (RED,)


def test_a_read_only_folder_is_one_warning(tiny_klein: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "prompts").write_text("a file where the folder should be")  # root may write anywhere else
    made = one_by_one(engine(tiny_klein), [RED, BLUE])
    (event,) = made.report.events
    assert "prompt cache" in event and "going on without it" in event


def test_a_full_disk_is_one_warning(tiny_klein: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache.os, "fsync", full)
    made = one_by_one(engine(tiny_klein), [RED, BLUE])
    (event,) = made.report.events
    assert "No space left" in event
    assert list((cache / "prompts").iterdir()) == []


def _hammer(cache: Path, number: int) -> int:
    """Put and get entries in a folder that holds two of them; returns how many gets were hits."""

    def told(text: str) -> None:
        raise AssertionError(text)  # which a pool hands on; it waits for ever for a worker that pytest.fail has ended

    prompts = PromptCache(cache, 250 << 10, "encoder", told)
    hits = 0
    for turn in range(30):
        batch = (f"prompt {(turn + number) % 4}",)
        prompts.put(batch, EMBEDDINGS + (turn + number) % 4)
        found = prompts.get(batch)
        if found is not None:
            assert torch.equal(found, EMBEDDINGS + (turn + number) % 4)
            hits += 1
    return hits


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_entry_that_goes_while_it_is_read_is_no_damage(
    is_replaced: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process drops it, or puts another in its place, after its header was read."""
    batch, told = ("a red circle",), list[str]()
    prompts = PromptCache(cache, 1 << 20, "encoder", told.append)
    prompts.put(batch, EMBEDDINGS)
    (entry,) = prompt_files(cache)
    calls: list[Path] = []

    def opened(path: Path, framework: str) -> Any:
        calls.append(path)
        found = safe_open(path, framework=framework)
        if len(calls) == 1:
            entry.path.unlink()
            if is_replaced:
                prompts.put(batch, EMBEDDINGS)
                raise RuntimeError("unable to open file: No such file or directory (2)")  # as it was for a moment
        return found

    monkeypatch.setattr(checked, "safe_open", opened)
    found = prompts.get(batch)
    assert told == []
    assert len(prompt_files(cache)) == is_replaced
    assert torch.equal(found, EMBEDDINGS) if found is not None else not is_replaced


def test_two_processes_share_a_folder(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        hits = pool.starmap(_hammer, [(cache, 0), (cache, 2)])
    assert min(hits) > 0
    assert not list((cache / "prompts").glob(".*"))
    assert len(prompt_files(cache)) <= 3


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Any]:
    from lowmem_flux2 import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LOWMEM_FLUX2_PROMPT_CACHE", "10MiB")

    def go(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["lowmem-flux2", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert not stopped.value.code, captured.err
        return captured.out

    return go


def test_the_command_line_plans_with_the_cache_and_says_so(run: Any, cache: Path) -> None:
    command = ["generate", "-p", RED, "--steps", "1", "-s", "1", "--report", "report.json"]
    assert "prompt cache" not in run(*command)
    again = run(*command)
    assert "encode: all prompts are in the prompt cache" in again
    assert again.count("from the prompt cache") == 2  # planned, and in the report's table
    report = json.loads(Path("report.json").read_text())
    assert report["cached_prompts"] == [RED, ""]
    assert report["plan"]["stages"][0]["cost"]["time_s"] == 0
    assert Image.open("out_1.png").text == Image.open("out_1_2.png").text
    assert Path("out_1.png").read_bytes() == Path("out_1_2.png").read_bytes()
    assert "prompt cache" in run(*command[:-2], "--dry-run")
    assert "prompt cache" not in run(*command, "--prompt-cache", "off")


def test_the_cache_is_listed_and_cleared(run: Any, cache: Path) -> None:
    run("generate", "-q", "-p", RED, "--steps", "1", "-s", "1")
    assert "2 batches of prompts, " in run("doctor")
    assert "2 batches of prompts" in run("prepare", "--list")
    run("prepare", "--remove", "prompts")
    assert prompt_files(cache) == []
    assert clear_prompts(cache) == 0


def test_looking_at_an_empty_cache_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv[1:] = ['generate', '-p', 'x', '--dry-run', '--prompt-cache', '1GiB']\n"
        "from lowmem_flux2 import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=tmp_path)
