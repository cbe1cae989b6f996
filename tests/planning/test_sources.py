"""MODEL arguments: aliases, folders, the hub's cache and the hub's refusals. Nothing here touches the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from lowmem_flux2.errors import CheckpointAccess, CheckpointBroken, CheckpointError, CheckpointMissing
from lowmem_flux2.planning import sources
from lowmem_flux2.planning.configs import CONFIG_FILES
from lowmem_flux2.planning.sources import MODEL_NAMES, ModelSource, resolve_model, shipped_configs

REPO = "black-forest-labs/FLUX.2-klein-4B"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    return cache


def cached(cache: Path, repo_id: str, source: Path | None, name: str = "flux2-klein-4b") -> Path:
    """Put a snapshot into the hub cache: a copy of a folder, or an alias's configs alone."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / "abc123"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    if source is not None:
        shutil.copytree(source, snapshot)
        return snapshot
    for key, file in CONFIG_FILES.items():
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text(json.dumps(shipped_configs(name)[key]))
    return snapshot


@pytest.mark.parametrize("name", MODEL_NAMES[1:])
def test_alias_needs_no_download(name: str) -> None:
    found = resolve_model(name, offline=True)
    assert (found.name, found.kind, found.folder, found.spec.name) == (name, "hub", None, name)
    assert found.repo_id is not None
    assert found.repo_id.lower().endswith(name.removeprefix("flux2-"))
    assert found.repo_id.startswith("black-forest-labs/FLUX.2-")
    assert found.spec.is_distilled == (name in ("flux2-klein-4b", "flux2-klein-9b", "flux2-klein-9b-kv"))
    assert found.spec.caches_references == name.endswith("-kv")


def test_base_synonyms() -> None:
    assert resolve_model("flux2-klein-4b-base") == resolve_model("flux2-klein-base-4b")
    assert resolve_model("flux2-klein-9b-base").repo_id == "black-forest-labs/FLUX.2-klein-base-9B"


def test_alias_with_a_complete_snapshot(empty_cache: Path, tiny_klein: Path) -> None:
    snapshot = cached(empty_cache, REPO, tiny_klein)
    found = resolve_model("flux2-klein-4b")
    assert (found.folder, found.name, found.spec.stored_dtype) == (snapshot, "flux2-klein-4b", "fp32")
    assert found.spec.transformer == resolve_model(str(tiny_klein)).spec.transformer
    assert resolve_model("flux2-klein-4b", revision="v2").folder is None


def test_alias_with_half_a_snapshot(empty_cache: Path, tiny_klein: Path) -> None:
    snapshot = cached(empty_cache, REPO, tiny_klein)
    shutil.rmtree(snapshot / "vae")
    found = resolve_model("flux2-klein-4b")
    assert found.folder is None
    assert found.spec.transformer.num_double == 5


