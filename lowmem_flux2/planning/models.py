"""What a FLUX.2 model is, in numbers: blocks, widths and weight counts, from its config files alone.

No weights are read and torch is never imported. The counts are exact: tests compare every one with the real modules of
diffusers and transformers on torch's meta device. Sizes here are counts of *weights*; bytes come from
`planning.formats`, which knows what a stored format costs.

With hidden size ``h`` and MLP width ``m = int(mlp_ratio * h)`` (diffusers 0.42.1, ``transformer_flux2.py``)::

    double-stream block   2 * (4 h^2 + 3 h m)   each stream: q, k, v, out and a gated feed-forward; 26 h^2 at ratio 3
    single-stream block        4 h^2 + 3 h m    the same, fused into one projection in and one out; 13 h^2 at ratio 3

`planning.configs` builds a `ModelSpec` from the JSON files, `planning.sources` from a MODEL argument.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from lowmem_flux2.planning.file_sizes import FileSizes
from lowmem_flux2.planning.vae_spec import VaeSpec

BlockKind = Literal["double", "single", "layer"]
Architecture = Literal["mistral3", "qwen3"]
Form = Literal["dev", "klein"]
Component = Literal["transformer", "text_encoder", "vae"]
StoredDtype = Literal["bf16", "fp16", "fp32"]

OUT_LAYERS: Final[Mapping[Architecture, tuple[int, ...]]] = {"mistral3": (10, 20, 30), "qwen3": (9, 18, 27)}
"""Hidden states that the pipelines concatenate: entry k is the output after k layers (diffusers' pipelines/flux2)."""


_DECODER_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_VISION: Final = re.compile(r"vision|multi_modal_projector")
_NOT_DECODER: Final = re.compile(r"vision|multi_modal_projector|lm_head")


def is_vision(name: str) -> bool:
    """Whether a text encoder's tensor of this stored name is of what sees pictures."""
    return _VISION.search(name) is not None


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block that is loaded, placed and streamed as a unit.

    Attributes:
        kind: ``double`` or ``single`` (transformer), ``layer`` (text encoder).
        linears: (rows, columns) of each Linear's weight, which a weight format may quantize.
        others: sizes of its other tensors, norm scales and biases, which are never quantized.
        packed: bytes of each Linear's weight as a GGUF file has it quantized, 0 for one that it has not; empty where
            there is no such file.
        bits: of each Linear in ``formats.MIXED``; empty where all have 4.
    """

    kind: BlockKind
    linears: tuple[tuple[int, int], ...]
    others: tuple[int, ...]
    packed: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()

    @property
    def linear_weights(self) -> int:
        """Weights of all Linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def other_weights(self) -> int:
        """Everything else."""
        return sum(self.others)

    @property
    def total_weights(self) -> int:
        """Linear and other weights together."""
        return self.linear_weights + self.other_weights


def _as_packed(blocks: tuple[BlockSpec, ...], packed: tuple[tuple[int, ...], ...]) -> tuple[BlockSpec, ...]:
    if not packed:
        return blocks
    return tuple(replace(block, packed=held) for block, held in zip(blocks, packed, strict=True))


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Shape of a Flux2Transformer2DModel. No Linear in it has a bias.

    Attributes:
        packed: ``BlockSpec.packed`` of each block, where the weights are in a GGUF file.
    """

    num_double: int
    num_single: int
    num_heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    joint_dim: int
    mlp_ratio: float
    guidance_embeds: bool
    timestep_channels: int
    patch_size: int = 1
    packed: tuple[tuple[int, ...], ...] = ()

    @property
    def hidden_size(self) -> int:
        """Width h of both streams."""
        return self.num_heads * self.head_dim

    @property
    def mlp_size(self) -> int:
        """Width m of the feed-forward, after the gate."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def double_block(self) -> BlockSpec:
        """One double-stream block; each stream normalises q and k by head."""
        h, m = self.hidden_size, self.mlp_size
        stream = ((h, h),) * 4 + ((2 * m, h), (h, m))  # q, k, v, out; gate and up in one, down
        return BlockSpec("double", 2 * stream, (self.head_dim,) * 4)

    @property
    def single_block(self) -> BlockSpec:
        """One single-stream block; its two Linears are fused ones."""
        h, m = self.hidden_size, self.mlp_size
        return BlockSpec("single", ((3 * h + 2 * m, h), (h, h + m)), (self.head_dim,) * 2)

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in the order in which a step runs them: double, then single."""
        alike = (self.double_block,) * self.num_double + (self.single_block,) * self.num_single
        return _as_packed(alike, self.packed)

    @property
    def conditioning_weights(self) -> int:
        """Timestep and guidance embedding, modulation, context embedder: needed once per generation, then dropped."""
        h = self.hidden_size
        embedders = (2 if self.guidance_embeds else 1) * (self.timestep_channels * h + h * h)
        modulation = (6 + 6 + 3) * h * h
        return embedders + modulation + self.joint_dim * h

    @property
    def norm_out_weights(self) -> int:
        """norm_out's Linear, one of `remaining_non_block_weights`; like modulation it depends on the timestep alone."""
        return 2 * self.hidden_size * self.hidden_size

    @property
    def remaining_non_block_weights(self) -> int:
        """x_embedder, norm_out and proj_out: the modules outside the blocks that every step runs."""
        h = self.hidden_size
        return self.in_channels * h + self.norm_out_weights + h * self.patch_size**2 * self.out_channels

    @property
    def non_block_weights(self) -> int:
        """Everything outside the blocks."""
        return self.conditioning_weights + self.remaining_non_block_weights

    @property
    def total_weights(self) -> int:
        """All weights of the transformer."""
        return (
            self.num_double * self.double_block.total_weights
            + self.num_single * self.single_block.total_weights
            + self.non_block_weights
        )


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """What sees pictures in a Mistral3 checkpoint: a Pixtral tower, and the projector into the decoder's width.

    Attributes:
        patch_px: side of a patch.
        merge: patches along each side of what becomes one token.
        longest_px: a picture's longer side is reduced to this.
        weights: of tower and projector.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    patch_px: int
    merge: int
    longest_px: int
    weights: int


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """Shape of the text encoder, of which only the layers up to the last tapped one are used.

    Attributes:
        out_layers: tapped hidden states; their concatenation is the transformer's text input.
        vision: what sees pictures, in no count here; None without it.
        attention_bias: whether q, k, v and o carry biases (no released encoder has them).
        packed: ``BlockSpec.packed`` of each used layer, where the weights are in a GGUF file.
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    out_layers: tuple[int, ...]
    tie_word_embeddings: bool
    vision: VisionSpec | None = None
    attention_bias: bool = False
    packed: tuple[tuple[int, ...], ...] = ()

    @property
    def layers_used(self) -> int:
        """Layers that must run: the deepest tapped one."""
        return max(self.out_layers)

    @property
    def layer(self) -> BlockSpec:
        """One decoder layer: grouped-query attention, gated feed-forward, two norms; Qwen3 also normalises q and k."""
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention, mlp = ((q, h), (kv, h), (kv, h), (h, q)), self.intermediate_size
        norms = (h, h) + ((self.head_dim,) * 2 if self.architecture == "qwen3" else ())
        biases = (q, kv, kv, h) if self.attention_bias else ()
        return BlockSpec("layer", (*attention, (mlp, h), (mlp, h), (h, mlp)), norms + biases)

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The used layers only."""
        return _as_packed((self.layer,) * self.layers_used, self.packed)

    @property
    def embedding_weights(self) -> int:
        """The token embedding, of which only the prompt's rows are looked up."""
        return self.vocab_size * self.hidden_size

    @property
    def cut_weights(self) -> int:
        """Embedding and used layers: all that encoding a prompt needs (no final norm, no lm_head)."""
        return self.embedding_weights + self.layers_used * self.layer.total_weights

    @property
    def full_weights(self) -> int:
        """The whole language model with final norm and lm_head (counted once where tied), without what sees."""
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.embedding_weights + self.num_layers * self.layer.total_weights + self.hidden_size

    @property
    def taps_last_layer(self) -> bool:
        """Whether the last layer's output is tapped: transformers norms it, so the final norm is needed too."""
        return self.layers_used == self.num_layers

    def uses(self, name: str) -> bool:
        """Whether encoding a prompt needs the tensor of this stored name (releases nest the decoder differently)."""
        if _NOT_DECODER.search(name):
            return False
        if found := _DECODER_LAYER.search(name):
            return int(found[1]) < self.layers_used
        return name.endswith("embed_tokens.weight") or (self.taps_last_layer and name.endswith("model.norm.weight"))

    def writes_with(self, name: str) -> bool:
        """Whether making text needs the tensor of this stored name: all but the vision part."""
        return not is_vision(name)

    @property
    def joint_dim(self) -> int:
        """Width of the text input handed to the transformer."""
        return self.hidden_size * len(self.out_layers)


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a request uses where it says nothing: pixels, steps, guidance, text tokens."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole pipeline as the planner sees it.

    Attributes:
        form: ``dev`` (embedded guidance, Mistral) or ``klein`` (two passes for guidance, Qwen3).
        is_distilled: klein in few steps, without guidance.
        caches_references: klein KV: references are computed in the first step alone (``reference_keys``).
        source: alias, folder or hub id, for messages.
        stored_dtype: what the transformer's checkpoint stores.
        text_stored_dtype, vae_stored_dtype: what the others' store; None where only the transformer's is known.
        transformer_files, text_files: what files with quantized weights hold; None where they are not, or not there.
    """

    name: str
    form: Form
    is_distilled: bool
    source: str
    stored_dtype: StoredDtype
    transformer: TransformerSpec
    text_encoder: TextEncoderSpec
    vae: VaeSpec
    defaults: ModelDefaults
    text_stored_dtype: StoredDtype | None = None
    vae_stored_dtype: StoredDtype | None = None
    transformer_files: FileSizes | None = None
    text_files: FileSizes | None = None
    caches_references: bool = False

    def file_sizes_of(self, component: str) -> FileSizes | None:
        """What the component's quantized files hold; None where a dtype says it all."""
        return {"transformer": self.transformer_files, "text_encoder": self.text_files}.get(component)

    def stored_dtype_of(self, component: str) -> StoredDtype:
        """What the component's files store; the transformer's where that is not known."""
        others = {"text_encoder": self.text_stored_dtype, "vae": self.vae_stored_dtype}
        return others.get(component) or self.stored_dtype

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels: a latent patch."""
        return 2 * self.vae.spatial_factor

    def stored_weights(self, component: Component) -> frozenset[int]:
        """Return how many floating-point values the needed tensors of the component's files may hold."""
        if component == "transformer":
            return frozenset({self.transformer.total_weights})
        if component == "vae":  # the batch norm's running mean and variance are values too
            return frozenset({self.vae.total_weights + 2 * self.vae.packed_channels})
        norm = self.text_encoder.hidden_size if self.text_encoder.taps_last_layer else 0
        return frozenset({self.text_encoder.cut_weights + norm})

    def needs(self, component: Component, name: str) -> bool:
        """Whether a run needs the tensor of this stored name."""
        return component != "text_encoder" or self.text_encoder.uses(name)
