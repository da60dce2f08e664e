"""Vectors of captions and pictures, from what the model itself is fed.

Captions: the mean of their text states. Pictures: mean and standard deviation of each latent
channel over the picture, so what colours and edges there are, not where; pictures of
different sizes compare. On the embedded world the nearest neighbours by these vectors share
twice as many notions as random pairs do; features of the model's own context encoder, young
as it is when the critic is made, shared hardly more than random pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BATCH = 256


def mean_state(states: Tensor, mask: Tensor) -> np.ndarray:
    """Mean (B, E) of the text states (B, L, E) that are no padding (mask (B, L))."""
    weights = mask.float()[..., None]
    return ((states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)).cpu().numpy()


def texts(pipe: Any, prompts: Sequence[str]) -> np.ndarray:
    """Vectors (P, E) of prompts by the pipeline's text encoder."""
    parts = [
        mean_state(*pipe.text_encoder.encode(list(prompts[i : i + BATCH])))
        for i in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(parts)


def captions(encoded: Any, ids: np.ndarray) -> np.ndarray:
    """Vectors (m, E) of the captions of an EncodedSet's samples, from its cached states."""
    parts = [mean_state(*encoded.text(ids[i : i + BATCH])) for i in range(0, len(ids), BATCH)]
    return np.concatenate(parts)


def pooled(latents: Tensor) -> np.ndarray:
    """Features (B, 2C) of latents (B, C, h, w)."""
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3), correction=0)], dim=1).numpy()


def encode_images(pipe: Any, images: Sequence[Image.Image]) -> Tensor:
    """Latents (B, C, h, w), on the CPU, of pictures of one size by the pipeline's tokeniser."""
    pixels = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pipe.tokenizer.encode(pixels.to(pipe.tokenizer.device)).cpu()


def samples(encoded: Any, ids: np.ndarray) -> np.ndarray:
    """Features (m, 2C) of the encoded samples `ids` (m,), each at the smallest rung it reaches.

    ValueError for a sample that reaches none.
    """
    features: dict[int, np.ndarray] = {}
    for rung in sorted(encoded.rungs, key=lambda name: np.prod(encoded.rungs[name])):
        here = np.array([i for i in np.intersect1d(ids, encoded.rows(rung)) if i not in features])
        for start in range(0, len(here), BATCH):
            part = here[start : start + BATCH]
            features |= zip(part.tolist(), pooled(encoded.latents(rung, part)), strict=True)
    missing = [int(i) for i in ids if i not in features]
    if missing:
        raise ValueError(f"samples {missing} reach no rung")
    return np.stack([features[int(i)] for i in ids])
