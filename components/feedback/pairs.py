"""Preference pairs: two of the model's own pictures of one training prompt, told apart by GenEval.

How the paper makes its pairs is not given; no held-out combination and no person is needed
for these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.evaluation.detector import SceneDetector
from components.feedback.describe import encode_images
from components.feedback.pictures import Judged, cover, draw_and_judge, training_prompts
from components.files import atomic_file, atomic_folder, read_json, write_json
from components.model import DJEPAPipeline
from components.model.network import Network
from components.scenes.world import World
from components.tokens.encoded import EncodedSet, rung_size
from components.training.draw import Draw, draw_for
from components.training.losses import flow_error


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
            axis.imshow(picture.image, interpolation="nearest")
            text = pairs[i].prompt.removeprefix("a photo of ") if line == 0 else picture.reason
            axis.set_title(f"{word} {text}"[:70], fontsize=6, wrap=True)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


@dataclass
class PairSet:
    """P pairs as tensors: latents (P, C, h, w), text states (P, L, E) with mask (P, L)."""

    winner: Tensor
    loser: Tensor
    states: Tensor
    mask: Tensor
    held_out: np.ndarray  # (P,) bool

    def errors(self, model: Network, rows: np.ndarray, draw: Draw) -> tuple[Tensor, Tensor]:
        """Flow errors (B,) of the winners and of the losers, on the same draw."""
        device = next(model.parameters()).device
        both = torch.cat([self.winner[rows], self.loser[rows]]).to(device)
        states, mask = (torch.cat([x, x]).to(device) for x in (self.states[rows], self.mask[rows]))
        twice = draw.of(np.tile(np.arange(len(rows)), 2)).to(str(device))
        error = flow_error(model, both, states, mask, twice)
        return error[: len(rows)], error[len(rows) :]

    def draw(self, rows: np.ndarray, settings: dict[str, Any], *seed: int) -> Draw:
        """Mask, order, t and noise of these pairs; the same for the same seed."""
        number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        tokens = self.winner[rows].flatten(2).transpose(1, 2)
        return draw_for(tokens, settings, torch.Generator().manual_seed(number))


def draw_or_read(
    folder: Path, model: Path, pipe: DJEPAPipeline, encoded_dir: Path, params: dict[str, Any]
) -> tuple[PairSet, dict[str, Any]]:
    """Pairs of pictures of `pipe`, saved in `model`, and their figures; by `params.dpo`.

    They are kept in `folder` (pairs.parquet, pairs.png, latents.safetensors, summary.json): an
    interrupted run that has drawn them already reads them there.
    """
    settings = params["dpo"]
    if not folder.exists():
        encoded = EncodedSet.open(encoded_dir)
        world = World.from_params(params["data"])
        seed = int(params["seed"])
        # Other prompts than the references': the seed of the choice differs.
        prompts = cover(
            training_prompts(world),
            encoded.attribute_names["notion"],
            int(settings["prompts"]),
            seed + 1,
        )
        size = rung_size(settings["size"])
        judged = list(
            draw_and_judge(
                model,
                SceneDetector(world, params["evaluation"]["detector"]),
                prompts,
                int(settings["images"]),
                size,
                900_000_000,
                "dpo pairs",
                settings["sampler"],
                int(params["evaluation"]["workers"]),
            )
        )
        found = make_pairs(judged)
        split(found, float(settings["held_out"]), seed)
        with atomic_folder(folder) as new:
            _write_pairs(new, pipe, found)
            correct = float(np.mean([p.correct for p in judged]))
            write_json(new / "summary.json", {"pictures": len(judged), "correct": correct})
    table = pd.read_parquet(folder / "pairs.parquet")
    held_out = table["held_out"].to_numpy(bool)
    summary = read_json(folder / "summary.json") | {
        "pairs": len(table),
        "pairs_held_out": int(held_out.sum()),
    }
    if table.empty:
        empty = torch.zeros(0)
        return PairSet(empty, empty, empty, empty, held_out), summary
    latents = load_file(folder / "latents.safetensors")
    states, mask = pipe.text_encoder.encode(table["prompt"].tolist())
    return PairSet(latents["winner"], latents["loser"], states, mask, held_out), summary


def _write_pairs(folder: Path, pipe: DJEPAPipeline, pairs: list[Pair]) -> None:
    rows = [
        {
            "prompt": pair.prompt,
            "tag": pair.winner.metadata["tag"],
            "seed_winner": pair.winner.seed,
            "seed_loser": pair.loser.seed,
            "winner_correct": pair.winner.correct,
            "loser_correct": pair.loser.correct,
            "winner_share": pair.winner.share,
            "loser_share": pair.loser.share,
            "loser_reason": pair.loser.reason,
            "held_out": pair.held_out,
        }
        for pair in pairs
    ]
    columns = list(rows[0]) if rows else ["prompt", "held_out"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "pairs.parquet", index=False)
    draw_pairs(folder / "pairs.png", pairs)
    if pairs:
        latents = {
            "winner": encode_images(pipe, [pair.winner.image for pair in pairs]),
            "loser": encode_images(pipe, [pair.loser.image for pair in pairs]),
        }
        save_file(latents, folder / "latents.safetensors")
