"""Is the OpenMoji world's detector right? `python benchmarks/small_world.py [PICTURES]`.

PICTURES (50) scenes of each task and split at 128 px, drawn with prompts of the whole world, are
judged as drawn, as JPEG, at 160 px, and after the image tokeniser and back (the ceiling of every
model on it). Beside each score the chance floor: the same pictures under 20 other prompts of their
task. Then pictures that show nothing known. Writes docs/small-world-scenes.png and -colors.png.
"""

import io
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import defaults
from components.evaluation.embedded import WorldDetector, detector_of
from components.evaluation.geneval import found, meets, score_image
from components.scenes.glyphs import at_size, body, recoloured, sides
from components.scenes.raw import encode_jpeg
from components.scenes.tasks import TASKS, Metadata, meaning
from components.scenes.world import World
from components.tokens.tokenizer import PatchTokenizer

ROOT = Path(__file__).parents[1]
SIDE, OTHERS = 128, 20
SHOWN = "apple,dog,zebra,bus,laptop,couch,teddy bear,umbrella,pizza,toilet,bicycle,clock".split(",")  # noqa: SIM905
Pictures = Sequence[np.ndarray]


def scenes(world: World, each: int, side: int) -> list[tuple[str, Metadata, np.ndarray]]:
    """`each` scenes of each task and split: split, prompt, pixels."""
    rng, made = np.random.default_rng(7), []
    for task in TASKS:
        for split in ("seen", "held_out"):
            prompts = world.prompts(split, task)
            for _ in range(each if prompts else 0):
                metadata = prompts[int(rng.integers(len(prompts)))]
                scene = world.scene_for(metadata, rng)
                made.append((split, metadata, world.draw(scene, side, side, rng)))
    return made


def judge(
    what: str, made: Sequence[tuple[str, Metadata, Any]], pictures: Pictures, tools: Any
) -> None:
    """Print the share right of each task and split, overall, and the floor."""
    detector, pools = tools
    rng = np.random.default_rng(0)
    right, floor = defaultdict(list), defaultdict(list)
    for (split, metadata, _), pixels in zip(made, pictures, strict=True):
        detections = detector.detect(Image.fromarray(pixels))
        right[metadata["tag"], split].append(score_image(metadata, detections)[0])
        kept = found(metadata, detections)
        pool = pools[metadata["tag"]]
        for i in rng.integers(len(pool), size=OTHERS):
            if meaning(pool[int(i)]) != meaning(metadata):
                floor[metadata["tag"]].append(meets(pool[int(i)], kept))
    means = {f"{task} {split}": round(float(np.mean(v)), 3) for (task, split), v in right.items()}
    overall = [
        np.mean([x for (t, _), v in right.items() if t == task for x in v]) for task in TASKS
    ]
    chance = np.mean([np.mean(floor[task]) for task in TASKS])
    print(f"{what}, n = {len(made)}: overall {np.mean(overall):.4f}, floor {chance:.4f}; {means}")


def nothing(detector: WorldDetector, made: Sequence[tuple[str, Metadata, np.ndarray]]) -> None:
    """Print in how many pictures of nothing known something is seen."""
    rng, n = np.random.default_rng(0), 60

    def bits(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def rectangles(i: int) -> Image.Image:
        image = Image.new("RGB", (SIDE, SIDE), (160, 160, 160))
        for _ in range(3):
            x, y, w, h = rng.integers([8, 8, 15, 15], [80, 80, 45, 45]).tolist()
            color = tuple(int(v) for v in rng.integers(0, 256, 3))
            ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=color)
        return image.filter(ImageFilter.GaussianBlur(3))

    kinds: dict[str, Callable[[int], Image.Image]] = {
        "noise": lambda i: bits(SIDE, SIDE),
        "blank": lambda i: bits(1, 1).resize((SIDE, SIDE)),
        "blotches": lambda i: bits(8, 8).resize((SIDE, SIDE), Image.Resampling.BICUBIC),
        "blurred rectangles": rectangles,
        "scenes blurred by 6 px": lambda i: Image.fromarray(made[i * 7 % len(made)][2]).filter(
            ImageFilter.GaussianBlur(6)
        ),
    }
    for kind, draw in kinds.items():
        seen = [list(found({"tag": "colors"}, detector.detect(draw(i)))) for i in range(n)]
        print(f"{kind}: something seen in {sum(map(bool, seen))} of {n}", [s for s in seen if s])


