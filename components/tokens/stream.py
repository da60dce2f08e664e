"""A safetensors file that is larger than memory, written piece by piece."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HEADER = 1016  # bytes of JSON, padded with blanks: the data starts at byte 1024


class TensorStream:
    """One bfloat16 tensor of rows written in any order, beside it one int64 vector.

    The vector comes first in the file, which keeps it aligned whatever a row's size is; its
    length is known at the start, the number of rows only at the end.
    """

    def __init__(
        self, path: Path, rows: str, shape: tuple[int, ...], vector: str, count: int
    ) -> None:
        """Open `path` for the tensor `rows` of (n, *shape) and the int64 `vector` of (count,)."""
        self._names, self._shape, self._count = (vector, rows), shape, count
        self._row_bytes = 2 * int(np.prod(shape))
        self._rows = 0
        self._file = path.open("wb")

    def write(self, first: int, values: Tensor) -> None:
        """Write rows (m, *shape) from row `first` on, rounded to bfloat16."""
        words = values.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        self._file.seek(8 + HEADER + 8 * self._count + first * self._row_bytes)
        self._file.write(words.tobytes())
        self._rows = max(self._rows, first + len(values))

    def finish(self, vector: np.ndarray) -> None:
        """Write the vector and the header."""
        assert vector.shape == (self._count,)
        middle = 8 * self._count
        end = middle + self._rows * self._row_bytes
        entries = (
            ("I64", [self._count], [0, middle]),
            ("BF16", [self._rows, *self._shape], [middle, end]),
        )
        header = {
            name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
            for name, entry in zip(self._names, entries, strict=True)
        }
        self._file.seek(0)
        self._file.write(HEADER.to_bytes(8, "little"))
        self._file.write(json.dumps(header).encode().ljust(HEADER))
        self._file.write(vector.astype("<i8").tobytes())

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
