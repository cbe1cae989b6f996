"""The command line as a user meets it: errors before heavy work, exit codes, files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ran, Run, runner
from PIL import Image

PROMPT = "a large red circle in the center on a blue background"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capsys)


@pytest.fixture
def folder(tiny_klein: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_klein, tmp_path / "broken"))


def _fails(ran: Ran, code: int, *said: str) -> None:
    assert ran.code == code, ran
    for words in said:
        assert words in ran.err, f"{words!r} not in {ran.err!r}"
    assert "Traceback" not in ran.err


# ------------------------------------------------------------------------------------------- bad requests: 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", ""], "prompt is empty"),
        (["-p", "   "], "prompt is empty"),
        ([], "prompt"),
        (["-p", "x", "-W", "0"], "width"),
        (["-p", "x", "-H", "-1"], "height"),
        (["-p", "x", "-W", "1080"], "1072 or 1088"),
        (["-p", "x", "-W", "100000"], "100000"),
        (["-p", "x", "--steps", "0"], "steps"),
        (["-p", "x", "--guidance", "-1"], "guidance"),
        (["-p", "x", "--num-images", "0"], "images"),
        (["-p", "x", "--seed", "-5"], "seed"),
        (["-p", "x", "--profile", "rtx-9999"], "rtx-9999"),
        (["-p", "x", "--device", "tpu"], "tpu"),
        (["-p", "x", "--device", "cuda"], "cuda"),
        (["-p", "x", "--max-vram", "8 parsecs"], "--max-vram"),
        (["-p", "x", "--max-ram", "0"], "--max-ram"),
        (["-p", "x", "--weight-format", "int3"], "int3"),
        (["-p", "x", "--dtype", "fp64"], "fp64"),
        (["-p", "x", "--step-cache", "fbc"], "step-cache"),
        (["-p", "x", "--vae-tile", "100"], "vae-tile"),
        (["-p", "x", "--image", "a.png"], "a.png: there is no such reference image"),
        (["-p", "x", "--image", "512x512"], "a size stands for a picture in 'plan' only"),
        (["-p", "x", "--image-size", "512"], "--image-size bounds reference images"),
        (["-p", "x", "--negative-prompt", "y", "--guidance", "1"], "negative prompt"),
        (["-p", "x", "--plan", "none.json"], "none.json"),
        (["--prompt-file", "none.txt"], "none.txt"),
        (["-p", "x", "-o", "nowhere/out.png"], "nowhere"),
        (["-p", "x", "-o", "out.jpg"], ".png"),
        (["-p", "x", "-o", "out_{sed}.png"], "{sed}"),
        (["-p", "x", "-o", "/proc/out.png"], "/proc"),
        (["-p", "x", "--report", "nowhere/report.json"], "nowhere"),
        (["-p", "x", "--report", "/proc/report.json"], "/proc"),
        (["-p", "x", "--report", "/tmp"], "folder"),
        (["-p", "x", "--report", "r.json", "--dry-run"], "--dry-run"),
        (["-p", "x", "-o", "/proc/{model}/x.png"], "/proc"),
        (["-p", "x", "-o", "x" * 300 + ".png"], "longer"),
        (["-p", "x\udcff"], "UTF-8"),
        (["-p", "x", "--revision", "main"], "--revision"),
        (["-p", "x", "-m", ""], "model: give a name"),
        (["-p", "x", "--max-vram", "8GiB"], "--max-ram"),
        (["-p", "x", "--no-such-flag"], "--no-such-flag"),
        (["-p", "x", "--weight-format", "q4_k"], "q4_k"),
    ],
)
def test_bad_request_exits_2_and_says_what(run: Run, arguments: list[str], said: str) -> None:
    _fails(run("generate", *arguments), 2, said)
    assert list(Path.cwd().iterdir()) == []


def test_unknown_profile_key_names_file_key_and_line(run: Run) -> None:
    text = (Path(__file__).parents[1] / "profiles" / "rtx-3060-12gb.toml").read_text()
    Path("mine.toml").write_text(text.replace("[gpu]\n", "[gpu]\nvrma = '12 GiB'\n", 1))
    line = (text.split("[gpu]\n")[0] + "[gpu]\n").count("\n") + 1
    _fails(run("profiles", "check", "mine.toml"), 2, f"mine.toml:{line}", "vrma", "vram")


# ---------------------------------------------------------------------------------------------- checkpoints: 4


def test_unknown_model_suggests_the_nearest(run: Run) -> None:
    _fails(run("generate", "-p", "x", "-m", "flux2-klien-4b"), 4, "flux2-klein-4b")


def test_hub_id_offline_says_how_to_give_a_folder(run: Run) -> None:
    _fails(run("generate", "-p", "x", "-m", "nobody/nothing", "--offline"), 4, "nobody/nothing", "folder")


def test_known_hub_model_without_its_weights_is_refused_offline(run: Run) -> None:
    ran = run("generate", "-p", "x", "-m", "flux2-klein-4b", "--offline", "--device", "cpu", "-W", "64", "-H", "64")
    _fails(ran, 4, "FLUX.2-klein-4B")


def _weights(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def test_truncated_weights_are_named(run: Run, folder: Path) -> None:
    file = _weights(folder)
    file.write_bytes(file.read_bytes()[:-100])
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, file.name, "truncated")


def test_lfs_pointer_says_git_lfs_pull(run: Run, folder: Path) -> None:
    _weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7754\n")
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, "git lfs pull")


def test_html_saved_as_weights_is_recognized(run: Run, folder: Path) -> None:
    _weights(folder).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, "HTML")


def test_config_without_a_key_names_file_and_key(run: Run, folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["num_layers"]
    file.write_text(json.dumps(config))
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, "num_layers", "config.json")


def test_text_encoder_of_another_width_names_both(run: Run, folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    wanted, config["joint_attention_dim"] = config["joint_attention_dim"], 7680
    file.write_text(json.dumps(config))
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, str(wanted), "7680")


def test_missing_component_is_named(run: Run, folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    _fails(run("generate", "-p", "x", "-m", str(folder)), 4, "vae")


# ------------------------------------------------------------------------------------------------ not fitting: 3


def test_what_does_not_fit_is_refused_with_commands_that_fit(run: Run) -> None:
    ran = run("plan", "-m", "flux2-dev", "--profile", "rtx-2060-6gb", "--max-ram", "512MiB")
    _fails(ran, 3, "RAM", "512 MiB", "short")
    commands = [line.split("#")[0].split() for line in ran.err.splitlines() if "lowmem-flux2 plan" in line]
    assert commands
    for command in commands:
        assert run(*command[1:]).code == 0, command


# ------------------------------------------------------------------------------------------------------- plans


def test_plan_json_follows_the_contract_and_replays(run: Run) -> None:
    ran = run("plan", "-m", "shapes", "--json", "--steps", "3", "--num-images", "2", "--guidance", "1")
    assert ran.code == 0
    plan = json.loads(ran.out)
    assert {"schema_version", "profile", "model", "workload", "stages", "predicted"} <= plan.keys()
    Path("plan.json").write_text(ran.out)
    done = run("generate", "-p", PROMPT, "--plan", "plan.json", "-s", "1", "-o", "a.png")
    assert done.code == 0, done
    assert Image.open("a.png").text["steps"] == "3"
    assert Image.open("a_2.png").text["guidance_scale"] == "1"
    mismatch = run("generate", "-p", PROMPT, "--plan", "plan.json", "--steps", "4")
    _fails(mismatch, 2, "steps", "3", "4")
    chosen = run("generate", "-p", PROMPT, "--plan", "plan.json", "--dtype", "fp32")
    _fails(chosen, 2, "--plan", "--dtype")


def test_a_plan_with_its_alternatives_is_read_and_replays(run: Run) -> None:
    ran = run("plan", "-m", "shapes", "--json", "--pareto", "--steps", "2")
    assert ran.code == 0
    plan = json.loads(ran.out)
    assert plan["pareto"] and plan["rejected"]
    assert {"peak_vram_bytes", "time_s", "fidelity_error"} <= plan["pareto"][0].keys()
    Path("plan.json").write_text(ran.out)
    assert run("generate", "-p", PROMPT, "--plan", "plan.json", "-s", "1", "-o", "a.png").code == 0


def test_a_plan_explains_itself_on_one_screen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("plan", "-m", "flux2-dev", "--profile", "rtx-4090-24gb", "--max-ram", "24GiB")
    text = run(*arguments).out
    for words in ("predicted: peak VRAM", "before the first run: prepare", "denoise, one step", "what would help"):
        assert words in text
    assert "not taken" not in text
    assert "not taken" in run(*arguments, "--pareto").out


def test_lines_of_a_prompt_file_are_planned_as_they_are_made(run: Run) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "width": 128, "height": 128}, {"prompt": "c", "seed": 3}]
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ran = run("plan", "--prompt-file", "lines.jsonl")
    assert ran.code == 0, ran
    assert "1 of 2: 2 lines" in ran.out and "2 of 2: 1 line of" in ran.out
    assert "2 images of 64x64" in ran.out and "1 image of 128x128" in ran.out
    plans = json.loads(run("plan", "--prompt-file", "lines.jsonl", "--json").out)
    assert [plan["workload"]["num_prompts"] for plan in plans] == [2, 1]
    Path("lines.txt").write_text("a\nb\n")
    (single,) = [json.loads(run("plan", "--prompt-file", "lines.txt", "--image", "64x64", "--json").out)]
    assert single["workload"]["num_prompts"] == 2


def test_a_table_of_plans_for_one_card_and_model(run: Run) -> None:
    ran = run("plan", "--table", "--profile", "rtx-4090-24gb", "-m", "flux2-klein-4b")
    assert ran.code == 0
    lines = [line for line in ran.out.splitlines() if line.startswith("| rtx")]
    assert lines
    assert all(line.startswith("| rtx-4090-24gb | klein-4b |") for line in lines)


@pytest.mark.parametrize("flags", [["--json"], ["--pareto"], ["-W", "512"], ["-p", "x"], ["--max-ram", "8GiB"]])
def test_a_table_takes_no_other_flags(run: Run, flags: list[str]) -> None:
    _fails(run("plan", "--table", *flags), 2, "leave out all flags but -m and --profile")


def test_dry_run_loads_and_writes_nothing(run: Run) -> None:
    ran = run("generate", "-p", PROMPT, "--dry-run")
    assert ran.code == 0
    assert "peak RAM" in ran.out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "-m", "flux2-dev", "--profile", "rtx-3060-12gb", "--max-ram", "32GiB", "--image", "1024x768"],
        ["profiles", "list"],
    ],
)
def test_planning_never_imports_torch(arguments: list[str]) -> None:
    script = (
        "import sys; sys.argv[1:] = " + repr(arguments) + "\n"
        "from lowmem_flux2 import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["plan", "--help"]])
def test_help_imports_neither_the_planner_nor_what_checks_files(arguments: list[str]) -> None:
    """Help has to be there at once: none of the modules that only planning and running need is imported for it."""
    script = (
        "import sys; sys.argv[1:] = " + repr(arguments) + "\n"
        "from lowmem_flux2 import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "ours = [name for name in sys.modules if name.startswith('lowmem_flux2.')]\n"
        "assert len(ours) < 15 and not any('.planning.' in name for name in ours), ours\n"
        "heavy = {'torch', 'numpy', 'PIL', 'psutil', 'pynvml', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- generate


def test_generate_writes_picture_report_and_metadata(run: Run) -> None:
    ran = run("generate", "-p", PROMPT, "--steps", "2", "-s", "3", "--num-images", "2", "--report", "report.json")
    assert ran.code == 0, ran
    assert "predicted → measured" in ran.out
    report = json.loads(Path("report.json").read_text())
    assert [image["seed"] for image in report["images"]] == [3, 4]
    assert [image["path"] for image in report["images"]] == ["out_3.png", "out_4.png"]
    assert {"plan", "measured", "events", "images", "versions"} <= report.keys()
    for stage in report["measured"]["stages"]:
        assert stage["time_s"] > 0
        assert stage["peak_ram_bytes"] > 0
    picture = Image.open("out_3.png")
    assert picture.size == (64, 64)
    assert picture.text["prompt"] == PROMPT
    assert picture.text["seed"] == "3"


def test_references_are_planned_carried_out_and_recorded(run: Run) -> None:
    for name, size in (("a.png", (64, 80)), ("b.jpg", (130, 65))):
        Image.effect_noise(size, 90).convert("RGB").save(name)
    images = ["--image", "a.png", "--image", "b.jpg"]
    ran = run("generate", "-p", PROMPT, *images, "--dry-run")
    words = " ".join(ran.out.split())
    assert "2 reference images: 64x80 20 tokens, 128x64 32 tokens; a step sees" in words, ran
    assert "reference" in [line.partition(" ")[0] for line in ran.out.splitlines()]
    planned = run("plan", "--steps", "1", "--image", "64x80", "--image", "130x65", "--json")
    Path("plan.json").write_text(planned.out)
    asked = ["-q", "-p", PROMPT, "-s", "3", "--plan", "plan.json", "--report", "report.json"]
    _fails(run("generate", *asked), 2, "references: plan (64, 80), (128, 64), here none")
    assert run("generate", *asked, *images).code == 0
    report = json.loads(Path("report.json").read_text())
    assert [stage["stage"] for stage in report["measured"]["stages"]] == ["encode", "reference", "denoise", "decode"]
    assert [reference["name"] for reference in report["references"]] == ["a.png", "b.jpg"]
    picture = Image.open("out_3.png")
    assert picture.size == (64, 80)
    first, second = report["references"]
    said = f"a.png 64x80 sha256:{first['digest']}, b.jpg 128x64 sha256:{second['digest']}"
    assert picture.text["references"] == said
    assert first["digest"] == hashlib.sha256(Path("a.png").read_bytes()).hexdigest()[:12]


def test_generate_never_overwrites_and_repeats_bit_for_bit(run: Run) -> None:
    for _ in range(2):
        assert run("generate", "-q", "-p", PROMPT, "--steps", "2", "-s", "3").code == 0
    first, second = Path("out_3.png").read_bytes(), Path("out_3_2.png").read_bytes()
    assert first == second


def test_no_metadata_leaves_the_png_bare(run: Run) -> None:
    assert run("generate", "-q", "-p", PROMPT, "--steps", "1", "-s", "3", "--no-metadata").code == 0
    assert Image.open("out_3.png").text == {}


def test_quiet_prints_only_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowmem_flux2", "generate", "-q", "-p", PROMPT, "--steps", "1", "-s", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "out_3.png   seed 3"
    assert done.stderr == ""


def test_a_drawn_seed_is_printed_and_recorded(run: Run) -> None:
    assert run("generate", "-q", "-p", PROMPT, "--steps", "1", "--report", "report.json").code == 0
    image = json.loads(Path("report.json").read_text())["images"][0]
    assert Path(image["path"]).name == f"out_{image['seed']}.png"


def test_prompt_file_gives_one_picture_a_line(run: Run) -> None:
    Path("prompts.txt").write_text(f"{PROMPT}\n\na small green square at the left on a white background\n")
    ran = run("generate", "-q", "--prompt-file", "prompts.txt", "--steps", "1", "-s", "0", "-o", "{index}_{model}.png")
    assert ran.code == 0, ran
    assert sorted(path.name for path in Path.cwd().glob("*.png")) == ["0_shapes.png", "1_shapes.png"]


def test_pictures_are_saved_as_they_are_decoded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_flux2.runtime.decode import Decoder

    decode, calls = Decoder.decode, []

    def fails_at_the_second(self: Decoder, latents: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "decode", fails_at_the_second)
    ran = run("generate", "-p", PROMPT, "--steps", "1", "-s", "3", "--num-images", "2")
    assert ran.code == 130
    assert [path.name for path in Path.cwd().glob("*.png")] == ["out_3.png"]


def test_interruption_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_flux2.runtime.denoise import Denoiser

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Denoiser, "denoise", interrupt)
    ran = run("generate", "-p", PROMPT)
    assert ran.code == 130
    assert not list(Path.cwd().glob("*.png"))


def test_doctor_and_profiles_answer(run: Run) -> None:
    assert "torch" in run("doctor").out
    assert "rtx-3060-12gb" in run("profiles", "list").out
    assert "[sources]" in run("profiles", "show", "cpu").out


def test_version(run: Run) -> None:
    from lowmem_flux2 import __version__

    assert __version__ in run("--version").out


def test_simulated_bytes_come_beside_predicted_ones(run: Run) -> None:
    ran = run("simulate", "--profile", "cpu", "--json")
    assert ran.code == 0, ran
    stages = json.loads(ran.out)
    assert [stage["stage"] for stage in stages] == ["encode", "denoise", "decode"]
    for stage in stages:  # some norms of a kilobyte are not counted, which tells in so small a model
        assert stage["predicted"]["device"] == pytest.approx(stage["simulated"]["device"], abs=16 << 10, rel=0.02)
    dev = ("simulate", "-m", "flux2-dev", "--profile", "rtx-4090-24gb")
    _fails(run(*dev, "--caption-upsample", "0.15"), 2, "not simulated")