def sheet_of_scenes(world: World, detector: WorldDetector, path: Path) -> None:
    """Scenes with their captions, and below what the detector saw."""
    rng, cells = np.random.default_rng(11), []
    for _ in range(21):
        scene = world.sample_scene(rng)
        picture = Image.fromarray(world.draw(scene, SIDE, SIDE, rng))
        cell = Image.new("RGB", (SIDE + 6, SIDE + 40), "white")
        seen = detector.detect(picture)
        canvas = ImageDraw.Draw(picture)
        for boxes in seen.values():
            for box in boxes:
                canvas.rectangle(tuple(box[:4]), outline=(255, 0, 220))
        cell.paste(picture, (3, 3))
        caption = scene.caption.removeprefix("a photo of ")
        each = [
            f"{len(boxes)} x " * (len(boxes) > 1) + f"{boxes[0][5]} {name}".strip()
            for name, boxes in seen.items()
        ]
        named = ", ".join(each)
        draw = ImageDraw.Draw(cell)
        for row, (text, ink) in enumerate(((caption, "black"), (f"saw {named}", (190, 0, 160)))):
            width = draw.textlength(text)
            size = max(6.5, min(10, 10 * SIDE / width))
            draw.text((3, SIDE + 6 + 15 * row), text, fill=ink, font_size=size)
        cells.append(np.asarray(cell))
    rows = [np.concatenate(cells[i : i + 7], 1) for i in range(0, len(cells), 7)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def sheet_of_colors(world: World, path: Path) -> None:
    """Objects as they are and in each colour."""
    from components.scenes.atlas import catalogue

    rows = []
    for name in SHOWN:
        glyph, row = catalogue()["objects"][name]["glyphs"][0], []
        shape = [round(52 * side) for side in sides(glyph, False, 0.0)]
        for color in ("", *world.colors):
            pixels = at_size(glyph, False, 0.0, *shape)
            if color:
                pixels = recoloured(pixels, world.colors[color], color, body(glyph))
            cell = Image.new("RGBA", (60, 60), (168, 168, 168, 255))
            thing = Image.fromarray(pixels.round().astype(np.uint8))
            cell.alpha_composite(thing, ((60 - shape[0]) // 2, (60 - shape[1]) // 2))
            row.append(np.asarray(cell.convert("RGB")))
        rows.append(np.concatenate(row, 1))
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def main(each: int) -> None:
    """Print and draw everything."""
    torch.set_num_threads(1)
    params = defaults(["scale=small"])
    world = World.from_params(params["data"])
    detector = detector_of(world, params["evaluation"]["detector"])
    tools = (detector, {task: world.all_prompts(task) for task in TASKS})
    sheet_of_scenes(world, detector, ROOT / "docs/small-world-scenes.png")
    sheet_of_colors(world, ROOT / "docs/small-world-colors.png")
    made = scenes(world, each, SIDE)
    real = [pixels for _, _, pixels in made]
    judge("as drawn", made, real, tools)
    nothing(detector, made)
    jpeg = [np.asarray(Image.open(io.BytesIO(encode_jpeg(p, 95)))) for p in real]
    judge("JPEG 95", made, jpeg, tools)
    larger = scenes(world, max(each // 5, 1), 160)
    judge("160 px", larger, [pixels for _, _, pixels in larger], tools)

    def batch(pictures: Pictures) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

    settings = params["model"]["tokenizer"]
    rng = np.random.default_rng(1)
    other = [world.draw(world.sample_scene(rng), SIDE, SIDE, rng) for _ in range(300)]
    for patch, channels in ((settings["patch"], settings["channels"]), (8, 48), (4, 12)):
        tokenizer = PatchTokenizer(int(patch), int(channels))
        kept = tokenizer.fit(batch(other).split(100))
        back = tokenizer.decode_images(tokenizer.encode(batch(real)))
        what = f"{patch} px, {channels} numbers a token ({kept:.3f} of the variance)"
        judge(what, made, [np.asarray(image) for image in back], tools)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
