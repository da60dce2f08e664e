"""Preference pairs: two pictures of one prompt, of which one is better.

Those of `judge` are the model's own pictures of one training prompt, told apart by the judge of
win rates with the paper's three questions (how the paper makes its pairs is not given);
components/feedback/pair_sources.py has the other sources.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.errors import UserError
from components.evaluation.compare import QUESTIONS, Answers, answers, as_detections, verdict
from components.evaluation.drawing import draw_pictures
from components.evaluation.embedded import detector_of
from components.evaluation.folder import write_prompt
from components.evaluation.geneval import score_image
from components.feedback.pictures import BATCH, Metadata, cover, training_prompts
from components.files import atomic_file, atomic_folder
from components.scenes.world import World
from components.tokens.encoded import EncodedSet
from components.tokens.rungs import rung_size

LETTERS = 34  # of a line over a picture of pairs.png
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


@dataclass
class Answered:
    """A picture that the model drew, and the judge's word on it (components/evaluation/compare)."""

    metadata: Metadata
    seed: int
    image: Image.Image
    answers: Answers
    reason: str  # why GenEval calls it wrong; empty if it does not


def judge(model: Path, encoded_dir: Path, params: dict[str, Any], tally: Tally) -> Iterator[Pair]:
    """Draw training prompts with the saved pipeline `model` and pair what the judge tells apart."""
    settings = params["dpo"]
    detector = detector_of(World.from_params(params["data"]), params["evaluation"]["detector"])
    wanted = [m for m in _prompts(encoded_dir, params) for _ in range(int(settings["images"]))]
    drawn = draw_pictures(
        model,
        [(metadata["prompt"], FIRST_SEED + i) for i, metadata in enumerate(wanted)],
        rung_size(settings["size"]),
        BATCH,
        settings["sampler"],
        int(params["evaluation"]["workers"]),
        "dpo pairs",
    )
    judged = []
    for i, (metadata, image) in enumerate(zip(wanted, drawn, strict=True)):
        blobs = detector.blobs(image)
        _, reason = score_image(metadata, as_detections(blobs))
        judged.append(Answered(metadata, FIRST_SEED + i, image, answers(metadata, blobs), reason))
    correct = float(np.mean([picture.answers[0] for picture in judged]))
    tally.figures |= {"pictures": len(judged), "correct": correct}
    yield from make_pairs(judged, float(settings["realism_margin"]), int(settings["each"]))


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


def make_pairs(judged: Sequence[Answered], margin: float, each: int) -> list[Pair]:
    """Pair a prompt's pictures, best with worst, second best with second worst, `each` at most.

    Better is what the judge's first question that differs says: adherence, coherence, then realism
    if it differs by more than `margin`. Pictures that are the same to it are not paired; each
    picture is used once.
    """
    groups: dict[str, list[Answered]] = {}
    for picture in judged:
        groups.setdefault(picture.metadata["prompt"], []).append(picture)
    pairs = []
    for prompt, group in groups.items():
        ranked = sorted(group, key=lambda picture: picture.answers, reverse=True)
        for best, worst in zip(
            ranked[: min(each, len(ranked) // 2)], reversed(ranked), strict=False
        ):
            if verdict(best.answers, worst.answers, margin) <= 0:
                continue
            facts: dict[str, Any] = {
                "tag": best.metadata["tag"],
                "seed_winner": best.seed,
                "seed_loser": worst.seed,
            }
            for side, picture in (("winner", best), ("loser", worst)):
                facts |= {f"{side}_{q}": v for q, v in zip(QUESTIONS, picture.answers, strict=True)}
            question = next(i for i in range(4) if best.answers[i] != worst.answers[i])
            why = worst.reason if question < 2 else ("less coherent", "less real")[question - 2]
            pairs.append(Pair(prompt, best.image, worst.image, facts | {"why": why}, why))
    return pairs


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
            words = textwrap.wrap(f"{word} {text}", LETTERS, max_lines=2, placeholder=" …")
            axis.set_title("\n".join(words), fontsize=6, parse_math=False)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
