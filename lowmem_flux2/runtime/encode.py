"""The encode stage: prompts to embeddings, through the used layers of the text encoder alone.

Only the tapped hidden states are kept. The layers after the last tapped one, the final norm, lm_head and the vision
part are never built, never read; the token embedding stays in its file and only the prompt's rows are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.batches import Batch
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.runtime.components import text_decoder_blocks, text_decoder_on_meta, text_decoder_root
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import load_module
from lowmem_flux2.runtime.weights import Weights


def tokenize(
    tokenizer: PreTrainedTokenizerBase, model: ModelSpec, prompts: Sequence[str], length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (prompts, length) int64, in the chat form of the model's pipeline.

    Padded or cut to ``length``; with None one prompt comes as long as it is.

    The two forms follow Flux2Pipeline._get_mistral_3_small_prompt_embeds and
    Flux2KleinPipeline._get_qwen3_prompt_embeds, whose tokenization is not separate from their forward pass.
    """
    to_length: dict[str, Any] = {}
    if length is not None:
        to_length = {"padding": "max_length", "truncation": True, "max_length": length}
    if model.form == "dev":
        encoded = tokenizer.apply_chat_template(
            format_input(prompts=list(prompts), system_message=SYSTEM_MESSAGE),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **to_length,
        )
        return encoded["input_ids"], encoded["attention_mask"]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in prompts
    ]
    encoded = tokenizer(texts, return_tensors="pt", **to_length)
    return encoded["input_ids"], encoded["attention_mask"]


@dataclass(slots=True)
class _BatchState:
    """One batch of prompts on its way through the layers. The tapped states wait on the host."""

    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor
    masks: list[Any]
    tapped: dict[int, torch.Tensor]

    def run(self, layer: nn.Module, index: int) -> None:
        self.hidden = layer(
            self.hidden,
            attention_mask=self.masks[index],
            position_embeddings=self.rotary,
            position_ids=self.positions,
            use_cache=False,
        )

    def embeddings(self, out_layers: Sequence[int]) -> torch.Tensor:
        """The tapped states side by side: (prompts, tokens, taps * hidden), on the host."""
        return torch.cat([self.tapped[layer] for layer in out_layers], dim=-1)


def image_rows(batches: Sequence[torch.Tensor], repeats: int) -> torch.Tensor:
    """Batches of embeddings (prompts, tokens, width), one after another, each prompt's row for ``repeats`` images."""
    rows = torch.cat(list(batches))
    return rows.repeat_interleave(repeats, dim=0) if repeats > 1 else rows


class TextEncoder:
    """The cut text encoder of one checkpoint, its layers placed by the plan."""

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        stage: StagePlan,
        device: torch.device,
        warn: Callable[[str], None],
        weights: Weights,
        passes: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._dtype = DTYPES[stage.compute_dtype]
        self._warn = warn
        self._tokenizer = load_tokenizer(folder / "tokenizer") if tokenizer is None else tokenizer
        self._decoder = text_decoder_on_meta(folder / "text_encoder", model)
        with ExitStack() as undo:
            self._files = weights.open("text_encoder")
            undo.callback(self._files.close)
            self._decoder.rotary_emb.to(device)
            self._root = text_decoder_root(self._files)
            if model.text_encoder.num_layers == model.text_encoder.layers_used:
                # transformers overwrites the last hidden state with the normed one: here the norm is part of the tap.
                load_module(self._decoder.norm, f"{self._root}norm.", self._files, self._dtype, device)
            blocks = text_decoder_blocks(self._decoder, self._root)
            self.streamer = weights.streamer(stage, blocks, self._files, device, passes, warn)
            undo.pop_all()

    @torch.no_grad()
    def encode(
        self, batches: Sequence[Batch], length: int, on_layer: Callable[[], None] = lambda: None
    ) -> list[torch.Tensor]:
        """Embeddings (prompts, length, joint_dim) of each batch, on the host, in the compute dtype.

        One pass over the layers serves all batches. They are kept apart because a batch's size decides how Linear
        kernels round, and the stock pipelines encode prompts and negative prompts apart.
        """
        states = [self._begin(batch, length) for batch in batches]
        taps = self._model.text_encoder.out_layers
        last = self._model.text_encoder.num_layers
        for index, layer in enumerate(self.streamer.round()):
            for state in states:
                state.run(layer, index)
                if index + 1 in taps:  # no name for what is tapped: it would live until the next one
                    state.tapped[index + 1] = (
                        self._decoder.norm(state.hidden) if index + 1 == last else state.hidden
                    ).to("cpu")
            on_layer()
        made = []
        while states:  # each state is dropped once it is laid side by side
            made.append(states.pop(0).embeddings(taps))
        return made

    def _begin(self, prompts: Batch, length: int) -> _BatchState:
        ids, mask = tokenize(self._tokenizer, self._model, prompts, length)
        for prompt, full in zip(prompts, mask.all(dim=1).tolist(), strict=True):
            if full and len(tokenize(self._tokenizer, self._model, [prompt], None)[0][0]) > length:
                self._warn(f"the prompt is cut to {length} text tokens: {prompt[:60]}...")
        hidden = self._embed(ids).to(self._device)
        positions = torch.arange(length, device=self._device).unsqueeze(0)
        kinds = getattr(self._decoder.config, "layer_types", None) or ["full_attention"] * len(self._decoder.layers)
        masks = self._masks(hidden, mask.to(self._device), positions)
        tapped = {0: hidden.to("cpu")} if 0 in self._model.text_encoder.out_layers else {}
        return _BatchState(
            hidden, self._decoder.rotary_emb(hidden, positions), positions, [masks[kind] for kind in kinds], tapped
        )

    def close(self) -> None:
        self.streamer.close()
        self._files.close()

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        unique, places = torch.unique(ids, return_inverse=True)
        rows = self._files.read_rows(f"{self._root}embed_tokens.weight", unique, self._dtype)
        return rows[places]

    def _masks(self, hidden: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        config = self._decoder.config
        types = set(getattr(config, "layer_types", None) or ["full_attention"])
        masks: dict[str, Any] = {}
        if "sliding_attention" in types or (self._model.form == "dev" and config.sliding_window is not None):
            masks["sliding_attention"] = create_sliding_window_causal_mask(config, hidden, mask, None, positions)
        masks["full_attention"] = (
            masks["sliding_attention"]
            if self._model.form == "dev" and config.sliding_window is not None
            else create_causal_mask(config, hidden, mask, None, positions)
        )
        return masks


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, and nowhere else, without its cache of words.

    tokenizers 0.23 leaves that cache behind when the tokenizer is dropped: 9 KB a prompt. One prompt has no use for it.

    Raises:
        CheckpointBroken: missing, unreadable, or without a chat template.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise whatever their parsers do
        raise CheckpointBroken(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise CheckpointBroken(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
    words = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    getattr(words, "_resize_cache", lambda capacity: None)(0)  # BPE and Unigram have one
    return tokenizer
