"""Downloads with the hub's real client against a small hub on loopback; and no socket is opened anywhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import single_files
import tiny
from hub import COMMIT, Hub, serving
from safetensors.torch import save_file

REPO = "acme/tiny-klein"
FETCH = """
import sys
from lowmem_flux2.errors import LowMemFlux2Error
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.runtime.download import with_weights, with_whole_text_encoder

model, offline, whole = sys.argv[1], "offline" in sys.argv, "whole" in sys.argv
try:
    source = with_weights(resolve_model(model, offline=offline), offline=offline)
    print((with_whole_text_encoder(source, offline=offline, sees=True) if whole else source).folder)
except LowMemFlux2Error as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
NO_SOCKETS = """
import socket

def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")

class Refused(socket.socket):
    def connect(self, *arguments):
        refuse()
    connect_ex = connect

socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint as it lies on the hub, with files beside it that no run needs."""
    folder = tiny.write_klein(tmp_path_factory.mktemp("hub") / "klein", shard_bytes=30_000)
    (folder / "flux2-klein.safetensors").write_bytes(b"x" * 1000)
    (folder / "transformer" / "old.bin").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with serving(Hub({REPO: repository})) as running:
        yield running


def environment(hub: Hub, home: Path, token: str = "") -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    return kept | ({"HF_TOKEN": token} if token else {})


def fetch(
    hub: Hub, home: Path, *arguments: str, token: str = "", code: str = FETCH
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *(arguments or (REPO,))]
    return subprocess.run(
        command, env=environment(hub, home, token), capture_output=True, text=True, timeout=120, check=False
    )


def test_fetches_what_a_run_needs_and_no_more(hub: Hub, repository: Path, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shards = {f"text_encoder/{path.name}" for path in (repository / "text_encoder").glob("*.safetensors")}
    unused = shards - there
    assert unused, "the layers after the last tapped one, and lm_head, fill shards of their own"
    assert shards & there
    assert "flux2-klein.safetensors" not in there and "transformer/old.bin" not in there
    assert not hub.fetched() & (unused | {"flux2-klein.safetensors", "transformer/old.bin"})
    again = fetch(hub, tmp_path, REPO, "offline")
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().splitlines()[-1] == str(folder)


def test_a_cut_download_goes_on_where_it_was(hub: Hub, repository: Path, tmp_path: Path) -> None:
    largest = max((repository / "transformer").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    hub.cut[largest.name] = 70_000
    chunks = "import huggingface_hub.constants\nhuggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 14\n"  # 10 MiB
    done = fetch(hub, tmp_path, code=chunks + FETCH)
    if done.returncode != 0:  # the client may try again by itself
        assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert (folder / "transformer" / largest.name).read_bytes() == largest.read_bytes()
    ranges = [asked for method, path, asked in hub.requests if path.endswith(largest.name) and asked]
    assert any(asked.startswith("bytes=") and not asked.startswith("bytes=0-") for asked in ranges)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", ["is gated", f"https://huggingface.co/{REPO}", "hf auth login"]),
        ("other", ["accept its licence", f"https://huggingface.co/{REPO}"]),
        ("narrow", ["may not read gated repositories", "settings/tokens"]),
        ("expired", ["refuses your token", "hf auth login"]),
    ],
)
def test_who_may_not_read_is_told_why(token: str, words: list[str], hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    done = fetch(hub, tmp_path, token=token)
    assert done.returncode == 4, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_member_gets_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    assert fetch(hub, tmp_path, token="member").returncode == 0


@pytest.mark.parametrize("token", ["", "member"])
def test_a_missing_repository_is_called_missing(token: str, hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "acme/nothing", token=token)
    assert done.returncode == 4
    assert "there is no repository acme/nothing" in done.stderr


def test_offline_and_unreachable_are_told_apart_from_missing(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, REPO, "offline")
    assert done.returncode == 4 and "not in the local hub cache" in done.stderr
    assert not hub.requests, "offline means that nothing is asked"
    hub.endpoint = "http://127.0.0.1:9"  # nobody listens there
    done = fetch(hub, tmp_path, code="import time\ntime.sleep = lambda seconds: None\n" + FETCH)  # between tries
    assert done.returncode == 4 and "cannot be reached" in done.stderr


def test_a_hub_out_of_order_is_waited_for(hub: Hub, repository: Path, tmp_path: Path) -> None:
    """Shards may have arrived without their index: that is a download to go on with, not a broken model."""
    index = next((repository / "transformer").glob("*.index.json")).name
    hub.busy[index] = [(503, "0"), (429, "0")]
    assert fetch(hub, tmp_path / "patient").returncode == 0
    hub.busy[index] = [(500, "0")] * 3
    done = fetch(hub, tmp_path / "home")
    assert done.returncode == 4 and "answers 500" in done.stderr and "run the command again" in done.stderr
    assert fetch(hub, tmp_path / "home").returncode == 0


def test_files_that_are_not_whole(hub: Hub, repository: Path, tmp_path: Path) -> None:
    """One that arrives short is fetched anew; one that was damaged in the cache is named, for the client trusts it."""
    file = next((repository / "vae").glob("*.safetensors")).name
    hub.short[file] = 10
    done = fetch(hub, tmp_path)
    assert done.returncode == 4 and "did not arrive whole" in done.stderr
    hub.short.clear()
    blobs = tmp_path / "hub" / "models--acme--tiny-klein" / "blobs"
    for name, age_s in (("abc.0123abcd.incomplete", 7200), ("def.0123abcd.incomplete", 0)):  # killed; under way
        (blobs / name).write_bytes(b"x")
        os.utime(blobs / name, (time.time() - age_s,) * 2)
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in blobs.glob("*.incomplete")] == ["def.0123abcd.incomplete"]
    blob = (Path(done.stdout.strip().splitlines()[-1]) / "vae" / file).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    done = fetch(hub, tmp_path)
    assert done.returncode == 4 and f"remove {blob} and download it again" in done.stderr
    blob.unlink()
    assert fetch(hub, tmp_path).returncode == 0


