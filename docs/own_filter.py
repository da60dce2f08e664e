"""A filter of one's own: dark pictures are rejected. Used with one line of params/curation:

own: {brightness: {file: docs/own_filter.py, threshold: 40.0}}
"""

from collections.abc import Sequence

import numpy as np

from components.curation.filters import Filter, Picture


class Brightness(Filter):
    """Mean of all channels, 0 to 255; pictures from the threshold up are kept."""

    keep_high = True
    reason = "mean brightness {score:.0f}, at least {threshold:g} wanted"

    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """One number a picture."""
        return np.array([picture.pixels.mean() for picture in batch])
