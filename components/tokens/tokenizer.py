"""Image tokenisers: pictures to continuous tokens and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from components.errors import UserError
from components.files import read_json
from components.parts import load_part, save_part


class ImageTokenizer(nn.Module, ABC):
    """Images (B, 3, H, W) in [−1, 1] to latents (B, C, h, w), a token a cell, and back.

    Two kinds, by `params.model.tokenizer.kind`: `patches` (`PatchTokenizer`) and `sd3`
    (`VAETokenizer`). Frozen once built; device and dtype are set from outside with `.to`.
    """

    kind: str
    patch: int  # pixels on a side of one token
    channels: int  # numbers a token

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents float32 (B, C, H/patch, W/patch) on the tokeniser's device."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W) of latents; values may leave [−1, 1] a little."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write what `from_pretrained` reads."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) to Pillow pictures."""
        pixels = ((self.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte()
        return [
            Image.fromarray(np.ascontiguousarray(x))
            for x in pixels.permute(0, 2, 3, 1).cpu().numpy()
        ]

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "ImageTokenizer":
        """Build a tokeniser of `params.model.tokenizer`.

        `patches` still has to be fitted. UserError for an unknown kind, for settings that do not
        fit it, and for weights that are not to be had.
        """
        from components.tokens.vae import VAETokenizer

        kinds: dict[str, type[ImageTokenizer]] = {
            kind.kind: kind for kind in (PatchTokenizer, VAETokenizer)
        }
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        kind = arguments.pop("kind", None)
        if kind not in kinds:
            raise UserError(
                f"The image tokeniser {kind!r} is not known; set model.tokenizer.kind to one of "
                f"{', '.join(kinds)}, with `djepa compose tokenizer=NAME`."
            )
        try:
            return kinds[kind](**arguments)
        except TypeError as error:
            raise UserError(
                f"model.tokenizer does not fit the kind {kind} ({error}); see params/tokenizer."
            ) from error

    @staticmethod
    def from_pretrained(folder: Path) -> "ImageTokenizer":
        """Read what `save_pretrained` wrote, of any kind.

        UserError when the folder holds no tokeniser or its weights are not to be had.
        """
        from components.tokens.vae import VAETokenizer

        path = Path(folder) / "config.json"
        try:
            kind = read_json(path)["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is missing or names no kind of image tokeniser: it is not a part of a "
                "saved model; train the model again or point to a complete folder."
            ) from error
        if kind == VAETokenizer.kind:
            return VAETokenizer.read(Path(folder))
        return load_part(folder, ImageTokenizer.from_config)


class PatchTokenizer(ImageTokenizer):
    """Patches of p×p pixels to C numbers of mean 0 and variance 1, and back.

    Linear: the C leading principal components of the training pictures' patches, each divided
    by its standard deviation.
    """

    kind = "patches"

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
    def fit(self, batches: Iterable[Tensor]) -> float:
        """Fit to batches of images (B, 3, H, W), of any sizes; gives the variance share kept.

        Only sums are held, so that the number of pictures does not matter.
        """
        size, count = self.mean.numel(), 0
        total = torch.zeros(size, dtype=torch.float64)
        products = torch.zeros(size, size, dtype=torch.float64)
        for images in batches:
            x = self._patches(images).flatten(0, 2).double()
            count += len(x)
            total += x.sum(0)
            products += x.T @ x
        mean = total / max(count, 1)
        covariance = (products - count * torch.outer(mean, mean)) / max(count - 1, 1)
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
        """See `ImageTokenizer.encode`."""
        latents = (self._patches(images.to(self.mean)) - self.mean) @ self.basis.T / self.scale
        return latents.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """See `ImageTokenizer.decode`."""
        p = self.patch
        x = (latents.to(self.mean).permute(0, 2, 3, 1) * self.scale) @ self.basis + self.mean
        x = x.unflatten(3, (3, p, p)).permute(0, 3, 1, 4, 2, 5)  # B 3 h p w p
        return x.flatten(4, 5).flatten(2, 3)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the fitted components."""
        save_part(folder, self, {"kind": self.kind, "patch": self.patch, "channels": self.channels})