@pytest.mark.parametrize("fixture", ["tiny_dev", "tiny_klein", "tiny_klein_distilled"])
def test_local_folder(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    found = resolve_model(str(folder))
    assert (found.kind, found.folder, found.repo_id, found.name) == ("local", folder, None, folder.name)
    assert found.spec.stored_dtype == "fp32"
    assert found.spec.form == ("dev" if fixture == "tiny_dev" else "klein")
    assert found.spec.is_distilled == (fixture == "tiny_klein_distilled")


def test_local_folder_in_part(tmp_path: Path, tiny_klein: Path) -> None:
    folder = shutil.copytree(tiny_klein, tmp_path / "model")
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointBroken, match="truncated"):
        resolve_model("./model")
    weights.unlink()
    with pytest.raises(CheckpointMissing, match=r"transformer has no \.safetensors"):
        resolve_model("./model")
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    assert resolve_model("./model").folder is None


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"model": {', b"version https://git-lfs", b"\xff\xfe", b"[]"])
def test_a_folder_without_a_usable_tokenizer(
    tmp_path: Path, empty_cache: Path, tiny_klein: Path, file: str, content: bytes | None
) -> None:
    for folder in (tmp_path / "model", cached(empty_cache, REPO, tiny_klein)):
        if folder.name == "model":
            shutil.copytree(tiny_klein, folder)
        path = folder / "tokenizer" / file
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    if content is None:
        with pytest.raises(CheckpointMissing, match=rf"tokenizer/{file} is missing") as caught:
            resolve_model("./model")
        assert caught.value.exit_code == 4
        assert resolve_model("flux2-klein-4b").folder is None
        shutil.rmtree(tmp_path / "model" / "tokenizer")
        with pytest.raises(CheckpointMissing, match=r"tokenizer/tokenizer\.json is missing"):
            resolve_model("./model")
    else:
        for model in ("./model", "flux2-klein-4b"):
            with pytest.raises(CheckpointBroken, match=rf"tokenizer/{file} "):
                resolve_model(model)


def test_the_embedded_model_is_complete() -> None:
    found = resolve_model("shapes", offline=True)
    assert found.folder == sources.ASSETS / "shapes"


def test_weights_of_another_model(tmp_path: Path, tiny_klein: Path) -> None:
    folder = shutil.copytree(tiny_klein, tmp_path / "model")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "num_layers": config["num_layers"] + 1}))
    with pytest.raises(CheckpointBroken, match="config implies"):
        resolve_model("./model")


def test_embedded(tmp_path: Path, tiny_klein_distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    with pytest.raises(CheckpointMissing, match="reinstall"):
        resolve_model("shapes")
    shutil.copytree(tiny_klein_distilled, tmp_path / "shapes")
    (tmp_path / "shapes" / "lowmem_flux2.json").write_text('{"height": 64, "width": 64}')
    found = resolve_model("shapes", offline=True)
    assert (found.kind, found.folder, found.spec.defaults.height) == ("embedded", tmp_path / "shapes", 64)


def test_not_a_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    with pytest.raises(CheckpointMissing, match=r"no model_index\.json$"):
        resolve_model("flux")
    (tmp_path / "flux" / "flux2-dev.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointMissing, match=r"give that file: -m flux/flux2-dev\.safetensors"):
        resolve_model("flux")
    with pytest.raises(CheckpointBroken, match="is empty"):
        resolve_model("flux/flux2-dev.safetensors")


@pytest.mark.parametrize("path", ["./none", "/none/of/it", "~/none", "a/b/c", "..\\models"])
def test_absent_folder(path: str) -> None:
    with pytest.raises(CheckpointMissing, match="there is no folder or file"):
        resolve_model(path, offline=True)


@pytest.mark.parametrize("path", ["klein.safetensors", "me/klein.gguf", "./klein.ckpt"])
@pytest.mark.parametrize("parts", [{}, {"vae": "flux2-dev"}])
def test_absent_file(path: str, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not asked of the hub, and its parts are not what is wrong."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointMissing, match="there is no file "):
        resolve_model(path, **parts)
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).symlink_to("nowhere")
    with pytest.raises(CheckpointMissing, match="a link to nowhere, which is not there"):
        resolve_model(path, **parts)


def test_a_part_of_a_folder(tiny_klein: Path) -> None:
    with pytest.raises(CheckpointMissing, match="is a part of a model: give the folder that it is in"):
        resolve_model(str(tiny_klein / "transformer"))


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("flux2-klein", "flux2-klein-"), ("FLUX2-DEV", "flux2-dev"), ("shape", "shapes"), ("sdxl", "known are shapes")],
)
def test_unknown_name(typed: str, nearest: str) -> None:
    with pytest.raises(CheckpointMissing, match=nearest) as caught:
        resolve_model(typed)
    assert caught.value.exit_code == 4


def test_hub_id_from_the_cache(empty_cache: Path, tiny_dev: Path) -> None:
    snapshot = cached(empty_cache, "me/mine", tiny_dev)
    found = resolve_model("me/mine", offline=True)
    assert found == ModelSource("me/mine", "hub", snapshot, "me/mine", None, found.spec, snapshot)


