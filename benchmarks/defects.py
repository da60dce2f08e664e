"""Planted defects: what the curation's filters find, and what they take of sound pictures.

python benchmarks/defects.py [--count N] [--photographs FOLDER] [--plot FILE] [--scores FILE]

Scenes of the embedded world, 256 px on the shorter side, and random crops of photographs that
installed packages carry (scikit-image has most of them), or of those in a FOLDER of one's own.
Defects are planted as params/data/scenes.yaml has them, thresholds are those of
params/curation/default.yaml, the shorter side lowered to 256 px. N (500) of each defect in the
scenes and in each half of the photographs; markdown tables go to stdout. FILE of scores: read if
it is there, else written, so that tables and plot can be had again for other thresholds.
"""

import argparse
import importlib.util
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.defects_tables import LINE_SCORES, REPEATS, draw, looking, report
from components.curation.detectors import Nsfw, Text
from components.curation.duplicates import perceptual_hash, thumbnail
from components.curation.filters import Picture
from components.scenes.defects import PIXELS
from components.scenes.draw import draw_scene
from components.scenes.raw import encode_jpeg, parse_size
from components.scenes.world import World

ROOT = Path(__file__).parents[1]
# Left out: pages, patterns and drawings; cell and clock_motion, which are out of focus and blurred
# on purpose; microaneurysms and lfw_subset, which are too small; motorcycle_right, the left again.
PHOTOGRAPHS = {
    "skimage/data": "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png "
    "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
    "matplotlib/mpl-data/sample_data": "grace_hopper.jpg",
}
LETTERED = ("astronaut", "grace_hopper", "motorcycle_left")  # by themselves: not for the reader
SIDES = (256, 512)  # px of a crop
QUALITY = 95  # of the JPEG every picture goes through
SLIGHT = {  # milder than planted by default, to see where the filters let go
    "slightly blurred": ("blurred", {"sigma": [1.0, 2.2]}),
    "slightly noisy": ("noisy", {"sigma": [10.0, 25.0]}),
}


def find_photographs(folder: Path | None) -> dict[str, np.ndarray]:
    """RGB pixels by name, those of the installed packages or of a folder."""
    paths = [p for p in sorted(folder.iterdir()) if p.is_file()] if folder else []
    for place, names in {} if folder else PHOTOGRAPHS.items():
        package, _, inside = place.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            sys.exit(f"{package} is not installed: pip install scikit-image scikit-learn")
        paths += [Path(found.origin).parent / inside / name for name in names.split()]
    pixels = {p.stem: np.asarray(Image.open(p).convert("RGB")) for p in paths}
    return {name: x for name, x in sorted(pixels.items()) if min(x.shape[:2]) >= SIDES[0]}


