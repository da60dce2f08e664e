"""What is measured: the paper's settings for a network size, and an encoded set made up for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from components.files import read_yaml
from components.tokens.encoded import CachedSet, rung_size

PARAMS = Path(__file__).parents[2] / "params"
# Of a caption: the paper's mean of 77 tokens (params/scale/paper.yaml), evenly spread.
WORDS = (57, 97)
# Small enough for a CPU; widths and tokens of no network in use.
TINY = {
    "width": 64, "heads": 4, "encoder_blocks": 2, "predictor_blocks": 2, "buffer_tokens": 4,
    "head_width": 64, "head_blocks": 2,
}  # fmt: skip


def parameters(
    model: str, rungs: Sequence[str], batch: int, tiny: bool, **training: Any
) -> dict[str, Any]:
    """The tree of scale=paper as far as a training step reads it, for one GPU.

    model: b, l or h; rungs: sizes that the batches have, the first also names the phase's size;
    tiny: a network for trying the program out. Read without Hydra, which a bare machine lacks.
    """
    scale = read_yaml(PARAMS / "scale/paper.yaml")
    settings = read_yaml(PARAMS / "training/default.yaml") | scale["training"]
    settings |= {"sharding": "replicate", "checkpointing": "none", "batches": "grouped"}
    # Never all tokens hidden nor all but one: either is compiled anew, once a run, for tens of
    # seconds.
    settings["mask"] = settings["mask"] | {"high": 0.99}
    side = max(rung_size(rungs[0]))
    settings["phase1"] |= {
        "rungs": list(rungs),
        "batch": batch,
        "size": {"mean": side, "std": 0, "low": side, "high": side},
    }
    network = read_yaml(PARAMS / f"model/{model}.yaml")["network"]
    return {
        "scale": "paper",
        "seed": 0,
        "model": {
            "network": network | TINY if tiny else network,
            "tokenizer": read_yaml(PARAMS / "tokenizer/sd3.yaml"),
            "text": read_yaml(PARAMS / "text/t5.yaml"),
        },
        "training": settings | training,
        "plan": read_yaml(PARAMS / "plan/default.yaml") | scale["plan"],
        "feedback": {"rounds": {}},
    }


class MadeSet(CachedSet):
    """Random latents and text states, held in memory as a cached set holds those of `encode`."""

    def __init__(self, params: Mapping[str, Any], rungs: Sequence[str], samples: int) -> None:
        assumed = params["plan"]
        sizes = assumed["tokenizers"]["sd3"]
        width = assumed["text_widths"]["t5"]
        patch = sizes["patch"]
        self.rungs = {name: rung_size(name) for name in rungs}
        self._rows = {name: np.arange(samples) for name in rungs}
        self._length = samples
        generator = torch.Generator().manual_seed(0)
        self._latents = {
            name: torch.randn(
                samples, sizes["channels"], h // patch, w // patch, generator=generator
            ).bfloat16()
            for name, (w, h) in self.rungs.items()
        }
        lengths = torch.randint(WORDS[0], WORDS[1] + 1, (samples,), generator=generator)
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        self._states = torch.empty(int(self._offsets[-1]), width, dtype=torch.bfloat16)
        self._states.normal_(generator=generator)
        self._tokenizer = SimpleNamespace(**sizes)  # type: ignore[assignment]
        self._text_encoder = SimpleNamespace(width=width)  # type: ignore[assignment]


class Dealer:
    """Batches of sample ids as `StatisticalSampler` hands them out, drawn evenly."""

    def __init__(self, encoded: MadeSet, rungs: Sequence[str], batch: int) -> None:
        self.encoded, self.names, self.batch = encoded, list(rungs), batch
        self.rng = np.random.default_rng(0)
        self.turn = 0

    def next_batch(self) -> tuple[str, np.ndarray]:
        """A rung and ids of samples; every rung in its turn."""
        self.turn += 1
        name = self.names[self.turn % len(self.names)]
        return name, self.rng.integers(0, len(self.encoded), self.batch)

    def next_pack(self) -> list[tuple[str, np.ndarray]]:
        """As many pictures, of all rungs alike."""
        ids = self.rng.integers(0, len(self.encoded), self.batch)
        parts = np.array_split(ids, len(self.names))
        return [pair for pair in zip(self.names, parts, strict=True) if len(pair[1])]
