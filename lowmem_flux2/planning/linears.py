"""Names and shapes of the transformer's Linears (Flux2Transformer2DModel, diffusers 0.42.1), and of what files hold of
their weights: some of BFL's are fused, or have their rows in another order (``layouts``)."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_flux2.planning.layouts import Rows, bfl_modules, model_tensors
from lowmem_flux2.planning.models import TransformerSpec

CONDITIONING = (
    "time_guidance_embed",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
    "context_embedder",
)
"""Modules that are run once per generation and then dropped."""


DOUBLE_LINEARS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff_context.linear_in", "ff_context.linear_out"),
)
SINGLE_LINEARS = ("attn.to_qkv_mlp_proj", "attn.to_out")
"""Diffusers' names in the order of ``TransformerSpec.double_block`` and ``single_block``."""


@dataclass(frozen=True, slots=True)
class Part:
    """A Linear, and which rows of a stored weight are its own, in this order."""

    linear: str
    rows: Rows


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as some file has it, (rows, columns), and the Linears that it is made of."""

    rows: int
    columns: int
    parts: tuple[Part, ...]


def linears_of(dims: TransformerSpec) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every Linear, by diffusers' name, in the order of the blocks."""
    h, m = dims.hidden_size, dims.mlp_size
    shapes: dict[str, tuple[int, int]] = {
        "x_embedder": (h, dims.in_channels),
        "context_embedder": (h, dims.joint_dim),
        "double_stream_modulation_img.linear": (6 * h, h),
        "double_stream_modulation_txt.linear": (6 * h, h),
        "single_stream_modulation.linear": (3 * h, h),
        "norm_out.linear": (2 * h, h),
        "proj_out": (dims.patch_size**2 * dims.out_channels, h),
    }
    for embedder in ("timestep_embedder", "guidance_embedder")[: 2 if dims.guidance_embeds else 1]:
        shapes[f"time_guidance_embed.{embedder}.linear_1"] = (h, dims.timestep_channels)
        shapes[f"time_guidance_embed.{embedder}.linear_2"] = (h, h)
    for index in range(dims.num_double):
        block = f"transformer_blocks.{index}"
        shapes |= {f"{block}.attn.{name}": (h, h) for name in (*_IMAGE_QKV, "to_out.0", *_TEXT_QKV, "to_add_out")}
        for stream in ("ff", "ff_context"):
            shapes[f"{block}.{stream}.linear_in"] = (2 * m, h)
            shapes[f"{block}.{stream}.linear_out"] = (h, m)
    for index in range(dims.num_single):
        block = f"single_transformer_blocks.{index}"
        shapes[f"{block}.attn.to_qkv_mlp_proj"] = (3 * h + 2 * m, h)
        shapes[f"{block}.attn.to_out"] = (h, h + m)
    return shapes


def is_conditioning(linear: str) -> bool:
    """Whether the Linear of this name is run once per generation, and not at each step."""
    return linear.partition(".")[0] in CONDITIONING


def stored_weights(dims: TransformerSpec) -> dict[str, StoredWeight]:
    """Every weight that files may hold of these Linears, by its module's name: diffusers' or BFL's."""
    shapes = linears_of(dims)
    found = {name: StoredWeight(*shape, (Part(name, ((0, shape[0]),)),)) for name, shape in shapes.items()}
    for name in bfl_modules(dims.num_double, dims.num_single):
        targets = [tensor.removesuffix(".weight") for tensor, _ in model_tensors(f"{name}.weight", 0)]
        if all(target in shapes for target in targets):  # the norms of q and k are none, nor is a guidance embedder
            rows = sum(shapes[target][0] for target in targets)
            taken = [own for _, own in model_tensors(f"{name}.weight", rows)]
            found[name] = StoredWeight(rows, shapes[targets[0]][1], tuple(map(Part, targets, taken)))
    for index in range(dims.num_double):  # as diffusers fuses them where it is told to
        attention, bfl = f"transformer_blocks.{index}.attn", f"double_blocks.{index}"
        found[f"{attention}.to_qkv"] = found[f"{bfl}.img_attn.qkv"]
        found[f"{attention}.to_added_qkv"] = found[f"{bfl}.txt_attn.qkv"]
    return found


_IMAGE_QKV, _TEXT_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
