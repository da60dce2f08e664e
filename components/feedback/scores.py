"""The critic's scores as the sampler wants them. Light: no torch."""

from pathlib import Path

import numpy as np
import pandas as pd

from components.errors import UserError
from components.files import read_json


def read_scores(critic: Path | None, keys: pd.Series) -> np.ndarray | None:
    """Scores (n,) float32 for the samples with these keys, in their order.

    `critic` is a critics/R folder with scores.parquet (key, score = probability that the
    model already does this well). None, so that nothing is dropped, when there is no critic
    or its config.json says that it drops nothing. UserError when samples lack a score.
    """
    if critic is None:
        return None
    path = Path(critic) / "scores.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing; run the critic stage of this round first.")
    if not read_json(path.parent / "config.json")["drops"]:
        return None
    scores = pd.read_parquet(path)
    found = scores.set_index("key")["score"].reindex(keys)
    missing = found.index[found.isna()]
    if len(missing):
        raise UserError(
            f"{path} has no score for {len(missing)} encoded samples ({missing[0]}, …); "
            "run the critic stage again on this curated set."
        )
    return found.to_numpy(np.float32)
