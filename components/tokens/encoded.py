"""The encoded set: latents a resolution rung, text states and the curated manifest, on disk."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.errors import UserError
from components.tokens.text import TextEncoder, pad
from components.tokens.tokenizer import PatchTokenizer

NOTION = "notion_"
WORDS = NOTION + "words"


def rung_name(width: int, height: int) -> str:
    """A rung is named by its pixels, as in `32x24`."""
    return f"{width}x{height}"


def rung_size(name: str) -> tuple[int, int]:
    """Width and height in pixels of a rung's name. UserError if it is no such name."""
    width, _, height = name.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"The rung {name!r} is not a size; write it as 32x24 in params.training.")
    return int(width), int(height)


class EncodedSet:
    """Random access to what `encode` wrote; a sample's id is its row in `index`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = pd.read_parquet(folder / "index.parquet")
        columns = [c for c in self.index.columns if c.startswith(NOTION) and c != WORDS]
        self.notion_names: Sequence[str] = [column.removeprefix(NOTION) for column in columns]
        self.notions = self.index[columns].to_numpy(dtype=bool).reshape(len(self.index), -1)
        with safe_open(folder / "text.safetensors", "pt") as file:
            self._states, self._offsets = file.get_tensor("states"), file.get_tensor("offsets")
        self._latents: dict[str, Tensor] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._place: dict[str, np.ndarray] = {}
        rungs: dict[str, tuple[int, int]] = {}
        for path in sorted((folder / "latents").glob("*.safetensors")):
            name = path.stem
            rungs[name] = rung_size(name)
            # Memory-mapped: only what is read comes in.
            with safe_open(path, "pt") as file:
                self._latents[name] = file.get_tensor("latents")
                self._rows[name] = file.get_tensor("rows").numpy()
            place = np.full(len(self.index), -1, np.int64)
            place[self._rows[name]] = np.arange(len(self._rows[name]))
            self._place[name] = place
        self.rungs: Mapping[str, tuple[int, int]] = rungs

    @classmethod
    def open(cls, folder: Path) -> "EncodedSet":
        """Open an encoded folder. UserError when it is missing or damaged."""
        folder = Path(folder)
        try:
            return cls(folder)
        except (OSError, SafetensorError, KeyError, ValueError, json.JSONDecodeError) as error:
            raise UserError(
                f"The encoded set in {folder} cannot be read ({error}); run the stage encode again."
            ) from error

    def rows(self, rung: str) -> np.ndarray:
        """Ids (int64) of the samples that reach the rung."""
        return self._rows[rung]

    def latents(self, rung: str, ids: Iterable[int]) -> Tensor:
        """Latents float32 (B, C, h, w) of samples that reach the rung.

        Raises KeyError when one of them does not.
        """
        ids = np.asarray(ids, dtype=np.int64)
        place = self._place[rung][ids]
        if (place < 0).any():
            raise KeyError(f"samples {ids[place < 0].tolist()} do not reach the rung {rung}")
        return self._latents[rung][torch.from_numpy(place)].float()

    def text(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Text states float32 (B, L, D) and mask (B, L) bool, padded to the longest."""
        return pad([self._states[self._offsets[i] : self._offsets[i + 1]].float() for i in ids])

    def tokenizer(self) -> PatchTokenizer:
        """The image tokeniser that made the latents."""
        return PatchTokenizer.from_pretrained(self.folder / "tokenizer")

    def text_encoder(self) -> TextEncoder:
        """The text encoder that made the text states."""
        return TextEncoder.from_pretrained(self.folder / "text_encoder")
