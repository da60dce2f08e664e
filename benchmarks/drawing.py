"""How fast GenEval's set is drawn, against a plain loop: `python benchmarks/drawing.py MODEL`.

A plain loop: one process, one picture a call, saved. The set is `draw_geneval`, with the start of
its processes. Both load the model in that time, use one thread a process (more of them are slower
beside other work) and draw the same prompts with the model's own settings, in turn, round after
round. CPU seconds say what each costs where other work runs beside.
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
from components.processes import one_thread

IMAGES = 4


def plain(model: Path, prompts: list[dict[str, Any]], out: Path) -> None:
    """One picture a call; loading the model is in the time, as it is for the set."""
    import torch

    from components.model import DJEPAPipeline

    pipe = DJEPAPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    with one_thread():
        for number in range(len(prompts) * IMAGES):
            generator = torch.Generator().manual_seed(number)
            picture = pipe(prompts[number // IMAGES]["prompt"], generator=generator).images[0]
            picture.save(out / f"{number:05d}.png")


def timed(draw: Callable[[Path], Any], pictures: int) -> tuple[float, float]:
    """Pictures a second, and CPU seconds a picture of all processes, of a call in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.monotonic(), sum(os.times()[:4])
        draw(Path(folder))
        rate = pictures / (time.monotonic() - began)
        return rate, (sum(os.times()[:4]) - used) / pictures


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
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(asked.rounds):
        for name, draw in ways.items():
            rate, cpu = timed(draw, len(prompts) * IMAGES)
            measured[name].append((rate, cpu))
            print(
                f"round {number + 1}: {name}: {rate:.2f} pictures/s, {cpu:.2f} CPU s each",
                flush=True,
            )
    for name, values in measured.items():
        pairs = zip(values, measured["plain loop"], strict=True)
        faster = median(ours[0] / loop[0] for ours, loop in pairs)
        rate = median(value[0] for value in values)
        print(
            f"{name}: {rate:.2f} pictures/s (median of {asked.rounds}), {faster:.1f} times the "
            f"plain loop; 2212 pictures in {2212 / rate / 60:.0f} min"
        )


if __name__ == "__main__":
    main()
