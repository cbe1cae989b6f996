"""The upsample stage: prompts rewritten by the whole text encoder, as Flux2Pipeline.upsample_prompt does it.

transformers' own ``generate`` runs: its sampling, key/value cache and stopping. What it finds where the layers should
be is the streamer, so every new token is one round over them; and the token embedding stays in its file, where only
the tokens' rows are looked up. Final norm and lm_head are resident. Reference images are seen first (``vision``); their
embeddings take the places of their tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE_UPSAMPLING_I2I, SYSTEM_MESSAGE_UPSAMPLING_T2I
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.upsampling import NEW_TOKENS, PROMPT_TOKENS
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.components import Blocks, text_decoder_root
from lowmem_flux2.runtime.denoise import Generators
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.encode import load_tokenizer
from lowmem_flux2.runtime.layout import load_module
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.vision import IMAGE, Seen, see, without_vision
from lowmem_flux2.runtime.weights import Weights


class Upsampler:
    """The whole text encoder of a dev checkpoint, its layers placed by the plan.

    Args:
        picture: the reference images, ``vision.side_by_side``; every prompt is rewritten with a view to it.

    Raises:
        CheckpointBroken: a tensor is missing: of an encoder that was downloaded for encoding alone.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        stage: StagePlan,
        device: torch.device,
        warn: Callable[[str], None],
        weights: Weights,
        picture: Image.Image | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._device = device
        self._seen: Seen | None = None
        self._tokenizer = load_tokenizer(folder / "tokenizer") if tokenizer is None else tokenizer
        self._net = _net_on_meta(folder / "text_encoder")
        decoder, dtype = self._net.model.language_model, DTYPES[stage.compute_dtype]
        with ExitStack() as undo:
            self._files = weights.open("text_encoder")
            undo.callback(self._files.close)
            root = text_decoder_root(self._files)
            if picture is not None and model.text_encoder.vision is not None:
                arguments = (picture, folder / "tokenizer", self._files, dtype, device)
                with torch.no_grad():
                    self._seen = see(self._net, model.text_encoder.vision, *arguments)
            without_vision(self._net)
            decoder.rotary_emb.to(device)
            load_module(decoder.norm, f"{root}norm.", self._files, dtype, device)
            load_module(self._net.lm_head, _head(self._files, root, self._net.config), self._files, dtype, device)
            layers = tuple(decoder.layers)
            blocks = Blocks(layers, tuple(f"{root}layers.{index}." for index in range(len(layers))))
            self._streamer = weights.streamer(stage, blocks, self._files, device, NEW_TOKENS, warn)
            undo.pop_all()
        self._layers = _StreamedLayers(self._streamer)
        decoder.layers = self._layers
        embeddings = None if self._seen is None else self._seen.embeddings
        decoder.embed_tokens = _EmbeddingRows(
            self._files, f"{root}embed_tokens.weight", dtype, device, self._net.config.image_token_id, embeddings
        )

    def upsample(
        self, prompts: Sequence[str], temperature: float, seed: int, on_token: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Rewrite all prompts together, as long as the longest takes: at most ``NEW_TOKENS`` tokens.

        Args:
            seed: of the sampling; torch's global generator, which ``generate`` draws from, is put back afterwards.

        Raises:
            UsageError: a prompt that leaves no room for the pictures.
        """
        inputs = self._tokenized(prompts)
        ids = inputs["input_ids"].to(self._device)
        self._layers.on_round = on_token
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            made = self._net.generate(
                input_ids=ids,
                attention_mask=inputs["attention_mask"].to(self._device),
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=temperature,
                use_cache=True,
            )
        texts: list[str] = self._tokenizer.batch_decode(
            made[:, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        return texts

    def _tokenized(self, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Ids and attention mask, each (prompts, ``PROMPT_TOKENS``), as the stock pipeline's processor makes them."""
        message = SYSTEM_MESSAGE_UPSAMPLING_T2I if self._seen is None else SYSTEM_MESSAGE_UPSAMPLING_I2I
        pictures = None if self._seen is None else [[None]] * len(prompts)
        texts: list[str] = self._tokenizer.apply_chat_template(
            format_input(prompts=list(prompts), system_message=message, images=pictures),
            add_generation_prompt=True,
            tokenize=False,
        )
        if self._seen is not None:
            texts = [text.replace(IMAGE, self._seen.text) for text in texts]
        begins = self._tokenizer.bos_token is not None and texts[0].startswith(str(self._tokenizer.bos_token))
        inputs: Mapping[str, torch.Tensor] = self._tokenizer(
            texts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=PROMPT_TOKENS,
            add_special_tokens=self._seen is not None and not begins,  # as processors do, and tokenizers never
        )
        if self._seen is not None:
            kept = (inputs["input_ids"] == self._net.config.image_token_id).sum(dim=1)
            if not bool((kept == len(self._seen.embeddings)).all()):
                raise UsageError(
                    f"caption upsampling: a prompt and the reference images together have more than {PROMPT_TOKENS} "
                    "tokens; shorten the prompt"
                )
        return inputs

    def close(self) -> None:
        self._streamer.close()
        self._files.close()


def seed_of(generators: Generators) -> int:
    """Of the first generator of a run; drawn where there is none."""
    first = generators[0] if isinstance(generators, Sequence) else generators
    return secrets.randbelow(2**31) if first is None else first.initial_seed()


class _StreamedLayers(nn.Module):
    """In the place of the decoder's layers: taking them is a round of the streamer. It holds no parameters."""

    def __init__(self, streamer: BlockStreamer) -> None:
        super().__init__()
        self._streamer = streamer
        self.on_round: Callable[[], None] = lambda: None

    def __getitem__(self, used: slice) -> Iterator[nn.Module]:
        yield from self._streamer.round()
        self.on_round()


class _EmbeddingRows(nn.Module):
    """In the place of the token embedding: the rows of (prompts, tokens) ids, read from the file.

    Args:
        picture: (tokens, width), in the places of a prompt's ``image_id``s; a new token of that id is a word.
    """

    def __init__(
        self,
        files: Tensors,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        image_id: int,
        picture: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self._files, self._name, self._dtype, self._device = files, name, dtype, device
        self._image_id, self._picture = image_id, picture

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, places = torch.unique(ids.to("cpu"), return_inverse=True)
        rows = self._files.read_rows(self._name, unique, self._dtype)[places].to(self._device)
        if self._picture is not None:
            is_image = ids == self._image_id
            rows[is_image] = self._picture.repeat(len(ids), 1).to(rows.dtype)
            self._picture = None  # the prompt comes once
        return rows


def _net_on_meta(folder: Path) -> Any:
    """Mistral3ForConditionalGeneration with its weights on the meta device, as its files configure."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False), no_init_weights():
        net = Mistral3ForConditionalGeneration(config)
    if (folder / "generation_config.json").is_file():
        net.generation_config = GenerationConfig.from_pretrained(folder)
    return net.eval()


def _head(files: Tensors, root: str, config: Any) -> str:
    """What precedes ``weight`` in the stored name of lm_head: the token embedding's name where they are tied."""
    for name in files.names():
        if name.endswith("lm_head.weight"):
            return name.removesuffix("weight")
    if getattr(config, "tie_word_embeddings", False) or config.get_text_config().tie_word_embeddings:
        return f"{root}embed_tokens."
    raise CheckpointBroken(
        f"{files.folder}: it has no lm_head, which upsampling a caption needs: the files of encoding alone are there; "
        "download the whole text encoder"
    )
