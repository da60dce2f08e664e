"""The world of GenEval's own objects: truth, held-out set, prompts, recolouring, detector."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from components.errors import UserError
from components.evaluation.embedded import detector_of
from components.evaluation.emoji_detector import EmojiDetector
from components.evaluation.evaluate import benchmark
from components.evaluation.geneval import found, meets, score_image
from components.evaluation.prompts import COCO, geneval_prompts
from components.scenes import atlas, tasks
from components.scenes.emoji import EmojiWorld
from components.scenes.glyphs import OWN, at_size, body, recoloured, sides
from components.scenes.raw import RawPictures
from components.scenes.world import World

PARAMS = Path(__file__).parents[1] / "params"
DATA = yaml.safe_load((PARAMS / "data/openmoji.yaml").read_text())
SMALL = yaml.safe_load((PARAMS / "scale/small.yaml").read_text())
SETTINGS = SMALL["evaluation"]["detector"]
FEW = ["apple", "dog", "tv", "hot dog", "skateboard", "person", "toilet", "stop sign", "giraffe"]
SIZE = 128


@pytest.fixture(scope="module")
def whole() -> World:
    return World.from_params(DATA)


@pytest.fixture(scope="module")
def few() -> World:
    # Fewer turns: the detector's templates are drawn sooner.
    return World.from_params(DATA | {"shapes": FEW, "degrees": [0, 5]})


@pytest.fixture(scope="module")
def detector(few: World) -> EmojiDetector:
    made = detector_of(few, SETTINGS)
    assert isinstance(made, EmojiDetector)
    return made


def test_every_object_of_geneval_has_a_glyph_or_a_reason() -> None:
    catalogue = atlas.catalogue()
    assert [n for n in COCO if n in catalogue["objects"] or n in catalogue["missing"]] == list(COCO)
    assert not set(catalogue["objects"]) & set(catalogue["missing"])
    assert set(atlas.atlas()) == set(atlas.glyph_names())
    assert all(
        thing.get("looks", "red") in DATA["colors"] for thing in catalogue["objects"].values()
    )


def test_the_official_prompts_are_those_of_the_objects_there_are(whole: World) -> None:
    objects = set(atlas.catalogue()["objects"])
    expected = [m for m in geneval_prompts() if {c["class"] for c in m["include"]} <= objects]
    assert whole.official == expected
    of_benchmark = [
        m for t in tasks.TASKS for s in ("seen", "held_out") for m in whole.benchmark_prompts(s, t)
    ]
    assert Counter(map(json.dumps, of_benchmark)) == Counter(map(json.dumps, expected))
    held_out = Counter(m["tag"] for m in expected if whole.is_held_out(m))
    for task, n in Counter(m["tag"] for m in expected).items():
        if task != "single_object":
            assert held_out[task] >= 0.7 * n
    chosen = benchmark(whole, SMALL["evaluation"] | {"seed": 0})
    assert len(chosen) == len(expected)
    assert {count for _, count in chosen} == {SMALL["evaluation"]["images"]}


def test_no_training_scene_shows_a_held_out_combination(whole: World) -> None:
    assert isinstance(whole, EmojiWorld)
    rng = np.random.default_rng(0)
    own = 0
    for _ in range(300):
        scene = whole.sample_scene(rng)
        things = [(o.shape, o.color, o.box()) for o in scene.objects]
        # What a thing in its own colours looks like counts as its colour.
        named = [(n, whole.looks[n] if c == OWN else c, b) for n, c, b in things]
        assert not whole.held_out.scene(things) and not whole.held_out.scene(named)
        for clause in scene.metadata["include"]:
            colors = {c for n, c, _ in things if n == clause["class"]}
            if "color" in clause:
                assert colors == {clause["color"]} and clause["class"] != "person"
            else:
                own += colors == {OWN}
    assert own > 150


def test_training_prompts_hold_nothing_that_is_held_out(whole: World) -> None:
    prompts = whole.training_prompts()
    assert not [m for m in prompts if whole.is_held_out(m)]
    assert {m["tag"] for m in prompts} == set(tasks.TASKS)
    assert not [c for m in prompts for c in m["include"] if c["class"] == "person" and "color" in c]


def test_a_share_of_everything_held_out_is_refused() -> None:
    for share, wrong in ((1.5, "held_out.official is 1.5"), (-0.1, "held_out.official is -0.1")):
        with pytest.raises(UserError, match=wrong):
            World.from_params(DATA | {"held_out": {"seed": 0, "official": share}})
    with pytest.raises(UserError, match="glyphs"):
        World.from_params(DATA | {"glyphs": "photographs"})
    with pytest.raises(UserError, match="oven"):
        World.from_params(DATA | {"shapes": ["oven"]})


def test_boxes_are_where_the_things_are(few: World) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = few.scene_for(tasks.two_object("apple", "tv"), rng, aspect=4 / 3)
        pixels = few.draw(scene, 160, 120, rng)
        dark = pixels.max(-1) < 40  # outlines
        shown = np.zeros_like(dark)
        for x1, y1, x2, y2 in scene.boxes(160, 120):
            shown[round(y1) : round(y2), round(x1) : round(x2)] = True
            window = dark[round(y1) : round(y2), round(x1) : round(x2)]
            rows, columns = np.nonzero(window)
            assert rows.min() <= 1 and rows.max() >= len(window) - 3
            assert columns.min() <= 1 and columns.max() >= window.shape[1] - 3
        assert not (dark & ~shown).any()


@pytest.mark.parametrize("name", ["RED APPLE", "ZEBRA FACE", "TELEVISION", "PERSONAL COMPUTER"])
def test_a_colour_replaces_hue_and_leaves_outlines_and_shape(name: str) -> None:
    shown = sides(name, False, 0.0)
    own = at_size(name, False, 0.0, *(round(64 * side) for side in shown))
    outline = (own[..., :3].max(-1) < 8) & (own[..., 3] > 250)
    assert outline.any()
    for color, rgb in DATA["colors"].items():
        new = recoloured(own, tuple(rgb), color, body(name))
        assert np.array_equal(new[..., 3], own[..., 3])
        assert new[outline][:, :3].max() < 1
        bright = (own[..., :3].min(-1) > 64) & (own[..., 3] > 250)
        middle = np.median(new[bright][:, :3], axis=0)
        off = {other: np.abs(middle - np.array(v)).sum() for other, v in DATA["colors"].items()}
        assert min(off, key=off.__getitem__) == color


def test_the_detector_sees_real_scenes_and_no_others(few: World, detector: EmojiDetector) -> None:
    rng = np.random.default_rng(2)
    right = scenes = floor = tried = 0
    for task in tasks.TASKS:
        prompts = few.all_prompts(task)
        for _ in range(12):
            metadata = prompts[int(rng.integers(len(prompts)))]
            scene = few.scene_for(metadata, rng)
            image = Image.fromarray(few.draw(scene, SIZE, SIZE, rng))
            detections = detector.detect(image)
            right += bool(score_image(metadata, detections)[0])
            scenes += 1
            for i in rng.integers(len(prompts), size=5):
                other = prompts[int(i)]
                if tasks.meaning(other) != tasks.meaning(metadata):
                    floor += meets(other, found(other, detections))
                    tried += 1
    assert right >= 0.97 * scenes
    assert floor <= 0.02 * tried


def test_the_detector_says_nothing_where_nothing_is(few: World, detector: EmojiDetector) -> None:
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    few_pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    scene = few.scene_for(tasks.two_object("apple", "dog"), rng)
    pictures = {
        "noise": Image.fromarray(noise),
        "blank": Image.new("RGB", (SIZE, SIZE), (90, 140, 60)),
        "black": Image.new("RGB", (SIZE, SIZE)),
        "blotches": few_pixels.resize((SIZE, SIZE), Image.Resampling.BICUBIC),
        "blurred": Image.fromarray(few.draw(scene, SIZE, SIZE, rng)).filter(
            ImageFilter.GaussianBlur(7)
        ),
    }
    for name, picture in pictures.items():
        assert not found({"tag": "colors"}, detector.detect(picture)), name


def test_the_self_test_passes_at_its_size_and_refuses_a_few_pixels(
    few: World, detector: EmojiDetector
) -> None:
    detector.self_test(SIZE, SIZE)
    with pytest.raises(UserError, match="failed its self-test at 16x16"):
        detector.self_test(16, 16)
    assert detector.about()["post_processing"] == SETTINGS


def test_an_own_colour_is_called_by_what_it_looks_like(few: World, detector: EmojiDetector) -> None:
    rng = np.random.default_rng(4)
    sure = World.from_params(DATA | {"shapes": FEW, "own_colors": 1.0})
    for name, color in (("apple", "red"), ("toilet", "")):
        scene = sure.scene_for(tasks.single_object(name), rng)
        seen = detector.detect(Image.fromarray(sure.draw(scene, SIZE, SIZE, rng)))
        assert [item[5] for item in seen[name]] == [color]


def test_raw_pictures_say_what_they_show(few: World) -> None:
    pictures = RawPictures(few.data)
    for index in range(12):
        picture = pictures.picture(index)
        again = RawPictures(few.data).picture(index)
        assert picture.data == again.data and picture.truth == again.truth
        if picture.truth["defect"] is None:
            assert {o["class"] for o in picture.truth["objects"]} <= set(FEW)


def test_an_atlas_is_carried_to_a_machine_without_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas.write(tmp_path / "glyphs.npz")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setenv(atlas.FILE, str(tmp_path / "glyphs.npz"))
    carried, here = atlas.atlas.__wrapped__(), atlas.atlas()
    assert all(np.array_equal(carried[name], here[name]) for name in here)
    (tmp_path / "glyphs.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="djepa atlas"):
        atlas.atlas.__wrapped__()
    monkeypatch.delenv(atlas.FILE)
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="resvg"):
        atlas.atlas.__wrapped__()