def test_hub_id_with_configs_only(empty_cache: Path, tmp_path: Path) -> None:
    cached(empty_cache, "me/mine", None)
    found = resolve_model("me/mine", offline=True)
    assert (found.folder, found.spec.source, found.spec.is_distilled) == (None, "me/mine", True)
    cached(tmp_path / "other", "me/other", None, "flux2-dev")
    assert resolve_model("me/other", cache_dir=tmp_path / "other").spec.form == "dev"


def test_hub_id_downloads_configs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = cached(tmp_path / "remote", "me/mine", None)
    asked = []

    def download(repo_id: str, file: str, **options: Any) -> str:
        asked.append((repo_id, file, options["revision"]))
        if not (remote / file).is_file():
            raise refusal(hub_errors.RemoteEntryNotFoundError, 404)
        return str(remote / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = resolve_model("me/mine", revision="v1")
    assert (found.folder, found.revision, found.spec.form) == (None, "v1", "klein")
    assert {file for _, file, _ in asked} == {*CONFIG_FILES.values(), "lowmem_flux2.json"}
    (remote / "vae/config.json").unlink()
    with pytest.raises(CheckpointBroken, match=r"me/mine .* has no vae/config\.json"):
        resolve_model("me/mine")


def refusal(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    response: Any = SimpleNamespace(
        status_code=status, headers={}, request=None
    )  # the client's class varies by version
    return kind("refused", response=response)


def raised(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class ClientTimeoutError(Exception):
    __module__ = "httpx2"


LOCAL = hub_errors.LocalEntryNotFoundError("not in the cache")
FORBIDDEN = refusal(hub_errors.HfHubHTTPError, 403)
NOWHERE = "connect once to fetch it, or give a folder"

HUB_ERRORS: dict[str, tuple[BaseException, bool, type[CheckpointError], str]] = {
    "gated": (refusal(hub_errors.GatedRepoError, 401), False, CheckpointAccess, "hf auth login"),
    "no licence": (
        refusal(hub_errors.GatedRepoError, 403),
        True,
        CheckpointAccess,
        "accept its licence at https://hugg",
    ),
    "forbidden": (raised(hub_errors.LocalEntryNotFoundError("x"), FORBIDDEN), True, CheckpointAccess, "no access"),
    "no repository": (refusal(hub_errors.RepositoryNotFoundError, 401), False, CheckpointMissing, "if it is private"),
    "not there": (refusal(hub_errors.RepositoryNotFoundError, 404), True, CheckpointMissing, "no repository me/mine"),
    "revision": (refusal(hub_errors.RevisionNotFoundError, 404), True, CheckpointMissing, "no revision 'v9'"),
    "not cached": (LOCAL, False, CheckpointMissing, NOWHERE),
    "offline": (hub_errors.OfflineModeIsEnabled("off"), False, CheckpointMissing, NOWHERE),
    "refused": (ConnectionRefusedError("no"), False, CheckpointMissing, NOWHERE),
    "timeout": (TimeoutError("slow"), False, CheckpointMissing, NOWHERE),
    "client timeout": (ClientTimeoutError("slow"), False, CheckpointMissing, NOWHERE),
    "server": (refusal(hub_errors.HfHubHTTPError, 503), True, CheckpointMissing, "it answers 503"),
    "disk full": (OSError(28, "No space left on device"), True, CheckpointMissing, "No space left"),
    "bad id": (hub_errors.HFValidationError("no dashes"), True, CheckpointMissing, "nor a valid hub id: no dashes"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, has_token, kind, told = HUB_ERRORS[case]

    def download(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x" if has_token else None)
    with pytest.raises(CheckpointError, match=told) as caught:
        resolve_model("me/mine", revision="v9")
    assert type(caught.value) is kind
    assert "me/mine" in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ZeroDivisionError):
        resolve_model("me/mine")


def test_offline_for_real() -> None:
    with pytest.raises(CheckpointMissing, match=NOWHERE):
        resolve_model("me/mine", offline=True)
