"""The encoded set: latents a resolution rung, text states and the curated manifest."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.errors import UserError
from components.tokens.rungs import rung_size as rung_size
from components.tokens.text import TextEncoder, pad
from components.tokens.tokenizer import ImageTokenizer

NOTION = "notion_"
WORDS = NOTION + "words"
SOURCE = "source.json"  # in folders whose pictures are encoded when they are asked for


class EncodedSet(ABC):
    """Random access to what `encode` wrote; a sample's id is its row in `index`.

    Tensors are on the CPU, whatever device they were made on.
    """

    rungs: Mapping[str, tuple[int, int]]  # width and height in pixels by name

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = pd.read_parquet(folder / "index.parquet")
        columns = [c for c in self.index.columns if c.startswith(NOTION) and c != WORDS]
        self.notion_names: Sequence[str] = [column.removeprefix(NOTION) for column in columns]
        self.notions = self.index[columns].to_numpy(dtype=bool).reshape(len(self.index), -1)
        self._rows: dict[str, np.ndarray] = {}
        self._tokenizer: ImageTokenizer | None = None
        self._text_encoder: TextEncoder | None = None

    @staticmethod
    def open(folder: Path) -> "EncodedSet":
        """Open an encoded folder, cached or online. UserError when it is missing or damaged."""
        from components.tokens.online import OnlineSet

        folder = Path(folder)
        try:
            return OnlineSet(folder) if (folder / SOURCE).is_file() else CachedSet(folder)
        except (OSError, SafetensorError, KeyError, ValueError, json.JSONDecodeError) as error:
            raise UserError(
                f"The encoded set in {folder} cannot be read ({error}); run the stage encode again."
            ) from error

    def rows(self, rung: str) -> np.ndarray:
        """Ids (int64, ascending) of the samples that reach the rung."""
        return self._rows[rung]

    @abstractmethod
    def latents(self, rung: str, ids: Iterable[int]) -> Tensor:
        """Latents float32 (B, C, h, w) of samples that reach the rung.

        Raises KeyError when one of them does not.
        """

    @abstractmethod
    def text(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Text states float32 (B, L, D) and mask (B, L) bool, padded to the longest."""

    def tokenizer(self) -> ImageTokenizer:
        """The image tokeniser that makes the latents; read once."""
        if self._tokenizer is None:
            self._tokenizer = ImageTokenizer.from_pretrained(self.folder / "tokenizer")
        return self._tokenizer

    def text_encoder(self) -> TextEncoder:
        """The text encoder that makes the text states; read once."""
        if self._text_encoder is None:
            self._text_encoder = TextEncoder.from_pretrained(self.folder / "text_encoder")
        return self._text_encoder

    def _places(self, rung: str, ids: Iterable[int]) -> np.ndarray:
        """Position of each sample in `rows(rung)`; KeyError for one that is not there."""
        wanted, rows = np.asarray(ids, dtype=np.int64), self._rows[rung]
        place = np.searchsorted(rows, wanted).clip(max=max(len(rows) - 1, 0))
        absent = wanted[rows[place] != wanted] if len(rows) else wanted
        if len(absent):
            raise KeyError(f"samples {absent.tolist()} do not reach the rung {rung}")
        return place


class CachedSet(EncodedSet):
    """Latents and text states on disk, bfloat16; memory-mapped, so only what is read comes in."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with safe_open(folder / "text.safetensors", "pt") as file:
            self._states, self._offsets = file.get_tensor("states"), file.get_tensor("offsets")
        self._latents: dict[str, Tensor] = {}
        rungs: dict[str, tuple[int, int]] = {}
        for path in sorted((folder / "latents").glob("*.safetensors")):
            rungs[path.stem] = rung_size(path.stem)
            with safe_open(path, "pt") as file:
                self._latents[path.stem] = file.get_tensor("latents")
                self._rows[path.stem] = file.get_tensor("rows").numpy()
        self.rungs = rungs

    def latents(self, rung: str, ids: Iterable[int]) -> Tensor:
        """See `EncodedSet.latents`."""
        return self._latents[rung][torch.from_numpy(self._places(rung, ids))].float()

    def text(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """See `EncodedSet.text`."""
        return pad([self._states[self._offsets[i] : self._offsets[i + 1]].float() for i in ids])
