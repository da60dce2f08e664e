"""What a patch tokeniser keeps of an embedded world: the ceiling of every model on its tokens.

python benchmarks/ceiling.py SCALE [PICTURES] [CHANNELS …]

PICTURES (100) scenes of each task and split at the scale's evaluation size, drawn with the
benchmark's prompts, are judged as drawn, and after tokenisers of so many CHANNELS (the scale's own)
and back. Each is fitted to 2,000 other scenes. `small_world.py` does it for the OpenMoji world.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import defaults
from components.evaluation.embedded import detector_of
from components.evaluation.geneval import score_image
from components.scenes.tasks import TASKS, Metadata
from components.scenes.world import World
from components.tokens.rungs import rung_size
from components.tokens.tokenizer import PatchTokenizer

FITTED = 2000


def main(scale: str, each: int, channels: list[int]) -> None:
    """Print a line for the scenes as drawn and one for each number of channels."""
    torch.set_num_threads(1)
    params = defaults([f"scale={scale}"])
    world = World.from_params(params["data"])
    detector = detector_of(world, params["evaluation"]["detector"])
    width, height = rung_size(params["evaluation"]["size"])
    rng = np.random.default_rng(7)
    made: list[tuple[str, Metadata, np.ndarray]] = []
    for task in TASKS:
        for split in ("held_out", "seen"):
            prompts = world.benchmark_prompts(split, task)
            for number in range(each if prompts else 0):
                metadata = prompts[number % len(prompts)]
                pixels = world.draw(world.scene_for(metadata, rng), width, height, rng)
                made.append((split, metadata, pixels))

    def judge(what: str, images: list[Image.Image]) -> None:
        right, kinds = defaultdict(list), defaultdict(list)
        for (split, metadata, _), image in zip(made, images, strict=True):
            met = score_image(metadata, detector.detect(image))[0]
            right[f"{metadata['tag']} {split}"].append(met)
            if metadata["tag"] == "counting":
                thing = metadata["include"][0]
                kinds[f"{thing['count']} {thing['class']}"].append(met)
        means = {name: round(float(np.mean(v)), 2) for name, v in right.items()}
        lost = {k: f"{sum(v)}/{len(v)}" for k, v in sorted(kinds.items()) if not all(v)}
        overall = {
            split: round(float(np.mean([v for k, v in means.items() if k.endswith(split)])), 3)
            for split in ("held_out", "seen")
        }
        print(f"{what}, n = {len(made)}: {overall}; {means}; counted wrongly: {lost}", flush=True)

    def batch(pictures: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

    judge("as drawn", [Image.fromarray(pixels) for *_, pixels in made])
    scenes = [world.sample_scene(rng) for _ in range(FITTED)]
    others = batch([world.draw(scene, width, height, rng) for scene in scenes])
    real = batch([pixels for *_, pixels in made])
    settings = params["model"]["tokenizer"]
    for count in channels or [int(settings["channels"])]:
        tokenizer = PatchTokenizer(int(settings["patch"]), count)
        kept = tokenizer.fit(others.split(100))
        back = tokenizer.decode_images(tokenizer.encode(real))
        judge(f"{count} channels ({kept:.3f} of the variance)", back)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], int(given[1]) if len(given) > 1 else 100, [int(x) for x in given[2:]])
