"""Sample grids: what the model draws for a few fixed prompts, step by step."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from components.files import atomic_file
from components.model.network import Network
from components.model.sampler import SamplerConfig
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.checkpoint import pipeline


def draw_grid(
    network: Network,
    encoded: EncodedSet,
    params: dict[str, Any],
    phase: str,
    step: int,
    tracker: Tracker,
) -> None:
    """Draw twelve fixed training prompts at the phase's first rung; the tracker takes the grid."""
    captions = sorted(set(encoded.index["caption"]))
    rng = np.random.default_rng(int(params["seed"]) * 1000 + 3)
    chosen = [captions[i] for i in rng.permutation(len(captions))[:12]]
    draw = pipeline(network, encoded, SamplerConfig.from_params(params))
    width, height = encoded.rungs[params["training"][phase]["rungs"][0]]
    generators = [torch.Generator().manual_seed(i) for i in range(len(chosen))]
    images = draw(chosen, height, width, generator=generators).images
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{phase}-step-{step:06d}.png"
        save_grid(path, images, chosen, columns=6)
        tracker.log_artifact(path, "samples")


def save_grid(path: Path, images: list[Image.Image], captions: list[str], columns: int) -> None:
    """Write pictures in rows, enlarged, each over its caption, as one PNG."""
    cell, text = 160, 26
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % columns * cell, index // columns * (cell + text)
        scale = (cell - 8) / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        grid.paste(image.resize(size, Image.Resampling.NEAREST), (left + 4, top + 4))
        words, line, lines = caption.removeprefix("a photo of ").split(), "", []
        for word in words:
            if len(line) + len(word) > 25:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        draw.text(
            (left + 4, top + cell - 2), "\n".join([*lines, line][:2]), fill="black", spacing=0
        )
    with atomic_file(path) as temporary:
        grid.save(temporary, format="PNG")
