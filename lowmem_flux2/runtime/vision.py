"""What the whole text encoder sees of reference images: Mistral3's vision tower and projector, run once and dropped.

The picture is prepared as PixtralProcessor does it, but by transformers' own image processor on Pillow: the processor
itself cannot be imported where torchvision is missing. Where it is there, the stock pipeline resizes with it, and the
pixels differ in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch import nn

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.models import VisionSpec
from lowmem_flux2.planning.upsampling import SEEN_AREA_PX
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.device import release_memory
from lowmem_flux2.runtime.layout import load_module
from lowmem_flux2.runtime.reference_images import open_picture

IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
"""PixtralProcessor's own defaults: a token of a picture, the end of its row, the end of the picture."""
_ANCHOR = "vision_tower.patch_conv.weight"


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as the decoder takes it: (tokens, width) embeddings on the device, in rows of tokens."""

    embeddings: torch.Tensor
    rows: int
    columns: int

    @property
    def text(self) -> str:
        """What stands for it in the prompt."""
        return BREAK.join([IMAGE * self.columns] * self.rows) + END


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """All reference images in one, as Flux2Pipeline.upsample_prompt has the references of a prompt."""
    processor = Flux2ImageProcessor()
    joined: Image.Image = processor.concatenate_images(list(pictures))
    reduced: Image.Image = processor._resize_if_exceeds_area(joined, SEEN_AREA_PX)
    return reduced


def seen_of(request: Request, pictures: Sequence[Image.Image] | None = None) -> Image.Image | None:
    """What the text encoder is to see for a request; None where it rewrites nothing, or there is nothing to see.

    Args:
        pictures: its reference images as they were given; None opens the files that the request names.
    """
    if request.caption_upsample_temperature is None or not request.references:
        return None
    if pictures is None:
        pictures = [open_picture(Path(one.name)) for one in request.references]
    return side_by_side(pictures)


def see(
    net: Any,
    spec: VisionSpec,
    picture: Image.Image,
    tokenizer_folder: Path,
    files: Tensors,
    dtype: torch.dtype,
    device: torch.device,
) -> Seen:
    """Load what sees, of Mistral3ForConditionalGeneration on the meta device, see the picture, and drop it again.

    Args:
        tokenizer_folder: where the image processor's config is.

    Raises:
        CheckpointBroken: the vision part's tensors are not there: an encoder that was downloaded for text alone.
    """
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    anchor = next((name for name in files.names() if name.endswith(_ANCHOR)), None)
    if anchor is None:
        raise CheckpointBroken(
            f"{files.folder}: it has no vision part ({_ANCHOR}), which upsampling a caption with reference images "
            "needs: the files of text alone are there; download the whole text encoder"
        )
    try:
        processor = PixtralImageProcessorPil.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointBroken(f"{tokenizer_folder}: the image processor cannot be loaded: {error}") from error
    token_px = spec.patch_px * spec.merge
    inputs = processor(picture, patch_size={"height": token_px, "width": token_px}, return_tensors="pt")
    root = anchor.removesuffix(_ANCHOR)
    tower, projector = net.model.vision_tower, net.model.multi_modal_projector
    tower.patch_positional_embedding.to(device)
    load_module(tower, f"{root}vision_tower.", files, dtype, device)
    load_module(projector, f"{root}multi_modal_projector.", files, dtype, device)
    pixels = inputs["pixel_values"].to(device, dtype)
    height, width = inputs["image_sizes"][0].tolist()
    (embeddings,) = net.model.get_image_features(pixels, inputs["image_sizes"], return_dict=True).pooler_output
    without_vision(net)
    del tower, projector
    release_memory(device)
    return Seen(embeddings, height // token_px, width // token_px)


def without_vision(net: Any) -> None:
    """Drop what sees, loaded or not."""
    net.model.vision_tower = net.model.multi_modal_projector = nn.Identity()
