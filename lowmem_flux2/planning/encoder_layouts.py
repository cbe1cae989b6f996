"""The names and rows of a text encoder's tensors in llama.cpp's GGUF files, and in transformers'.

Names follow gguf-py's ``get_tensor_name_map``, which tests compare. llama.cpp turns queries and keys by neighbouring
pairs in its architectures `gguf_header.INTERLEAVED`: there its converter (``LlamaModel.permute`` of
convert_hf_to_gguf.py) has put row j of a head's second half right behind row j of its first half.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from lowmem_flux2.planning.layouts import Rows

LINEARS: Final = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Of a layer, in the order of ``TextEncoderSpec.layer``."""
_MODULES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Final[Mapping[str, str]] = {
    **dict(zip(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), LINEARS, strict=True)),
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TURNED: Final = ("attn_q", "attn_k")
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)")


def is_llama_cpp(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are in llama.cpp's layout."""
    return "blk.0.attn_norm.weight" in names


def encoder_tensor(name: str) -> str | None:
    """transformers' name of one of llama.cpp's tensors; None for one that no text encoder here has."""
    module, _, leaf = name.rpartition(".")
    if block := _BLOCK.fullmatch(module):
        target = _LAYER.get(block[2])
        return target and f"model.layers.{block[1]}.{target}.{leaf}"
    target = _MODULES.get(module)
    return target and f"{target}.{leaf}"


def is_turned(name: str) -> bool:
    """Whether llama.cpp's tensor of this name is of queries or keys."""
    block = _BLOCK.match(name)
    return block is not None and block[2] in _TURNED


def turned_rows(num_rows: int, head_dim: int) -> Rows:
    """Where a model's rows of queries or keys are among the stored ones, every second one from each first on."""
    return tuple(_halves(num_rows, head_dim))


def _halves(num_rows: int, head_dim: int) -> Iterator[tuple[int, int]]:
    for head in range(0, num_rows, head_dim):
        yield head, head_dim // 2
        yield head + 1, head_dim // 2