def scenes(data: dict[str, Any], count: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Set, source and pixels of each scene, in the world's proportions."""
    world = World.from_params(data)
    sizes = [parse_size(name) for name in data["raw"]["sizes"]]
    for index in range(count):
        rng = np.random.default_rng([0, index])
        width, height = sizes[rng.integers(len(sizes))]
        scale = SIDES[0] / min(width, height)
        width, height = round(width * scale), round(height * scale)
        scene = world.sample_scene(rng, width / height)
        yield "scenes", f"scene {index}", draw_scene(scene, width, height, rng)


def crops(folder: Path | None, count: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Set, source and pixels of random crops; the sources take turns, every other is in half A."""
    photographs = find_photographs(folder)
    print("Photographs:", ", ".join(photographs), file=sys.stderr)
    for half, start in (("half A", 0), ("half B", 1)):
        names = itertools.islice(itertools.cycle(list(photographs)[start::2]), count)
        for index, name in enumerate(names):
            rng, whole = np.random.default_rng([1, start, index]), photographs[name]
            h, w = (int(rng.integers(SIDES[0], min(SIDES[1], n) + 1)) for n in whole.shape[:2])
            y, x = (int(rng.integers(n - m + 1)) for n, m in zip(whole.shape, (h, w), strict=False))
            crop = whole[y : y + h, x : x + w]
            yield half, name, np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def saved(pixels: np.ndarray, quality: int = QUALITY) -> np.ndarray:
    """What is left of the pixels in a JPEG."""
    return np.asarray(Image.open(io.BytesIO(encode_jpeg(pixels, quality))))


def repeated(pixels: np.ndarray, kind: str) -> np.ndarray:
    """A repeat of a picture, itself decoded from a JPEG."""
    height, width = pixels.shape[:2]
    if kind == "exact copy":
        return pixels
    if kind == "JPEG q80":
        return saved(pixels, 80)
    if kind == "resized 0.9":
        size = (round(0.9 * width), round(0.9 * height))
        return saved(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)))
    if kind == "brightness +8":
        return saved(np.clip(pixels.astype(np.int16) + 8, 0, 255).astype(np.uint8))
    dy, dx = round(0.02 * height), round(0.02 * width)
    return saved(np.ascontiguousarray(pixels[dy : height - dy, dx : width - dx]))


def read(picture: Picture, text: Text) -> dict[str, float]:
    """The gate's score and, of one reading, the area under lines at each of LINE_SCORES."""
    reading = text.ocr(np.ascontiguousarray(picture.pixels[:, :, ::-1]))
    scores = {"gate": text.gate_score(picture)}
    for least in (text.text["line_score"], *LINE_SCORES):
        rule = Text({**text.text, "line_score": least}, 0)
        rule.ocr = lambda _: reading
        scores["text" if len(scores) == 1 else f"text {least}"] = rule.examine([picture])[0]
    return scores


def measure(curation: dict[str, Any], data: dict[str, Any], args: Any) -> pd.DataFrame:
    """A row a picture: set, source, index, kind ("" is sound) and every filter's score."""
    cheap = looking(curation)
    text, nsfw = Text(curation["text"], 0), Nsfw(curation["nsfw"], 0)
    text.setup(), nsfw.setup()
    most_read = {"scenes": args.count, "half A": args.count // 2, "half B": args.count // 2}
    seen = dict.fromkeys(most_read, 0)
    rows: list[dict[str, Any]] = []
    plants = {kind: (kind, data["defects"][kind]) for kind in PIXELS} | SLIGHT
    for place, (group, source, pixels) in enumerate(
        itertools.chain(scenes(data, args.count), crops(args.photographs, args.count))
    ):
        sound = saved(pixels)
        kinds = {"": sound}
        for number, (kind, (defect, settings)) in enumerate(plants.items()):
            rng = np.random.default_rng([2, place, number])
            kinds[kind] = saved(PIXELS[defect](pixels, rng, settings))
        for kind, image in kinds.items():
            picture = Picture(f"{place:09d}", image, "", {})
            row = {"set": group, "source": source, "index": place, "kind": kind}
            row |= {stage.name: stage.score([picture])[0] for stage in cheap}
            # The reader takes a third of a second a picture, so not every sound one is read.
            enough = kind == "" and seen[group] >= most_read[group]
            if kind in ("", "lettering") and source not in LETTERED and not enough:
                row |= read(picture, text) | {"nsfw": nsfw.score([picture])[0]}
                seen[group] += kind == ""
            if kind == "":
                row |= {"phash": perceptual_hash(image), "thumb": thumbnail(image)}
            rows.append(row)
        for kind in REPEATS:
            image = repeated(sound, kind)
            hashes = {"phash": perceptual_hash(image), "thumb": thumbnail(image)}
            rows.append({"set": group, "source": source, "index": place, "kind": kind} | hashes)
        if place % 100 == 0:
            print(f"{place} pictures", file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    curation = yaml.safe_load((ROOT / "params/curation/default.yaml").read_text())
    data = yaml.safe_load((ROOT / "params/data/scenes.yaml").read_text())
    if args.scores and args.scores.exists():
        scores = pd.read_parquet(args.scores)
    else:
        scores = measure(curation, data, args)
        if args.scores:
            scores.to_parquet(args.scores)
    report(scores, curation)
    if args.plot:
        draw(scores, curation, args.plot)


if __name__ == "__main__":
    main()
