"""The critic's scores as the sampler wants them. Light: no torch, and nothing of the set's size."""

from pathlib import Path
from typing import Protocol

import numpy as np

from components.errors import UserError
from components.files import read_json

AGAIN = "run the critic stage of this round again"


class Keyed(Protocol):
    """What of an EncodedSet is compared: how many samples, and the hash of their keys."""

    @property
    def keys(self) -> str:
        """`keys_hash` of the keys in the set's order."""

    def __len__(self) -> int:
        """How many samples."""


def read_scores(critic: Path | None, encoded: Keyed) -> np.ndarray | None:
    """Scores (n,) float32 of the encoded set's samples, in its order, memory-mapped.

    `critic` is a critics/R folder with scores.npy (score = probability that the model already
    does this well). None, so that nothing is dropped, when there is no critic or its config.json
    says that it drops nothing. UserError when the scores are another set's.
    """
    if critic is None:
        return None
    path = Path(critic) / "scores.npy"
    try:
        config = read_json(path.parent / "config.json")
        if not config["drops"]:
            return None
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
        keys = config["keys"]
    except (OSError, ValueError, KeyError, EOFError) as problem:
        raise UserError(f"{path} cannot be read ({problem}); {AGAIN}.") from problem
    if scores.dtype != np.float32 or scores.ndim != 1:
        raise UserError(f"{path} has {scores.dtype} of shape {scores.shape}; {AGAIN}.")
    if len(scores) != len(encoded) or keys != encoded.keys:
        raise UserError(
            f"{path} has scores of another set ({len(scores)} samples, keys {keys}) than is "
            f"encoded ({len(encoded)}, keys {encoded.keys}); {AGAIN} on this curated set."
        )
    return scores
