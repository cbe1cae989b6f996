"""Keys and values of reference images that a run keeps: FLUX.2 klein KV.

Its first step takes the references' tokens with it, modulated as at timestep 0 and attending to themselves alone. So
their keys and values depend on no step, and all later ones attend to those that were kept, computing the text and the
image alone (Flux2KleinKVPipeline; Flux2Transformer2DModel.forward with kv_cache_mode).
"""

from __future__ import annotations

from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.workload import Workload

RESTING_WIDTHS = 9
"""Hidden sizes kept of timestep 0: 2 x 3 modulations of a double-stream block's image, 3 of a single-stream block."""
BLENDED_WIDTHS = 3
"""Hidden sizes a token has of its own modulation while a single-stream block of the first step runs; twice as many in a
double-stream block, whose image tokens alone have them."""


def kept_keys_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
    """A key and a value of every reference token in every block, for each image of a batch."""
    if not workload.caches_references:
        return 0
    tokens = batch * workload.reference_tokens
    return 2 * len(model.transformer.blocks) * tokens * model.transformer.hidden_size * dtype_bytes
