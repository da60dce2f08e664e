"""The paper's image tokeniser: the frozen KL autoencoder of Stable Diffusion 3 (spec, section 1).

Its latents (16 channels, stride 8) are taken 2×2 to a token: 64 numbers, 16 pixels on a side.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from components.errors import UserError
from components.files import read_json, write_json
from components.tokens.tokenizer import ImageTokenizer
from components.tokens.weights import COPIED_BELOW, FrozenWeights

SIDE = 2  # latents on a side of one token
COPY = "vae"  # folder of copied weights in a saved tokeniser
OVERLAP = 0.25  # share of a tile's side that is blended with the next one


class VAETokenizer(ImageTokenizer):
    """diffusers' AutoencoderKL: posterior mean, shifted and scaled as its config says.

    Pictures with a side above `tile` pixels go through in tiles of that side, which overlap by
    a quarter and are blended; smaller ones so many at a time that they have no more pixels than
    one tile, so the memory needed is that of a tile whatever the batch.
    """

    kind = "sd3"

    def __init__(
        self, id: str, revision: str, subfolder: str, tile: int, copy: Path | None = None
    ) -> None:
        """Load the weights, float32 on the CPU.

        id, revision, subfolder: see `FrozenWeights`. tile in pixels. copy: the folder of a saved
        tokeniser that holds the weights themselves.
        Raises UserError when they are not to be had, of another model, or `tile` does not fit.
        """
        super().__init__()
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        place = (id, revision, (subfolder,)) if copy is None else (str(copy), "copied", (COPY,))
        weights = FrozenWeights(*place, setting="model.tokenizer.id", instead="tokenizer=patches")
        folder = weights.folder()
        found = weights.config(folder).get("_class_name")
        if found != "AutoencoderKL":
            raise weights.refusal("cannot be loaded", f"it is of class {found}, not AutoencoderKL")
        self.vae: Any = weights.load(AutoencoderKL, logging, folder)
        # A folder is named by its whole path: a saved model is not always read from here.
        local = copy is None and weights.is_local
        self.id = str(folder.resolve()) if local else id
        self.revision, self.subfolder = revision, subfolder
        config = self.vae.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        self.patch = stride * SIDE
        self.channels = config.latent_channels * SIDE * SIDE
        self.shift = float(config.shift_factor or 0.0)
        self.scaling = float(config.scaling_factor)
        self._set_tile(int(tile), stride)

    def _set_tile(self, tile: int, stride: int) -> None:
        whole = round(stride / OVERLAP)  # the overlap is whole latents
        if tile < whole or tile % whole:
            raise UserError(
                f"model.tokenizer.tile is {tile}: set it to a multiple of {whole} pixels, so that "
                "tiles overlap by whole latents."
            )
        self.tile = tile
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size = tile
        self.vae.tile_latent_min_size = tile // stride
        self.vae.tile_overlap_factor = OVERLAP

    def _at_once(self, width: int, height: int) -> int:
        """How many pictures of so many pixels go through the network together."""
        return max(1, self.tile * self.tile // (width * height))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See `ImageTokenizer.encode`. UserError for a size that is no whole number of tokens."""
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"A picture of {width}x{height} pixels is no whole number of tokens: both must be "
                f"multiples of {self.patch}."
            )
        pixels = images.to(self.device, self.vae.dtype)
        means = [
            self.vae.encode(part).latent_dist.mean.float()
            for part in pixels.split(self._at_once(width, height))
        ]
        return pixel_unshuffle((torch.cat(means) - self.shift) * self.scaling, SIDE)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ImageTokenizer.decode`."""
        means = pixel_shuffle(latents.to(self.device).float(), SIDE) / self.scaling + self.shift
        size = (latents.shape[3] * self.patch, latents.shape[2] * self.patch)
        images = [
            self.vae.decode(part.to(self.vae.dtype)).sample.float()
            for part in means.split(self._at_once(*size))
        ]
        return torch.cat(images)

    def save_pretrained(self, folder: Path) -> None:
        """Name the weights in config.json; copy them beside it if they are small."""
        folder = Path(folder)
        size = sum(p.numel() * p.element_size() for p in self.vae.parameters())
        copied = size < COPIED_BELOW
        if copied:
            self.vae.save_pretrained(folder / COPY)
        write_json(
            folder / "config.json",
            {
                "_class_name": type(self).__name__,
                "kind": self.kind,
                "id": self.id,
                "revision": self.revision,
                "subfolder": self.subfolder,
                "tile": self.tile,
                "copied": copied,
            },
        )

    @classmethod
    def read(cls, folder: Path) -> "VAETokenizer":
        """Read what `save_pretrained` wrote; UserError when it or the weights are not there."""
        path = folder / "config.json"
        try:
            config = read_json(path)
            names = ("id", "revision", "subfolder", "tile")
            arguments = {name: config[name] for name in names}
            copied = bool(config["copied"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): it is not a saved image tokeniser; train the model "
                "again or point to a complete folder."
            ) from error
        return cls(**arguments, copy=folder if copied else None)
