"""The encoded set: latents a resolution rung, text states and the curated manifest."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.errors import UserError
from components.files import read_json
from components.tokens.attributes import Attributes
from components.tokens.rungs import rung_size as rung_size
from components.tokens.text import TextEncoder, pad
from components.tokens.tokenizer import ImageTokenizer

SOURCE = "source.json"  # in folders whose pictures are encoded when they are asked for
SAMPLES, ATTRIBUTES, ROWS = "samples.json", "attributes", "rows"


class EncodedSet(ABC):
    """Random access to what `encode` wrote; a sample's id is its row in `index`.

    What sampling asks for (attributes, rows) is memory-mapped. Tensors are on the CPU, whatever
    device they were made on.
    """

    rungs: Mapping[str, tuple[int, int]]  # width and height in pixels by name

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / SAMPLES).is_file() and (folder / "index.parquet").is_file():
            raise UserError(
                f"The encoded set in {folder} was written by an older version (it has no "
                f"{SAMPLES}); run the stage encode again."
            )
        samples = read_json(folder / SAMPLES)
        self._length = int(samples["samples"])
        self.keys: str = samples["keys"]  # `keys_hash` of all keys, in the order of the ids
        self.shards: dict[str, int] = samples["shards"]  # samples by shard, in the order of the ids
        self._attributes = Attributes(folder / ATTRIBUTES)
        self.attribute_names: Mapping[str, Sequence[str]] = self._attributes.names
        self.attribute_counts = self._attributes.counts  # samples that have each, (k,) int64
        self._rows: dict[str, np.ndarray] = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted((folder / ROWS).iterdir())
        }
        self._tokenizer: ImageTokenizer | None = None
        self._text_encoder: TextEncoder | None = None

    def __len__(self) -> int:
        return self._length

    @cached_property
    def index(self) -> pd.DataFrame:
        """The curated manifest, a row a sample; read when it is first asked for."""
        return pd.read_parquet(self.folder / "index.parquet")

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Columns of the index, some rows at a time, each with the id of its first row."""
        start = 0
        with pq.ParquetFile(self.folder / "index.parquet") as file:
            for batch in file.iter_batches(columns=list(columns)):
                yield start, batch
                start += len(batch)

    def columns(self, names: Sequence[str], ids: np.ndarray) -> pd.DataFrame:
        """Columns of the index, a row for each of `ids` (m,), without the whole of it in memory."""
        wanted, place = np.unique(np.asarray(ids, np.int64), return_inverse=True)
        parts: list[pa.RecordBatch] = []
        for start, batch in self.batches(names):
            first, end = np.searchsorted(wanted, (start, start + len(batch)))
            parts.append(batch.take(pa.array(wanted[first:end] - start)))
            if end == len(wanted):
                break
        table = (
            pa.Table.from_batches(parts).to_pandas() if parts else pd.DataFrame(columns=list(names))
        )
        return table.iloc[place].reset_index(drop=True)

    def keys_of(self, ids: np.ndarray) -> list[str]:
        """Keys of samples, in the order asked for."""
        return self.columns(["key"], ids)["key"].astype(str).tolist()

    def attributes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attribute ids of samples (m,), end to end, and offsets (m + 1,) into them.

        They count through `attribute_names`, kind by kind.
        """
        return self._attributes(ids)

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
        """Ids (int64, ascending, memory-mapped) of the samples that reach the rung."""
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
        self.rungs = rungs

    def latents(self, rung: str, ids: Iterable[int]) -> Tensor:
        """See `EncodedSet.latents`."""
        return self._latents[rung][torch.from_numpy(self._places(rung, ids))].float()

    def text(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """See `EncodedSet.text`."""
        return pad([self._states[self._offsets[i] : self._offsets[i + 1]].float() for i in ids])
