"""Preference pairs: two of the model's own pictures of one training prompt, told apart by GenEval.

How the paper makes its pairs is not given; no held-out combination and no person is needed
for these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.feedback.pictures import Judged
from components.files import atomic_file


@dataclass
class Pair:
    """A winner and a loser of one prompt; `held_out` pairs are only measured on."""

    winner: Judged
    loser: Judged
    held_out: bool = False

    @property
    def prompt(self) -> str:
        """The prompt of both."""
        return str(self.winner.metadata["prompt"])


def make_pairs(judged: Sequence[Judged]) -> list[Pair]:
    """Pair a prompt's pictures, best with worst, second best with second worst, and so on.

    Better is: correct by GenEval, then the larger share of clauses met. Pictures that are
    equal in both are not paired; each picture is used once.
    """
    groups: dict[int, list[Judged]] = {}
    for picture in judged:
        groups.setdefault(picture.prompt_index, []).append(picture)
    pairs = []
    for group in groups.values():
        ranked = sorted(group, key=_key, reverse=True)
        for best, worst in zip(ranked, reversed(ranked), strict=True):
            if _key(best) <= _key(worst):
                break
            pairs.append(Pair(best, worst))
    return pairs


def _key(picture: Judged) -> tuple[bool, float]:
    return picture.correct, picture.share


def split(pairs: Sequence[Pair], share: float, seed: int) -> None:
    """Mark the pairs of about `share` of the prompts as held out, of one at least."""
    prompts = sorted({pair.prompt for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(prompts))
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    chosen = {prompts[i] for i in order[:count]}
    for pair in pairs:
        pair.held_out = pair.prompt in chosen


def draw_pairs(out: Path, pairs: Sequence[Pair], most: int = 16) -> None:
    """Write a PNG of up to `most` pairs spread over all: winners above, losers below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int) if pairs else []
    columns = max(min(8, len(rows)), 1)
    bands = max(1, -(-len(rows) // columns))
    figure, axes = pyplot.subplots(
        2 * bands, columns, figsize=(1.7 * columns, 3.8 * bands), dpi=80, squeeze=False
    )
    for axis in axes.ravel():
        axis.axis("off")
    for place, i in enumerate(rows):
        band, column = divmod(place, columns)
        for line, picture, word in ((0, pairs[i].winner, "+"), (1, pairs[i].loser, "−")):
            axis = axes[2 * band + line, column]
            axis.imshow(picture.image, interpolation="nearest")
            text = pairs[i].prompt.removeprefix("a photo of ") if line == 0 else picture.reason
            axis.set_title(f"{word} {text}"[:70], fontsize=6, wrap=True)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
