"""A picture of what VoPE's layout offset b does: the same prompt and seed at several offsets.

python benchmarks/layout_offset.py MODEL [--size WxH] [--out FILE] [PROMPT …]

A row a prompt and seed; b grows from 0 to |W − H| tokens from left to right, the middle is the
centred layout that the model was trained with.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.generate import parse_size
from components.model import DJEPAPipeline
from components.training.grid import save_grid

PROMPTS = [
    "a photo of a red circle",
    "a photo of a blue square and a yellow triangle",
    "a photo of a green cross left of a black ring",
]


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
    for prompt in given.prompts:
        for seed in range(given.seeds):
            offsets = torch.linspace(0, spare, given.columns).tolist()
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


if __name__ == "__main__":
    main()
