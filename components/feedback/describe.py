"""Vectors of captions and pictures, by the model's own text encoder and context encoder.

Pictures: the context encoder sees all tokens with the prompt dropped; its features are
averaged over the tokens. No further network is needed, and what looks alike to the model
counts as alike. VoPE makes pictures of different sizes comparable.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.model.djepa import DJEPA

BATCH = 256


def mean_state(states: Tensor, mask: Tensor) -> np.ndarray:
    """Mean (B, E) of the text states (B, L, E) that are no padding (mask (B, L))."""
    weights = mask.float()[..., None]
    return ((states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)).numpy()


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


@torch.no_grad()
def pooled(model: DJEPA, latents: Tensor) -> np.ndarray:
    """Features (B, D) of latents (B, C, h, w)."""
    device = next(model.parameters()).device
    tokens = latents.flatten(2).transpose(1, 2).to(device)
    b, n = tokens.shape[:2]
    states = torch.zeros(b, 1, model.config.text_width, device=device)
    dropped = torch.ones(b, dtype=torch.bool, device=device)
    order = torch.arange(n, device=device)[None]
    rotations = model.positions(order, (latents.shape[3], latents.shape[2]), 1)
    bias = model.bias(dropped[:, None], dropped, n)
    _, features = model.encoder(states, dropped, tokens, rotations, bias)
    return features.mean(dim=1).float().cpu().numpy()


def encode_images(pipe: Any, images: Sequence[Image.Image]) -> Tensor:
    """Latents (B, C, h, w), on the CPU, of pictures of one size by the pipeline's tokeniser."""
    pixels = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pipe.tokenizer.encode(pixels.to(pipe.tokenizer.mean.device)).cpu()


def pictures(pipe: Any, images: Sequence[Image.Image]) -> np.ndarray:
    """Features (m, D) of pictures of one size."""
    parts = [
        pooled(pipe.transformer, encode_images(pipe, images[i : i + BATCH]))
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def samples(pipe: Any, encoded: Any, ids: np.ndarray) -> np.ndarray:
    """Features (m, D) of the encoded samples `ids` (m,), ascending and different.

    Each at the smallest rung that it reaches.
    """
    features = np.zeros((len(ids), pipe.transformer.config.width), np.float32)
    left = np.ones(len(ids), bool)
    for rung in sorted(encoded.rungs, key=lambda name: np.prod(encoded.rungs[name])):
        here = np.flatnonzero(left & np.isin(ids, encoded.rows(rung)))
        left[here] = False
        for i in range(0, len(here), BATCH):
            part = here[i : i + BATCH]
            features[part] = pooled(pipe.transformer, encoded.latents(rung, ids[part]))
    return features
