"""Safetensors headers: what is read, and what is said of files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lowmem_flux2.errors import CheckpointBroken, CheckpointError, CheckpointMissing
from lowmem_flux2.planning.headers import read_header
from lowmem_flux2.planning.weight_files import check_component, component_headers


def raw(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(tmp_path: Path, content: bytes, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.sampled_from(["float16", "float32", "int64", "bool"]))
def test_reads_what_the_library_writes(tmp_path: Path, shapes: list[list[int]], dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": np.ones(shape, dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.file_bytes == path.stat().st_size
    assert {name: info.shape for name, info in header.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    content = path.read_bytes()
    for name, info in header.tensors.items():
        assert (info.num_values, info.num_bytes) == (tensors[name].size, tensors[name].nbytes)
        place = content[header.data_begin + info.begin : header.data_begin + info.end]
        assert place == tensors[name].tobytes()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_truncation_and_flip_is_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(raw({"a": entry(0, 8, [2, 2]), "b": entry(8, 12, [2])}, bytes(12)))
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(CheckpointBroken):
        read_header(written(tmp_path, bytes(content[:cut])))
    content[data.draw(st.integers(0, len(content) - 13))] = data.draw(st.integers(0, 255))
    try:
        read_header(written(tmp_path, bytes(content)))
    except CheckpointError as error:
        assert "model.safetensors" in str(error)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9\nsize 2147483648\n"
GOOD = {"a": entry(0, 8, [2, 2]), "b": entry(8, 12, [2])}

REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["is empty"]),
    "tiny": (b"\x80", ["truncated", "1 bytes"]),
    "lfs pointer": (LFS, ["git LFS pointer", "git lfs pull", "2.00 GiB"]),
    "html": (b"\n<!DOCTYPE html><html>", ["HTML page"]),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ["HTML page"]),
    "zip pickle": (b"PK\x03\x04" + bytes(26) + b"model/data.pkl" + bytes(40), ["pickle"]),
    "zip": (b"PK\x03\x04" + bytes(26) + b"model.safetensors" + bytes(40), ["ZIP archive", "unpack"]),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(40), ["RAR archive", "unpack"]),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), ["gzip archive", "unpack"]),
    "json": (b'{"weight_map": {"a": "b"}}', ["a text in JSON", "weight_map"]),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["pickle"]),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), ["GGUF"]),
    "noise": (b"\x01\x02\x03\x04\x05\x06\x07\x08" * 4, ["claims a header of"]),
    "absurd length": ((10**12).to_bytes(8, "little") + b"{}", ["1000000000000", "100000000"]),
    "no brace": (raw(b"[1, 2, 3]"), ["does not start with a brace"]),
    "header cut": (raw(GOOD)[:30], ["truncated", "30"]),
    "data cut": (raw(GOOD, bytes(5)), ["truncated", str(len(raw(GOOD)) + 12), str(len(raw(GOOD)) + 5), "download"]),
    "data long": (raw(GOOD, bytes(15)), ["3 bytes follow"]),
    "bad json": (raw(b"{'a': 1}"), ["not valid JSON"]),
    "bad utf-8": (raw(b'{"\xff": 1}'), ["not valid JSON"]),
    "same name twice": (raw(b'{"a": 1, "a": 2}'), ["twice"]),
    "no offsets": (raw({"a": {"dtype": "F16", "shape": [1]}}), ["tensor 'a'", "data_offsets"]),
    "not an object": (raw({"a": 3}), ["tensor 'a'"]),
    "unknown dtype": (raw({"a": entry(0, 2, [1], "F17")}, bytes(2)), ["unknown dtype 'F17'"]),
    "dtype a list": (raw({"a": {**entry(0, 2, [1]), "dtype": []}}, bytes(2)), ["unknown dtype"]),
    "negative": (raw({"a": entry(0, 2, [-1])}, bytes(2)), ["impossible"]),
    "backwards": (raw({"a": entry(4, 2, [1])}, bytes(4)), ["impossible"]),
    "wrong size": (raw({"a": entry(0, 6, [2])}, bytes(6)), ["takes 4 bytes", "has 6"]),
    "overlap": (raw({"a": entry(0, 8, [4]), "b": entry(4, 8, [2])}, bytes(8)), ["'b'", "overlaps"]),
    "gap": (raw({"a": entry(0, 4, [2]), "b": entry(8, 12, [2])}, bytes(12)), ["'b'", "gap"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_found(tmp_path: Path, case: str) -> None:
    content, told = REFUSED[case]
    path = written(tmp_path, content)
    with pytest.raises(CheckpointBroken) as caught:
        read_header(path)
    for text in (str(path), *told):
        assert text in str(caught.value)


def test_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 4, [2])}).encode().ljust(0x0280)  # little-endian 80 02: a pickle's first bytes
    assert set(read_header(written(tmp_path, raw(header, bytes(4)))).tensors) == {"a"}


def test_sub_byte_dtype(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, raw({"a": entry(0, 3, [2, 3], "F4")}, bytes(3))))
    assert header.tensors["a"].num_values == 6


def test_absent_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointMissing):
            read_header(path)
    with pytest.raises(CheckpointMissing, match="does not exist"):
        component_headers(tmp_path / "vae")
    with pytest.raises(CheckpointMissing, match=r"no \.safetensors weights"):
        component_headers(tmp_path)


def test_a_damaged_file_of_the_hub_cache_is_told_by_its_blob(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    with pytest.raises(CheckpointBroken, match=r"remove .*/blobs/abc and download it again"):
        read_header(tmp_path / "model.safetensors")


def sharded(folder: Path) -> None:
    save_file({"a": np.zeros(3, "float16")}, folder / "model-1.safetensors")
    save_file({"b": np.zeros(5, "float32")}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert [list(header.tensors) for header in component_headers(tmp_path)] == [["a"], ["b"]]
    component = check_component(tmp_path)
    assert (component.num_weights, component.tensor_bytes, component.dtype) == (8, 26, "F32")
    assert component.stored_dtype == "fp32"
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match=r"1 of 2 shards are missing: model-2\.safetensors"):
        component_headers(tmp_path)


def test_shards_without_their_index_are_half_a_download(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": np.zeros(3, "float16")}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointMissing, match="without their index; finish the download"):
        component_headers(tmp_path)


def test_shards_without_a_needed_tensor_may_be_missing(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert [list(header.tensors) for header in component_headers(tmp_path, lambda name: name == "a")] == [["a"]]
    assert check_component(tmp_path, {3}, lambda name: name == "a").num_weights == 3
    with pytest.raises(CheckpointMissing, match=r"1 of 1 shards are missing: model-2\.safetensors"):
        component_headers(tmp_path, lambda name: name == "b")


def test_shard_of_another_download(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c": np.zeros(5, "float32")}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointBroken, match="lacks the tensor 'b'"):
        component_headers(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointBroken, match="weight_map"):
        component_headers(tmp_path)


def save_into(folder: Path, name: str) -> None:
    save_file({"a": np.zeros(1, "float16")}, folder / name)


def test_which_file(tmp_path: Path) -> None:
    save_into(tmp_path, "x.fp16.safetensors")
    assert component_headers(tmp_path)[0].path.name == "x.fp16.safetensors"
    save_into(tmp_path, "y.safetensors")
    with pytest.raises(CheckpointBroken, match="cannot tell"):
        component_headers(tmp_path)
    save_into(tmp_path, "diffusion_pytorch_model.safetensors")
    assert component_headers(tmp_path)[0].path.name == "diffusion_pytorch_model.safetensors"


def test_pickle_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointBroken, match="pickle"):
        component_headers(tmp_path)


def test_count_against_the_config(tmp_path: Path) -> None:
    save_file({"a": np.zeros(6, "float16"), "n": np.zeros((), "int64")}, tmp_path / "model.safetensors")
    assert check_component(tmp_path, {6}).stored_dtype == "fp16"
    with pytest.raises(CheckpointBroken, match=r"hold 6 weights .* implies 7 or 9"):
        check_component(tmp_path, {9, 7})


def test_quantized_and_empty(tmp_path: Path) -> None:
    save_file({"a": np.zeros(6, "uint8")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointBroken, match="stored as U8, which is not read here: read are bf16"):
        _ = check_component(tmp_path).stored_dtype
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointBroken, match="no tensors"):
        check_component(tmp_path)
