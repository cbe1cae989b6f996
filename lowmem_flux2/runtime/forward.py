"""One step of the transformer as a loop over diffusers' own FLUX.2 blocks, bit-equal to the stock forward.

Both guidance passes go through a block while its weights are there, so true guidance costs no second transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from torch import nn

from lowmem_flux2.errors import NonFiniteLatents
from lowmem_flux2.runtime.chunking import Chunks, double_block, single_block
from lowmem_flux2.runtime.reference_keys import (
    KeptLayer,
    Modulation,
    ReferenceKeys,
    attention_arguments,
    modulation_of,
)
from lowmem_flux2.runtime.step_cache import Residuals
from lowmem_flux2.runtime.streaming import BlockStreamer


@dataclass(frozen=True, slots=True)
class StepConditioning:
    """What one step needs of timestep and guidance: the embedding (B, h), for the final norm, and the modulations."""

    embedding: torch.Tensor
    double_image: torch.Tensor
    double_text: torch.Tensor
    single: torch.Tensor


@dataclass(slots=True)
class Pass:
    """One guidance pass: its projected text (B, T, h), and its two streams while a step runs."""

    text: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    hidden: torch.Tensor
    encoder_hidden: torch.Tensor


class Forward:
    """The transformer's forward, given its blocks one by one by a streamer; each in chunks of tokens if there are."""

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        dtype: torch.dtype,
        device: torch.device,
        guidance_scale: float,
        steps: int,
        chunks: Chunks | None = None,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._device = device
        self._guidance_scale = guidance_scale
        self._steps = steps
        self.chunks = chunks

    def rope(self, text: torch.Tensor, image_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of one image's text and image tokens, (tokens, head_dim) each, in fp32."""
        net = self._transformer
        text_ids = Flux2Pipeline._prepare_text_ids(text).to(self._device)
        text_rope, image_rope = net.pos_embed(text_ids[0]), net.pos_embed(image_ids[0])
        return torch.cat([text_rope[0], image_rope[0]], dim=0), torch.cat([text_rope[1], image_rope[1]], dim=0)

    def start(self, text: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> Pass:
        return Pass(text, rope, text, text)

    def predict(
        self,
        streamer: BlockStreamer,
        latents: torch.Tensor,
        passes: Sequence[Pass],
        conditioning: StepConditioning,
        watch: Callable[[int, Pass], None] | None = None,
        residuals: Residuals | None = None,
        keys: ReferenceKeys | None = None,
    ) -> torch.Tensor:
        """The velocity for one step: (B, tokens, channels). Equal to Flux2Transformer2DModel.forward, with guidance.

        Where ``residuals`` stand for all blocks but the first, it is that of the image's own tokens alone; so it is
        with ``keys``, which it fills where they are not there.
        """
        net = self._transformer
        fills = None if keys is None or keys.are_there else keys
        references = 0
        if fills is not None:
            latents, references = torch.cat([fills.latents, latents], dim=1), fills.tokens
        projected = net.x_embedder(latents.to(self._dtype))
        for one in passes:
            one.hidden, one.encoder_hidden = projected, one.text
        if residuals is not None:
            residuals.enter(projected[:, references:])
        del projected  # else it lives through the whole step
        doubles = len(net.transformer_blocks)
        for index, block in enumerate(streamer.round()):
            for one in passes:
                layer = None if keys is None else keys.layer(index, one.text.shape[1])
                if index == doubles:
                    one.hidden = torch.cat([one.encoder_hidden, one.hidden], dim=1)
                    one.encoder_hidden = one.text
                if index < doubles:
                    self._double(block, one, conditioning, layer)
                else:
                    self._single(block, one, conditioning, layer)
                if watch is not None:
                    watch(index, one)
            if index > 0 or residuals is None:
                continue
            if residuals.may_skip([self._image(one, 0, references) for one in passes]):
                streamer.skip()
                break
        if fills is not None:
            fills.are_there = True
        predictions: list[torch.Tensor] = []
        for number, one in enumerate(passes):
            image = self._image(one, index, references)
            if residuals is not None:
                image = residuals.leave(number, image)
            predictions.append(net.proj_out(net.norm_out(image, conditioning.embedding)))
            del image
            one.hidden = one.encoder_hidden = one.text
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        return negative + self._guidance_scale * (positive - negative)

    def _image(self, one: Pass, index: int, references: int) -> torch.Tensor:
        """The image stream after this block, without so many tokens before it; in single-stream blocks it follows the
        text."""
        is_joint = index >= len(self._transformer.transformer_blocks)
        return one.hidden[:, (one.text.shape[1] if is_joint else 0) + references :]

    def _double(self, block: nn.Module, one: Pass, conditioning: StepConditioning, layer: KeptLayer | None) -> None:
        image: Modulation = conditioning.double_image
        rope = one.rope
        if layer is not None and layer.is_filling:
            image, rope = layer.keys.of_image(conditioning.double_image), layer.keys.rope
        if self.chunks is not None:
            one.encoder_hidden, one.hidden = double_block(
                block, one.hidden, one.encoder_hidden, image, conditioning.double_text, rope, self.chunks, layer
            )
            return
        one.encoder_hidden, one.hidden = block(
            hidden_states=one.hidden,
            encoder_hidden_states=one.encoder_hidden,
            temb_mod_img=modulation_of(image, 0, one.hidden.shape[1]),
            temb_mod_txt=conditioning.double_text,
            image_rotary_emb=rope,
            **attention_arguments(layer, is_joint=False),
        )

    def _single(self, block: nn.Module, one: Pass, conditioning: StepConditioning, layer: KeptLayer | None) -> None:
        modulation: Modulation = conditioning.single
        rope = one.rope
        if layer is not None and layer.is_filling:
            modulation, rope = layer.keys.of_all(conditioning.single, layer.text), layer.keys.rope
        if self.chunks is not None:
            one.hidden = single_block(block, one.hidden, modulation, rope, self.chunks, layer)
            return
        one.hidden = block(
            hidden_states=one.hidden,
            encoder_hidden_states=None,
            temb_mod=modulation_of(modulation, 0, one.hidden.shape[1]),
            image_rotary_emb=rope,
            **attention_arguments(layer, is_joint=True),
        )

    def explain_non_finite(
        self,
        streamer: BlockStreamer,
        step: int,
        latents: torch.Tensor,
        passes: Sequence[Pass],
        conditioning: StepConditioning,
        was_skipped: bool = False,
        keys: ReferenceKeys | None = None,
    ) -> None:
        """Run the step again, looking at what goes in and then after every block, at both streams.

        Args:
            was_skipped: it did not compute all blocks, so that what is not finite may be what stood for them.
        """
        names = [f"double-stream block {i}" for i in range(len(self._transformer.transformer_blocks))]
        names += [f"single-stream block {i}" for i in range(len(self._transformer.single_transformer_blocks))]
        entering = {
            "the latents that it was given": [latents],
            "the projected text embeddings": [one.text for one in passes],
            "the timestep conditioning": [getattr(conditioning, field.name) for field in fields(conditioning)],
            "the latents' projection": [self._transformer.x_embedder(latents.to(self._dtype))],
        }
        found = [name for name, tensors in entering.items() if not _finite(*tensors)][:1]

        def watch(index: int, one: Pass) -> None:
            if not found and not _finite(one.hidden, one.encoder_hidden):
                found.append(names[index])

        if not found:
            self.predict(streamer, latents, passes, conditioning, watch, keys=keys)
        where = found[0] if found else "the step cache's forecast" if was_skipped else "the output projection"
        hint = "try --dtype fp32" if self._dtype is torch.float16 else "the weights may be broken, or guidance too high"
        raise NonFiniteLatents(
            f"denoise: NaN or infinity at step {step + 1} of {self._steps}, first in {where}; {hint}"
        )


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
