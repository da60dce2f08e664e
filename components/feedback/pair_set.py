"""Preference pairs as tensors: made once by a source, kept in a folder, read in each step.

Memory holds the latents of all pairs and of each picture a thumbnail, never all pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.feedback.describe import encode_images
from components.feedback.pair_sources import quality, raters
from components.feedback.pairs import Pair, Tally, draw_pairs, judge, split
from components.feedback.pickapic import pickapic
from components.files import atomic_folder, read_json, write_json
from components.model import DJEPAPipeline
from components.model.network import Network
from components.tokens.rungs import rung_size
from components.training.draw import Draw, draw_for
from components.training.losses import flow_error

SOURCES = {"raters": raters, "quality": quality, "pickapic": pickapic}
PIXELS = 2**20  # of the pictures that are encoded together
THUMBNAIL = (128, 128)  # px; what is kept of a picture for pairs.png


@dataclass
class PairSet:
    """P pairs as tensors: latents (P, C, h, w), text states (P, L, E) with mask (P, L)."""

    winner: Tensor
    loser: Tensor
    states: Tensor
    mask: Tensor
    held_out: np.ndarray  # (P,) bool
    prompts: list[str]

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
    """Pairs for `pipe`, saved in `model`, from the source `dpo.pairs` names, and their figures.

    They are kept in `folder` (pairs.parquet, pairs.png, latents.safetensors, summary.json, and
    rejects.parquet where something was passed over): an interrupted run that has made them
    already reads them there.
    """
    settings = params["dpo"]
    if not folder.exists():
        tally, source = Tally(), settings["pairs"]["source"]
        if source == "judge":
            found = judge(model, encoded_dir, params, tally)
        else:
            path = Path(settings["pairs"]["path"])
            found = SOURCES[source](path, model, params, tally)
        with atomic_folder(folder) as target:
            _write_pairs(target, pipe, found, settings, int(params["seed"]))
            if tally.rejected:
                rejects = pd.DataFrame(tally.rejected, columns=["what", "why"])
                rejects.to_parquet(target / "rejects.parquet", index=False)
            write_json(target / "summary.json", tally.figures)
    table = pd.read_parquet(folder / "pairs.parquet")
    held_out = table["held_out"].to_numpy(bool)
    summary = read_json(folder / "summary.json") | {
        "pairs": len(table),
        "pairs_held_out": int(held_out.sum()),
    }
    prompts = table["prompt"].tolist()
    if table.empty:
        empty = torch.zeros(0)
        return PairSet(empty, empty, empty, empty, held_out, prompts), summary
    latents = load_file(folder / "latents.safetensors")
    states, mask = pipe.text_encoder.encode(prompts)
    return PairSet(latents["winner"], latents["loser"], states, mask, held_out, prompts), summary


def _write_pairs(
    folder: Path,
    pipe: DJEPAPipeline,
    found: Iterable[Pair],
    settings: dict[str, Any],
    seed: int,
) -> None:
    width, height = rung_size(settings["size"])
    rest, pairs = iter(found), []
    latents: dict[str, list[Tensor]] = {"winner": [], "loser": []}
    while part := list(islice(rest, max(1, PIXELS // (width * height)))):
        for side, parts in latents.items():
            images = [getattr(pair, side) for pair in part]
            parts.append(encode_images(pipe, images))
            for image in images:
                image.thumbnail(THUMBNAIL)
        pairs += part
    split(pairs, float(settings["held_out"]), seed)
    rows = [{"prompt": p.prompt, **p.facts, "held_out": p.held_out} for p in pairs]
    columns = list(rows[0]) if rows else ["prompt", "held_out"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "pairs.parquet", index=False)
    draw_pairs(folder / "pairs.png", pairs)
    if pairs:
        tensors = {side: torch.cat(parts) for side, parts in latents.items()}
        save_file(tensors, folder / "latents.safetensors")
