"""One part of a training state on disk: a whole safetensors file, or a folder of shards.

torch.distributed.checkpoint writes the shards in its layout for safetensors, and reads both. Its
usual layout has an index that is a pickle; this one has none.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)


def write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to one file, which is on the disk when this returns."""
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's share of sharded tensors; every process of the team calls it.

    Returns when all have written; what more than one process holds is written once.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)


class _Files(FileSystem):
    """Lists nothing but the files of one part of a state."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def ls(self, path: Any) -> list[str]:
        return [str(file) for file in self.files]


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of a part: one whole file, or its shards; none where it is absent."""
    file = folder / f"{part}.safetensors"
    return [file] if file.is_file() else sorted((folder / part).glob("*.safetensors"))


def reader_of(folder: Path, part: str) -> tuple[HuggingFaceStorageReader, dict[str, torch.Size]]:
    """What reads a part, and the sizes of its tensors when put together."""
    files = files_of(folder, part)
    if not files:
        raise FileNotFoundError(f"there is no {folder / part}.safetensors")
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _Files(files)
    saved = reader.read_metadata().state_dict_metadata
    return reader, {name: getattr(entry, "size", torch.Size()) for name, entry in saved.items()}


def read_into(reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, each process on its own: its share of them where they are sharded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
