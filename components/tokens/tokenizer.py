"""Image tokeniser of the small world: whitened principal components of square patches."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from components.parts import load_part, save_part


class PatchTokenizer(nn.Module):
    """Patches of p×p pixels to C numbers of mean 0 and variance 1, and back.

    Linear: the C leading principal components of the training pictures' patches, each divided
    by its standard deviation. Pixels are in [−1, 1].
    """

    def __init__(self, patch: int, channels: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        size = 3 * patch * patch
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(channels, size))
        self.register_buffer("scale", torch.ones(channels))

    def _patches(self, images: Tensor) -> Tensor:
        p = self.patch
        x = images.unfold(2, p, p).unfold(3, p, p)  # B 3 h w p p
        return x.permute(0, 2, 3, 1, 4, 5).flatten(3)  # B h w 3pp

    @torch.no_grad()
    def fit(self, groups: list[Tensor]) -> float:
        """Fit to groups of images (B, 3, H, W), a group a size; gives the variance share kept."""
        x = torch.cat([self._patches(images).flatten(0, 2) for images in groups]).double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / max(len(x) - 1, 1)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).T
        # The sign of an eigenvector is arbitrary: make its largest entry positive.
        largest = vectors.abs().argmax(1, keepdim=True)
        vectors = vectors * vectors.gather(1, largest).sign()
        self.mean.copy_(mean)
        self.basis.copy_(vectors[: self.channels])
        self.scale.copy_(values[: self.channels].sqrt().clamp_min(1e-4))
        return float(values[: self.channels].sum() / values.sum().clamp_min(1e-12))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, H/p, W/p) of images (B, 3, H, W) in [−1, 1]."""
        latents = (self._patches(images) - self.mean) @ self.basis.T / self.scale
        return latents.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w); values may leave [−1, 1] a little."""
        p = self.patch
        x = (latents.permute(0, 2, 3, 1) * self.scale) @ self.basis + self.mean
        x = x.unflatten(3, (3, p, p)).permute(0, 3, 1, 4, 2, 5)  # B 3 h p w p
        return x.flatten(4, 5).flatten(2, 3)

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) to Pillow pictures."""
        pixels = ((self.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte()
        return [
            Image.fromarray(np.ascontiguousarray(x))
            for x in pixels.permute(0, 2, 3, 1).cpu().numpy()
        ]

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the fitted components."""
        save_part(folder, self, {"patch": self.patch, "channels": self.channels})

    @classmethod
    def from_pretrained(cls, folder: Path) -> "PatchTokenizer":
        """Read what `save_pretrained` wrote."""
        return load_part(folder, lambda config: cls(**config))
