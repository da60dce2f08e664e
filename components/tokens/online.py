"""An encoded set without a cache: pictures and captions are encoded when they are asked for.

For data of which the latents and text states would not fit on disks (a billion T5 states are
petabytes). The folder holds the index, both encoders and where each picture lies in the
curated shards; those have to stay where they were.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from components.errors import UserError
from components.files import read_json
from components.tokens.encoded import SOURCE, EncodedSet
from components.tokens.pictures import CuratedPictures
from components.tokens.rungs import as_tensor, fitted, rung_size

PLACES = "places.parquet"


class OnlineSet(EncodedSet):
    """See `EncodedSet`. The encoders run on the GPU if there is one."""

    def __init__(self, folder: Path) -> None:
        """UserError when the curated shards are not where the folder says."""
        super().__init__(folder)
        source = read_json(folder / SOURCE)
        self.curated = (folder / source["curated"]).resolve()
        places = pd.read_parquet(folder / PLACES)
        for name in places["shard"].cat.categories:
            if not (self.curated / name).is_file():
                raise UserError(
                    f"{self.curated / name} is missing: {folder} holds no latents and needs the "
                    "curated shards beside it; bring them back, or compose data.encode=cached and "
                    "run the stage encode again."
                )
        self.pictures = CuratedPictures(self.curated, self.index, places)
        self.rungs = {name: rung_size(name) for name in source["rungs"]}
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def latents(self, rung: str, ids: Iterable[int]) -> Tensor:
        """See `EncodedSet.latents`; the whole batch goes through the tokeniser at once."""
        ids = np.asarray(ids, dtype=np.int64)
        self._places(rung, ids)
        size = self.rungs[rung]
        pixels = np.stack([fitted(self.pictures.pixels(int(row)), size) for row in ids])
        return self.tokenizer().to(self._device).encode(as_tensor(pixels)).float().cpu()

    def text(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """See `EncodedSet.text`; the whole batch goes through the encoder at once."""
        captions = self.index["caption"].iloc[np.asarray(ids, dtype=np.int64)].tolist()
        states, mask = self.text_encoder().to(self._device).encode(captions)
        return states.cpu(), mask.cpu()