def test_rewriting_captions_fetches_all_of_the_text_encoder(tmp_path: Path) -> None:
    """With the vision part where there are references; for a folder on the hub, and for a file with its encoder."""
    dev = tiny.write_dev(tmp_path / "dev", shard_bytes=60_000)
    file = tmp_path / "mine.safetensors"
    save_file(single_files.bfl_state(single_files.transformer_state(dev)), file)
    single = FETCH.replace("resolve_model(model,", f"resolve_model({str(file)!r}, text_encoder=model, vae=model,")
    every = {f"text_encoder/{path.name}" for path in (dev / "text_encoder").glob("*.safetensors")}
    with serving(Hub({REPO: dev})) as hub:
        for code in (FETCH, single):
            home = tmp_path / f"home-{len(code)}"
            hub.requests.clear()
            assert fetch(hub, home, code=code).returncode == 0
            done = fetch(hub, home, REPO, "offline", "whole", code=code)
            assert done.returncode == 4 and "or not all of it" in done.stderr
            missing = every - hub.fetched()
            assert missing
            hub.requests.clear()
            done = fetch(hub, home, REPO, "whole", code=code)
            assert done.returncode == 0, done.stderr
            assert {name for name in hub.fetched() if name.endswith(".safetensors")} == missing
            assert fetch(hub, home, REPO, "offline", "whole", code=code).returncode == 0


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    at = FETCH.replace("resolve_model(model,", 'resolve_model(model, revision="{}",')
    assert fetch(hub, tmp_path, code=at.format(COMMIT)).returncode == 0
    done = fetch(hub, tmp_path, code=at.format("v2"))
    assert done.returncode == 4 and f"{REPO} has no revision 'v2'" in done.stderr


def test_a_slow_hub_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.delay_s = 0.05
    assert fetch(hub, tmp_path).returncode == 0


def test_a_full_disk_is_seen_before_the_first_weight(hub: Hub, repository: Path, tmp_path: Path) -> None:
    small = "import shutil\nshutil.disk_usage = lambda path: type('Usage', (), {'free': 1000})\n"
    done = fetch(hub, tmp_path, code=small + FETCH)
    assert done.returncode == 3, done.stderr
    assert "download stage needs at least" in done.stderr and "HF_HOME" in done.stderr
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_generate_downloads_and_draws(hub: Hub, tmp_path: Path) -> None:
    command = ["generate", "-m", REPO, "-p", "x", "-W", "64", "-H", "64", "--steps", "1", "-o", str(tmp_path / "a.png")]
    command += ["--max-sequence-length", "64", "--dtype", "fp32"]
    run = [sys.executable, "-m", "lowmem_flux2", *command]
    done = subprocess.run(
        run, env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "home" / "hub" / "models--acme--tiny-klein" / "snapshots" / COMMIT).is_dir()


def test_nothing_else_opens_a_socket(tmp_path: Path, tiny_klein: Path) -> None:
    """Planning, preparing and drawing from a folder, with every way to connect barred."""
    source = Path(shutil.copytree(tiny_klein, tmp_path / "klein"))
    script = NO_SOCKETS + (
        "import sys\nfrom lowmem_flux2 import Engine\n"
        "engine = Engine(sys.argv[1], weight_format='int8', dtype='fp32', cache_dir=sys.argv[2])\n"
        "engine.generate('x', height=64, width=64, num_inference_steps=1, max_sequence_length=64, seed=0)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    run = [sys.executable, "-c", script, str(source), str(tmp_path / "cache")]
    done = subprocess.run(run, env=kept, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_single_file_fetches_its_parts_alone(hub: Hub, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file(single_files.bfl_state(single_files.transformer_state(repository)), file)
    code = FETCH.replace("resolve_model(model,", f"resolve_model({str(file)!r}, text_encoder=model, vae=model,")
    done = fetch(hub, tmp_path, REPO, "offline", code=code)
    assert done.returncode == 4 and "not in the local hub cache" in done.stderr
    done = fetch(hub, tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").resolve() == file
    assert (folder / "text_encoder").resolve().is_relative_to((tmp_path / "hub").resolve())
    fetched = hub.fetched()
    assert not any(name.startswith("transformer/") and name.endswith(".safetensors") for name in fetched)
    assert any(name.startswith("vae/") for name in fetched) and "tokenizer/tokenizer.json" in fetched
    again = fetch(hub, tmp_path, REPO, "offline", code=code)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().splitlines()[-1] == str(folder)
