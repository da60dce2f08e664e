"""The embedded detector on real renders, spoilt renders and things that are no shape."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from components.errors import UserError
from components.evaluation.detector import Detections, SceneDetector, self_test
from components.evaluation.geneval import score_image
from components.scenes.draw import draw_scene
from components.scenes.tasks import TASKS
from components.scenes.world import World

PARAMS = Path(__file__).parents[1] / "params"
DATA = yaml.safe_load((PARAMS / "data/scenes.yaml").read_text())
# All the shapes there are, whatever the committed world uses.
DATA["shapes"] = ["circle", "square", "triangle", "cross", "ring", "bar"]
WORLD = World.from_params(DATA)
SETTINGS = yaml.safe_load((PARAMS / "evaluation/default.yaml").read_text())["detector"]
DETECTOR = SceneDetector(WORLD, SETTINGS)


def renders(task: str, split: str, width: int, height: int, n: int) -> list:
    rng = np.random.default_rng([width, height])
    prompts = WORLD.prompts(split, task)
    chosen = [prompts[int(i)] for i in rng.integers(len(prompts), size=n)] if prompts else []
    scenes = [(m, WORLD.scene_for(m, rng, width / height)) for m in chosen]
    return [(m, s, Image.fromarray(draw_scene(s, width, height, rng))) for m, s in scenes]


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 48), (48, 48)])
def test_real_renders_are_right_in_every_task_and_split(size: tuple[int, int]) -> None:
    for task in TASKS:
        for split in ("seen", "held_out"):
            pictures = renders(task, split, *size, n=34)
            right = [score_image(m, DETECTOR.detect(image))[0] for m, _, image in pictures]
            assert not right or np.mean(right) >= 0.97, (task, split, np.mean(right))


def test_boxes_and_colours_are_the_true_ones() -> None:
    for _, scene, image in renders("color_attr", "seen", 48, 48, n=20):
        found = DETECTOR.detect(image)
        for thing, box in zip(scene.objects, scene.boxes(48, 48), strict=True):
            ((*seen, score, color),) = found[thing.shape]
            assert color == thing.color
            assert score > 0.9
            assert np.abs(np.array(seen) - np.array(box)).max() < 0.6  # pixels


@pytest.mark.parametrize("task", ["two_object", "colors", "position", "color_attr"])
def test_blur_and_noise_do_not_change_what_is_seen(task: str) -> None:
    rng = np.random.default_rng(0)
    right = []
    for m, _, image in renders(task, "seen", 32, 32, n=25):
        blurred = image.filter(ImageFilter.GaussianBlur(0.7))
        noise = rng.normal(0, 15, (32, 32, 3))
        noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        right += [score_image(m, DETECTOR.detect(i))[0] for i in (blurred, noisy)]
    assert np.mean(right) >= 0.95


def test_nothing_is_seen_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    assert DETECTOR.detect(Image.new("RGB", (32, 32), (128, 128, 128))) == {}
    ramp = np.linspace(100, 160, 32)[None, :, None] * np.ones((32, 1, 3))
    assert DETECTOR.detect(Image.fromarray(ramp.astype(np.uint8))) == {}
    noise = np.clip(rng.normal(128, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
    assert DETECTOR.detect(Image.fromarray(noise)) == {}


def test_ragged_patches_are_rarely_taken_for_a_shape() -> None:
    """Random patches of a colour, as an untrained model might draw: no benefit of the doubt."""
    rng = np.random.default_rng(0)
    sure, patches = 0, 0
    for _ in range(60):
        field = Image.fromarray((rng.random((9, 9)) * 255).astype(np.uint8))
        mask = np.asarray(field.resize((32, 32), Image.Resampling.BICUBIC)) > 165
        picture = np.where(mask[..., None], [216, 32, 36], [128, 128, 128]).astype(np.uint8)
        blobs = DETECTOR.blobs(Image.fromarray(picture))
        patches += len(blobs)
        sure += sum(blob.score > 0.9 for blob in blobs)
    assert patches > 100
    assert sure / patches < 0.35


def test_touching_things_of_two_colours_are_told_apart() -> None:
    picture = np.full((32, 32, 3), 128, np.uint8)
    picture[8:18, 4:14] = DATA["colors"]["red"]
    picture[8:18, 14:24] = DATA["colors"]["blue"]
    found = DETECTOR.detect(Image.fromarray(picture))
    assert sorted(item[5] for item in found["square"]) == ["blue", "red"]


def test_self_test_passes_and_a_broken_detector_reports_nothing() -> None:
    self_test(WORLD, DETECTOR, 32, 32)

    class Broken:
        def detect(self, image: Image.Image) -> Detections:
            return {"circle": [[0, 0, 9, 9, 1.0, "red"]]}

    with pytest.raises(UserError, match="failed its self-test"):
        self_test(WORLD, Broken(), 32, 32)


def test_settings_decide_what_is_seen() -> None:
    """A dot of 8 x 8 in 64 x 64 pixels is 1.6 % of the area; a shape must cost less than none."""
    picture = np.full((64, 64, 3), 128, np.uint8)
    picture[20:28, 20:28] = DATA["colors"]["red"]
    image = Image.fromarray(picture)
    ((*_, score, _),) = DETECTOR.detect(image)["square"]
    assert SceneDetector(WORLD, SETTINGS | {"least_area": 0.02}).detect(image) == {}
    ((*_, doubted, _),) = SceneDetector(WORLD, SETTINGS | {"none": 0.001}).detect(image)["square"]
    assert doubted < score
