"""Peak live activations of each stage, in closed form, from where the live tensors peak in the libraries' forwards.

Each function names the tensors it counts. Checked (tests) within 3 % against what library-facts measured with fake
tensors: dev 402 and 1165 MiB at 512 and 1024 px, the cut Mistral 127 MiB, the VAE's decoder 1538 and, tiled, 390 MiB.
"""

from __future__ import annotations

from lowmem_flux2.planning.batches import waiting_bytes
from lowmem_flux2.planning.models import ModelSpec, VaeSpec
from lowmem_flux2.planning.workload import Workload

FP32_BYTES = 4
MODULATION_WIDTHS = 16
"""Hidden sizes kept per step: the embedding, 2 x 6 modulations of a double-stream block, 3 of a single-stream block."""


def denoise_activation_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int, chunk: int) -> int:
    """Peak live activations of one transformer pass over ``batch`` images, text and timestep conditioning included.

    Tokens S, hidden size h, MLP width m. The peak is the concatenation in a single-stream block
    (Flux2ParallelSelfAttnProcessor): block input h, modulated norm h, the fused projection 3h + 2m (its views keep it
    whole), rotated query and key 2h, attention output h, gated MLP m, the concatenation h + m: (9h + 4m) S.

    In chunks the fused projection lives for one chunk of C tokens, and the peak is either the rotation of the key
    (apply_rotary_emb): block input, norm, query, key, value, the rotated halves, all h, and three fp32 temporaries of
    h: 12h S in 16 bits; or, after attention, one chunk's MLP: input, norm, query, key, value, attention and block
    output 7h S and C (h + 4m). The double-stream block peaks in the image stream's feed-forward, below either.

    Constant beside it: the text input and its projection, two RoPE tables, latents and prediction. A second guidance
    pass keeps one more hidden state and its text.
    """
    dims = model.transformer
    hidden, mlp = dims.hidden_size, dims.mlp_size
    tokens = batch * workload.sequence_tokens
    image = batch * (workload.image_tokens + workload.reference_tokens)
    text = batch * workload.text_tokens
    # Both streams' input, norm and attention output, the image stream's norm and gated feed-forward (input, two halves,
    # product).
    double = (tokens * 4 * hidden + image * (2 * hidden + 4 * mlp)) * dtype_bytes
    if chunk and chunk < workload.sequence_tokens:
        rotation = tokens * hidden * (6 * dtype_bytes + 3 * FP32_BYTES)
        finishing = (tokens * 7 * hidden + batch * chunk * (hidden + 4 * mlp)) * dtype_bytes
        peak = max(rotation, finishing)
    else:
        peak = max(tokens * (9 * hidden + 4 * mlp) * dtype_bytes, double)
    constant = text * (dims.joint_dim + hidden) + 4 * image * dims.in_channels
    waiting = (workload.guidance_passes - 1) * (tokens * hidden + text * dims.joint_dim)
    rope = 2 * workload.sequence_tokens * dims.head_dim * FP32_BYTES
    fp32_latents = 2 * image * dims.in_channels * FP32_BYTES
    conditioning = conditioning_bytes(model, workload, dtype_bytes) - text * hidden * dtype_bytes
    return peak + (constant + waiting) * dtype_bytes + rope + fp32_latents + max(conditioning, 0)


def conditioning_bytes(model: ModelSpec, workload: Workload, dtype_bytes: int) -> int:
    """What is computed once per generation and kept for all steps: every image's projected text, the modulations."""
    texts = workload.num_images * workload.guidance_passes * workload.text_tokens
    modulations = workload.num_images * workload.steps * MODULATION_WIDTHS
    return (texts + modulations) * model.transformer.hidden_size * dtype_bytes


def encode_activation_bytes(
    model: ModelSpec, workload: Workload, prompts: int, dtype_bytes: int, batches: int = 1
) -> int:
    """Peak live activations of one pass of ``batches`` batches of ``prompts`` over the text encoder's used layers.

    In the MLP of a layer act(gate), up and their product live together (3 x intermediate), with the layer's input, the
    residual and the norm (3 x hidden), the tapped states on their way to the host, and the additive mask (tokens^2).
    The other batches of the pass wait meanwhile.
    """
    dims = model.text_encoder
    tokens = prompts * workload.text_tokens
    per_token = 3 * dims.intermediate_size + (3 + len(dims.out_layers)) * dims.hidden_size
    peak = tokens * max(per_token, 3 * dims.joint_dim)
    mask = prompts * workload.text_tokens**2
    waiting = (batches - 1) * waiting_bytes(dims, prompts, workload.text_tokens, dtype_bytes)
    return (peak + mask) * dtype_bytes + waiting


def decoder_channels(vae: VaeSpec) -> tuple[int, ...]:
    """Channels of the decoder's levels, from the latents up to the picture."""
    return tuple(reversed(vae.decoder_block_out_channels or vae.block_out_channels))


def decode_activation_bytes(vae: VaeSpec, width: int, height: int, tile_px: int, dtype_bytes: int) -> int:
    """Peak live activations of decoding one image.

    In each up-block's first resnet the input, its norm and its non-linearity live together: 3 x channels_in x pixels at
    that level; the widest is the last block (256 channels at full resolution: 1536 of the 1538 MiB at 1024 px).
    Tiled, one tile's peak and every finished tile (3 channels) until they are stitched, twice.
    """
    tile_w, tile_h = (min(width, tile_px), min(height, tile_px)) if tile_px else (width, height)
    channels = decoder_channels(vae)
    peak = 0
    for level in range(len(channels)):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        peak = max(peak, 3 * channels_in * (tile_w // shrink) * (tile_h // shrink))
    picture = vae.out_channels * width * height
    latents = 2 * vae.latent_channels * (width // vae.spatial_factor) * (height // vae.spatial_factor)
    return (peak + picture * (2 if tile_px else 1) + latents) * dtype_bytes
