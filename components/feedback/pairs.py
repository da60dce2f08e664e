"""Preference pairs: two pictures of one prompt, of which one is better.

Those of `judge` are the model's own pictures of one training prompt, told apart by GenEval (how
the paper makes its pairs is not given); components/feedback/pair_sources.py has the other sources.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.errors import UserError
from components.evaluation.detector import SceneDetector
from components.evaluation.drawing import draw_pictures
from components.evaluation.folder import write_prompt
from components.feedback.pictures import (
    BATCH,
    Judged,
    Metadata,
    cover,
    draw_and_judge,
    training_prompts,
)
from components.files import atomic_file, atomic_folder
from components.scenes.world import World
from components.tokens.encoded import EncodedSet
from components.tokens.rungs import rung_size

FIRST_SEED = 900_000_000  # of the pictures that are drawn for pairs


@dataclass
class Pair:
    """Two pictures of one prompt and one size; `held_out` pairs are only measured on.

    facts: further columns of pairs.parquet. why: the loser's fault in a few words.
    """

    prompt: str
    winner: Image.Image
    loser: Image.Image
    facts: dict[str, Any]
    why: str = ""
    held_out: bool = False


@dataclass
class Tally:
    """What came of a source, filled while it is read.

    figures: for the metrics, by name. rejected: what was passed over, and why.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a figure."""
        self.figures[name] = self.figures.get(name, 0) + by

    def reject(self, what: str, why: str) -> None:
        """Note one thing that was passed over."""
        self.count("rejected")
        self.rejected.append((what, why))


def judge(model: Path, encoded_dir: Path, params: dict[str, Any], tally: Tally) -> Iterator[Pair]:
    """Draw training prompts with the saved pipeline `model` and pair what GenEval tells apart."""
    settings = params["dpo"]
    judged = list(
        draw_and_judge(
            model,
            SceneDetector(World.from_params(params["data"]), params["evaluation"]["detector"]),
            _prompts(encoded_dir, params),
            int(settings["images"]),
            rung_size(settings["size"]),
            FIRST_SEED,
            "dpo pairs",
            settings["sampler"],
            int(params["evaluation"]["workers"]),
        )
    )
    correct = float(np.mean([picture.correct for picture in judged]))
    tally.figures |= {"pictures": len(judged), "correct": correct}
    yield from make_pairs(judged)


def _prompts(encoded_dir: Path, params: Mapping[str, Any]) -> list[Metadata]:
    """`dpo.prompts` training prompts that cover the notions."""
    # Other prompts than the references': the seed of the choice differs.
    return cover(
        training_prompts(World.from_params(params["data"])),
        EncodedSet.open(encoded_dir).attribute_names["notion"],
        int(params["dpo"]["prompts"]),
        int(params["seed"]) + 1,
    )


def draw_to_rate(model: Path, encoded_dir: Path, out: Path, params: Mapping[str, Any]) -> str:
    """Draw two pictures or more of each prompt for raters: evaluation folders `out`/a and `out`/b.

    The prompts are those that the judge's pairs have, `dpo.images` pictures each, half of them in
    each folder. Returns a sentence on it. UserError if `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out} is there already: name a new folder, or remove it first.")
    settings, prompts = params["dpo"], _prompts(encoded_dir, params)
    each = max(int(settings["images"]) // 2, 1)
    places = [(side, i, k) for i in range(len(prompts)) for k in range(each) for side in "ab"]
    wanted = [(prompts[i]["prompt"], FIRST_SEED + n) for n, (_, i, _) in enumerate(places)]
    drawn = draw_pictures(
        model,
        wanted,
        rung_size(settings["size"]),
        BATCH,
        settings["sampler"],
        int(params["evaluation"]["workers"]),
        "to rate",
    )
    with atomic_folder(out) as folder:
        samples = {
            (side, i): write_prompt(folder / side, i, metadata)
            for side in "ab"
            for i, metadata in enumerate(prompts)
        }
        for (side, i, k), image in zip(places, drawn, strict=True):
            image.save(samples[side, i] / f"{k:04d}.png")
    return f"{out}/a and {out}/b: {len(prompts) * each} pictures each, of {len(prompts)} prompts"


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
            facts = {
                "tag": best.metadata["tag"],
                "seed_winner": best.seed,
                "seed_loser": worst.seed,
                "winner_correct": best.correct,
                "loser_correct": worst.correct,
                "winner_share": best.share,
                "loser_share": worst.share,
                "loser_reason": worst.reason,
            }
            prompt = str(best.metadata["prompt"])
            pairs.append(Pair(prompt, best.image, worst.image, facts, worst.reason))
    return pairs


def _key(picture: Judged) -> tuple[bool, float]:
    return picture.correct, picture.share


def split(pairs: Sequence[Pair], share: float, seed: int) -> None:
    """Mark the pairs of about `share` of the prompts as held out, of one at least.

    Prompts that differ by blanks or capitals only are one. Of pairs of a single prompt none is.
    """
    prompts = sorted({_plain(pair.prompt) for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(prompts))
    count = max(min(max(round(share * len(prompts)), 1), len(prompts) - 1), 0)
    chosen = {prompts[i] for i in order[:count]}
    for pair in pairs:
        pair.held_out = _plain(pair.prompt) in chosen


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def draw_pairs(out: Path, pairs: Sequence[Pair], most: int = 16) -> None:
    """Write a PNG of up to `most` pairs spread over all: winners above, losers below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int)
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
            axis.imshow(picture, interpolation="nearest")
            text = pairs[i].prompt.removeprefix("a photo of ") if line == 0 else pairs[i].why
            # Captions of other people may hold what reads as a formula.
            words = " ".join(f"{word} {text}".split())[:70]
            axis.set_title(words, fontsize=6, wrap=True, parse_math=False)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
