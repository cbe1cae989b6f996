"""LoRA files: which keys mean which Linear, what is refused, what they cost, and where a plan says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
from machines import DEV, KLEIN_4B, KLEIN_9B, SUPPORTED, machine, spec
from typer.testing import CliRunner

from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing, LowMemFlux2Error, PlanMismatch, UsageError
from lowmem_flux2.planning.adapter_file import read_adapter
from lowmem_flux2.planning.adapters import Lora, lora_files
from lowmem_flux2.planning.changes import Change
from lowmem_flux2.planning.linears import is_conditioning, linears_of
from lowmem_flux2.planning.models import ModelSpec, TransformerSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.replay import check_replay
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.workload import Request, make_request, workload_of

SMALL = TransformerSpec(2, 3, 2, 32, 32, 32, 96, 3.0, guidance_embeds=True, timestep_channels=64)
MODEL = replace(spec(DEV), transformer=SMALL)
PAIR = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"]


def planned(path: Path, scale: float = 1.0, model: ModelSpec = MODEL, **more: Any) -> Plan:
    request = asked(path, scale, model, **more)
    work, hardware = workload_of(request, model), machine("rtx-3060-12gb")
    return make_plan(
        model, work, hardware, Selection(), profile="x", guidance_scale=request.guidance_scale, support=SUPPORTED
    )


def asked(path: Path | None, scale: float = 1.0, model: ModelSpec = MODEL, **more: Any) -> Request:
    given = () if path is None else (Lora.of(path, scale),)
    return make_request(model, ("x",), loras=given, **more)


def small(tmp_path: Path, name: str = "a.safetensors", seed: int = 0) -> Path:
    return loras.write(tmp_path / name, loras.diffusers_keys(loras.factors(SMALL, PAIR, seed=seed)))


# ------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("b:c.safetensors", "b:c.safetensors", 1.0),
        ("b:0.5:1", "b:0.5", 1.0),
        ("b:1e-1", "b", 0.1),
    ],
)
def test_a_file_and_a_scale(text: str, path: str, scale: float) -> None:
    lora = Lora.parse(text)
    assert (lora.path, lora.scale) == (str(Path.cwd() / path), scale)
    assert Lora.parse(str(lora)) == lora


@pytest.mark.parametrize("text", ["", ":0.5", "a:nan", "a:inf", "a:-inf", "a:1e999"])
def test_no_file_name_or_no_finite_scale_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lora"):
        Lora.parse(text)


def test_python_takes_paths_pairs_and_text_but_not_one_alone() -> None:
    given = lora_files([Path("a"), ("b", 0.5), "c:2", Lora("/d", 3)])
    assert [(Path(each.path).name, each.scale) for each in given] == [("a", 1), ("b", 0.5), ("c", 2), ("d", 3)]
    with pytest.raises(UsageError, match="a list"):
        lora_files("a.safetensors")


# ---------------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "base_model.model.transformer.", ""])
@pytest.mark.parametrize("ends", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_every_linear_by_its_own_name(prefix: str, ends: tuple[str, str], tmp_path: Path) -> None:
    keys = {}
    for name, (down, up) in loras.factors(SMALL).items():
        keys |= {f"{prefix}{name}.{ends[0]}.weight": down, f"{prefix}{name}.{ends[1]}.weight": up}
    found = read_adapter(Lora.of(loras.write(tmp_path / "a", keys), 1.0), MODEL)
    assert {each.linear: (each.num_rows, each.columns) for each in found.low_ranks} == linears_of(SMALL)
    assert not found.unmatched
    assert all(each.factor == 1.0 for each in found.low_ranks)


@pytest.mark.parametrize("form", ["bfl", "kohya"])
def test_bfl_names_reach_every_linear_and_fused_ones_are_split(form: str, tmp_path: Path) -> None:
    made = loras.factors(SMALL, loras.bfl_names(SMALL))
    keys = loras.bfl_keys(made) if form == "bfl" else loras.kohya_keys(made, alpha=2.0)
    found = read_adapter(Lora.of(loras.write(tmp_path / "a", keys), 1.0), MODEL)
    assert sorted(each.linear for each in found.low_ranks) == sorted(linears_of(SMALL))
    rows = {each.linear: each.rows for each in found.low_ranks}
    h = SMALL.hidden_size
    assert rows["transformer_blocks.1.attn.to_k"] == ((h, h),)
    assert rows["transformer_blocks.1.attn.add_v_proj"] == ((2 * h, h),)
    assert rows["norm_out.linear"] == ((h, h), (0, h))
    assert {each.factor for each in found.low_ranks} == {1.0 if form == "bfl" else 0.5}
    assert not found.unmatched


def test_shapes_are_those_of_the_spec() -> None:
    for name in (DEV, KLEIN_4B, KLEIN_9B):
        dims = spec(name).transformer
        shapes = linears_of(dims)
        assert sum(rows * columns for rows, columns in shapes.values()) == dims.total_weights - sum(
            block.other_weights for block in dims.blocks
        )
        once = sum(rows * columns for linear, (rows, columns) in shapes.items() if is_conditioning(linear))
        assert once == dims.conditioning_weights


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}, 0.25),
        ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 1}}, 2.0),
        ({}, 1.0),
    ],
)
def test_scaling_by_the_config_that_diffusers_saves(config: dict[str, Any], factor: float, tmp_path: Path) -> None:
    packed = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    keys = loras.diffusers_keys(loras.factors(SMALL, PAIR[:1]))
    found = read_adapter(Lora.of(loras.write(tmp_path / "a", keys, packed), 1.0), MODEL)
    assert [each.factor for each in found.low_ranks] == [factor]


def test_some_keys_that_mean_nothing_are_listed(tmp_path: Path) -> None:
    keys = loras.diffusers_keys(loras.factors(SMALL, PAIR))
    keys |= {f"transformer.transformer_blocks.{9 + n}.attn.to_q.lora_A.weight": np.zeros((4, 64)) for n in range(8)}
    found = read_adapter(Lora.of(loras.write(tmp_path / "a", keys), 1.0), MODEL)
    assert (len(found.low_ranks), found.adapter.matched, found.adapter.unmatched) == (2, 4, 8)
    assert found.warning is not None
    assert "8 of 12 keys name nothing" in found.warning
    assert "blocks.10.attn" in found.warning and "and 2 more" in found.warning


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "transformer.blocks.0.lora_A.weight",
            "none of its 3 keys means a Linear of flux2-dev. Looked for transformer",
        ),
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "it is a DoRA"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1", "it is a LoKr"),
        ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "it is a LoHa"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "keys for a text encoder"),
        ("text_encoder.layers.0.self_attn.q_proj.lora_A.weight", "keys for a text encoder"),
        ("transformer.transformer_blocks.0.norm1.linear.lora_A.weight", "made for FLUX.1"),
        ("diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight", "made for FLUX.1"),
        ("lora_unet_single_blocks_0_modulation_lin.lora_down.weight", "made for FLUX.1"),
    ],
)
def test_what_cannot_be_applied_is_named(key: str, said: str, tmp_path: Path) -> None:
    keys = {key: np.zeros((4, 64), np.float32), "x": np.zeros(3), "y": np.zeros(3)}
    with pytest.raises(CheckpointBroken, match=said.replace(".", r"\.")) as refused:
        workload_of(asked(loras.write(tmp_path / "a", keys)), MODEL)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_configs_that_are_not_plain_lora(config: dict[str, Any], tmp_path: Path) -> None:
    packed = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    path = loras.write(tmp_path / "a", loras.diffusers_keys(loras.factors(SMALL, PAIR)), packed)
    with pytest.raises(CheckpointBroken, match="only plain LoRA"):
        workload_of(asked(path), MODEL)


def test_files_that_are_not_there_not_safetensors_or_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"none\.safetensors does not exist"):
        workload_of(asked(tmp_path / "none.safetensors"), MODEL)
    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    with pytest.raises(CheckpointBroken, match="git LFS pointer"):
        workload_of(asked(tmp_path / "text"), MODEL)
    with pytest.raises(CheckpointBroken, match="64 inputs and 64 outputs: the file is made for another model"):
        wide = replace(SMALL, num_heads=4)
        keys = loras.diffusers_keys(loras.factors(wide, PAIR[:1]))
        workload_of(asked(loras.write(tmp_path / "wide", keys)), MODEL)
    down, up = loras.factors(SMALL, PAIR[:1]).popitem()[1]
    for name, keys in {
        "half": {f"{PAIR[0]}.lora_A.weight": down},
        "ranks": {f"{PAIR[0]}.lora_A.weight": down, f"{PAIR[0]}.lora_B.weight": up[:, :2]},
        "packed": {f"{PAIR[0]}.lora_A.weight": down.astype(np.int8), f"{PAIR[0]}.lora_B.weight": up},
        "alphas": {
            f"{PAIR[0]}.lora_A.weight": down,
            f"{PAIR[0]}.lora_B.weight": up,
            f"{PAIR[0]}.alpha": np.ones(2, np.float32),
        },
    }.items():
        said = {"half": "only one of its two", "ranks": "another model", "packed": "I8", "alphas": "not one number"}
        with pytest.raises(CheckpointBroken, match=said[name]):
            workload_of(asked(loras.write(tmp_path / name, keys), 0.0), MODEL)  # at scale 0 too


# ----------------------------------------------------------------------------------------------- what it costs


def test_factors_are_counted_on_the_device(tmp_path: Path) -> None:
    model = spec(KLEIN_9B)
    dims = model.transformer
    names = [name for name in linears_of(dims) if "to_q" in name or name == "context_embedder"]
    rank = 16
    keys = loras.diffusers_keys(loras.factors(dims, names, rank=rank))
    path = loras.write(tmp_path / "a.safetensors", keys)
    with_it, without = planned(path, model=model), planned(path, 0.0, model=model)
    kept = sum(
        rank * sum(shape) for name, shape in linears_of(dims).items() if name in names and not is_conditioning(name)
    )
    (adapter,) = with_it.workload.adapters
    assert (adapter.values, adapter.rank, adapter.tensors) == (kept, rank, 2 * len(names))
    assert adapter.once_values == rank * sum(linears_of(dims)["context_embedder"])
    cost, bare = with_it.stage("denoise").cost, without.stage("denoise").cost
    if with_it.stage("denoise").block_placements == without.stage("denoise").block_placements:
        assert 0 <= cost.resident_bytes - bare.resident_bytes - 2 * kept <= adapter.tensors * 256
    product = with_it.workload.sequence_tokens * rank * 2
    assert cost.activation_bytes - bare.activation_bytes == product
    assert without.workload.adapters == ()
    assert with_it.stage("encode").cost == without.stage("encode").cost


# ------------------------------------------------------------------------------------------- where it is recorded


def test_a_plan_carries_its_adapters_and_its_digest_tells_them_apart(tmp_path: Path) -> None:
    first, other = small(tmp_path), small(tmp_path, "b.safetensors", seed=1)
    (tmp_path / "copy.safetensors").write_bytes(first.read_bytes())
    plan = planned(first)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), "x") == plan
    assert plan.to_json()["workload"]["adapters"][0]["path"] == str(first)
    assert planned(tmp_path / "copy.safetensors").digest == plan.digest
    digests = {plan.digest, planned(first, 0.5).digest, planned(other).digest, planned(first, 0.0).digest}
    assert len(digests) == 4


def test_a_plan_is_replayed_with_the_same_adapter_alone(tmp_path: Path) -> None:
    path, other = small(tmp_path), small(tmp_path, "b.safetensors", seed=1)
    plan = planned(path)
    hardware = machine("rtx-3060-12gb")
    check_replay(plan, MODEL, asked(path), hardware, "p")
    for request, here in ((asked(path, 0.5), "a.safetensors"), (asked(other), "b.safetensors"), (asked(None), "none")):
        with pytest.raises(PlanMismatch, match=f"adapters: plan a.safetensors .* at 1, here {here}"):
            check_replay(plan, MODEL, request, hardware, "p")
    path.write_bytes(other.read_bytes())  # another file under the name
    with pytest.raises(PlanMismatch, match="adapters"):
        check_replay(plan, MODEL, asked(path), hardware, "p")


def test_printed_commands_keep_the_lora(tmp_path: Path) -> None:
    path = small(tmp_path)
    change = Change(MODEL, workload_of(asked(path, 0.3), MODEL), machine("rtx-3060-12gb"), Selection())
    assert f"--lora {path}:0.3" in change.command("x")
    assert "--lora" not in change.with_model(KLEIN_4B).command("x")


def test_parsing_keeps_numbers() -> None:
    assert math.isclose(Lora.parse(str(Lora("/a", 1 / 3))).scale, 1 / 3, rel_tol=0)


@pytest.mark.parametrize(
    ("text", "code"), [("none.safetensors", 4), ("none.safetensors:0", 4), (":1", 2), ("a:nan", 2)]
)
def test_the_command_line_refuses_before_anything_else(text: str, code: int) -> None:
    failed = CliRunner().invoke(app, ["plan", "-p", "x", "--lora", text])
    assert isinstance(failed.exception, LowMemFlux2Error)
    assert failed.exception.exit_code == code


def test_a_plan_shows_each_lora(tmp_path: Path) -> None:
    dims = spec(KLEIN_4B).transformer
    path = loras.write(tmp_path / "a.safetensors", loras.diffusers_keys(loras.factors(dims, PAIR)))
    command = ["plan", "-m", KLEIN_4B, "--profile", "rtx-4090-24gb", "-p", "x", "--lora", f"{path}:0.5"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "LoRA a.safetensors at 0.5: 4 of 4 keys, 169 KiB beside the weights" in shown.output
