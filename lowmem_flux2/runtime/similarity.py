"""How alike two pictures of the same prompt and seed are, by the field's usual measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lowmem_flux2.errors import UsageError

Pictures = NDArray[np.float32]
"""(images, height, width, 3) in [0, 1]."""


def psnr_db(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture, in dB; infinite where two are equal."""
    error = np.square(pictures.astype(np.float64) - references).reshape(len(pictures), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return cast(NDArray[np.float64], -10 * np.log10(error))


def ssim(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Structural similarity of each picture: the Gaussian window of Wang et al. 2004, colours together.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise UsageError(
            "fidelity needs scikit-image, which is not installed: pip install 'lowmem-flux2[bench]'"
        ) from None
    return np.array(
        [
            structural_similarity(
                one,
                other,
                channel_axis=2,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for one, other in zip(pictures, references, strict=True)
        ]
    )


def relative_error(latents: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float64]:
    """Norm of the difference over the norm of the reference, of each image's latents (images, ...)."""
    flat = references.reshape(len(references), -1).astype(np.float64)
    difference = latents.reshape(len(latents), -1) - flat
    return cast(NDArray[np.float64], np.linalg.norm(difference, axis=1) / np.linalg.norm(flat, axis=1))


def lpips_measure() -> Callable[[Pictures, Pictures], NDArray[np.float64]] | None:
    """LPIPS (AlexNet) of each picture, where the package ``lpips`` is installed and its backbone is at hand; else None.

    Lower is more alike. Zhang et al. 2018, arXiv:1801.03924.
    """
    try:
        import lpips
    except ImportError:
        return None
    import torch

    network: Any = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def measure(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
        pairs = zip(pictures, references, strict=True)
        return np.array([float(network(_scaled(one), _scaled(other))) for one, other in pairs])

    def _scaled(picture: NDArray[np.float32]) -> Any:
        return torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1

    return measure
