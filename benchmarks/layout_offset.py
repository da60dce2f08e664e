"""A picture of what VoPE's layout offset b does: the same prompt and seed at several offsets.

python benchmarks/layout_offset.py MODEL [--size WxH] [--out FILE] [PROMPT …]

A row a prompt and seed; b grows from 0 to |W − H| tokens from left to right, the middle is the
centred layout that the model was trained with. Then the mean column of the red pixels of the first
prompt at each offset, over 24 seeds, with its standard error.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.generate import parse_size
from components.model import DJEPAPipeline
from components.training.grid import save_grid

PROMPTS = [
    "a photo of a red circle",
    "a photo of a blue bar and a yellow triangle",
    "a photo of a green cross left of a black ring",
]


def red_columns(pipe, height, width, offsets, seeds):
    """Mean column of the red pixels, (seeds, offsets); NaN where nothing is red."""
    found = np.full((seeds, len(offsets)), np.nan)
    for seed in range(seeds):
        pixels = pipe(
            [PROMPTS[0]] * len(offsets),
            height,
            width,
            generator=[torch.Generator().manual_seed(100 + seed) for _ in offsets],
            layout_offset=offsets,
            output_type="np",
        ).images
        for place, picture in enumerate(pixels):
            red = (picture[..., 0] > 0.5) & (picture[..., 1:].max(axis=-1) < 0.35)
            if red.any():
                found[seed, place] = np.nonzero(red)[1].mean()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--size", default="32x64")
    parser.add_argument("--seeds", type=int, default=2, help="rows a prompt")
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("layout-offset.png"))
    given = parser.parse_args()
    pipe = DJEPAPipeline.from_pretrained(given.model)
    width, height = parse_size(given.size)
    spare = abs(width - height) / pipe.tokenizer.patch
    images, captions = [], []
    offsets = torch.linspace(0, spare, given.columns).tolist()
    for prompt in given.prompts:
        for seed in range(given.seeds):
            images += pipe(
                [prompt] * len(offsets),
                height,
                width,
                generator=[torch.Generator().manual_seed(seed) for _ in offsets],
                layout_offset=offsets,
            ).images
            captions += [f"b = {offset:g}: {prompt}" for offset in offsets]
    save_grid(given.out, images, captions, columns=given.columns)
    print(given.out)
    columns = red_columns(pipe, height, width, offsets, seeds=24)
    count = np.isfinite(columns).sum(axis=0)
    error = np.nanstd(columns, axis=0, ddof=1) / np.sqrt(count)
    for offset, mean, deviation, seen in zip(
        offsets, np.nanmean(columns, axis=0), error, count, strict=True
    ):
        print(f"b = {offset:g}: column {mean:.1f} ± {deviation:.1f} px, {seen} pictures with red")


if __name__ == "__main__":
    main()
