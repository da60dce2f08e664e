"""How fast GenEval's set is drawn, against a plain loop: `python benchmarks/drawing.py MODEL`.

A plain loop is what one writes without thinking: one process, one picture a call, saved. The set
is `draw_geneval`, starting its processes and loading the model included. Both draw the same
prompts with the model's own settings, in turn, round after round; wall-clock seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import load
from components.evaluation.draw_sets import draw_geneval
from components.evaluation.prompts import geneval_prompts

IMAGES = 4


def plain(model: Path, prompts: list[dict[str, Any]], out: Path) -> None:
    """One picture a call; loading the model is in the time, as it is for the set."""
    import torch

    from components.model import DJEPAPipeline

    pipe = DJEPAPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for number in range(len(prompts) * IMAGES):
        generator = torch.Generator().manual_seed(number)
        picture = pipe(prompts[number // IMAGES]["prompt"], generator=generator).images[0]
        picture.save(out / f"{number:05d}.png")


def rate(draw: Callable[[Path], Any], pictures: int) -> float:
    """Pictures a second of one call in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        draw(Path(folder))
        return pictures / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=32, help="evenly of the 553")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    every = geneval_prompts()
    prompts = [every[i * len(every) // asked.prompts] for i in range(asked.prompts)]
    settings = load()["evaluation"] | {"sampler": {}}
    ways: dict[str, Callable[[Path], Any]] = {
        "plain loop": lambda f: plain(asked.model, prompts, f)
    }
    for workers in sorted({1, asked.workers}):
        ways[f"set, {workers} processes"] = lambda folder, workers=workers: draw_geneval(
            asked.model, folder, prompts, IMAGES, None, settings | {"workers": workers}
        )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(asked.rounds):
        for name, draw in ways.items():
            rates[name].append(rate(draw, len(prompts) * IMAGES))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.2f} pictures/s", flush=True)
    for name, values in rates.items():
        ratio = median(a / b for a, b in zip(values, rates["plain loop"], strict=True))
        print(
            f"{name}: {median(values):.2f} pictures/s (median of {asked.rounds}), "
            f"{ratio:.1f} times the plain loop; 2212 pictures in {2212 / median(values):.0f} s"
        )


if __name__ == "__main__":
    main()
