"""The raw pictures: layout, determinism, truth, and nothing held out."""

import copy
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from components.errors import UserError
from components.scenes.defects import KINDS
from components.scenes.raw import RawPictures, write_raw
from components.scenes.tasks import TASKS
from components.scenes.world import World
from components.tracking import Tracker

PARAMS = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
IMG2DATASET = [
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "sha256",
]


def small(pictures: int, shard: int) -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    params["data"]["raw"] |= {"pictures": pictures, "shard": shard}
    return params


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


Members = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Members]:
    folder = tmp_path_factory.mktemp("raw") / "data"
    write_raw(folder, small(1200, 400), Tracker(), workers=1)
    samples: Members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None and member.mtime == 0
                samples.setdefault(key, {})[extension] = file.read()
    return folder, samples


@pytest.fixture(scope="module")
def metas(drawn: tuple[Path, Members]) -> list[dict[str, Any]]:
    return [json.loads(s["json"]) for s in drawn[1].values()]


def test_same_bytes_again_and_with_two_processes(tmp_path: Path) -> None:
    params = small(50, 20)
    write_raw(tmp_path / "a", params, Tracker(), workers=1)
    write_raw(tmp_path / "b", params, Tracker(), workers=2)
    names = [f"{n:05d}{e}" for n in range(3) for e in (".parquet", ".tar", "_stats.json")]
    assert list(digests(tmp_path / "a")) == names
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    params["data"]["seed"] += 1
    write_raw(tmp_path / "b", params, Tracker(), workers=1)
    assert digests(tmp_path / "a") != digests(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_layout_is_img2datasets(drawn: tuple[Path, Members]) -> None:
    folder, samples = drawn
    assert list(samples) == [f"{s:05d}{i:04d}" for s in range(3) for i in range(400)]
    for number in range(3):
        rows = pq.read_table(folder / f"{number:05d}.parquet").to_pylist()
        stats = json.loads((folder / f"{number:05d}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == len(rows)
        for row in rows:
            members = samples[row["key"]]
            assert list(members) == ["jpg", "txt", "json"]
            meta = json.loads(members["json"])
            assert set(meta) == {*IMG2DATASET, "source", "synthetic", "scene"}
            assert row == {name: meta[name] for name in row}
            assert set(IMG2DATASET) <= set(row)
            assert meta["caption"].encode() == members["txt"]
            assert meta["sha256"] == hashlib.sha256(members["jpg"]).hexdigest()
            with Image.open(io.BytesIO(members["jpg"])) as image:
                assert image.size == (meta["width"], meta["height"])


def test_nothing_held_out_in_captions_or_pictures(metas: list[dict[str, Any]]) -> None:
    world = World.from_params(PARAMS["data"])
    seen = {m["prompt"] for m in world.training_prompts()}
    held_out = {m["prompt"] for task in TASKS for m in world.prompts("held_out", task)}
    assert not seen & held_out and len(held_out) > 50
    assert {m["caption"] for m in metas} <= seen
    for meta in metas:
        things = [(o["class"], o["color"], tuple(o["box"])) for o in meta["scene"]["objects"]]
        assert not any((color, shape) in world.held_out.color_shape for shape, color, _ in things)
        if meta["scene"]["of"] is None:  # a copy moved by a pixel is rounded differently
            assert not world.held_out.scene(things), meta["key"]


def test_every_atomic_notion_occurs(metas: list[dict[str, Any]]) -> None:
    data = PARAMS["data"]
    captions = " ; ".join(m["caption"] for m in metas)
    for word in [*data["shapes"], *data["colors"], *data["relations"], "two", "three", "four"]:
        assert len(re.findall(rf"\b{word}", captions)) >= 10, word
    tasks = Counter(m["scene"]["task"] for m in metas)
    total = sum(data["tasks"].values())
    for task, share in data["tasks"].items():
        assert tasks[task] / len(metas) == pytest.approx(share / total, abs=0.04)


def test_shares_are_about_right(metas: list[dict[str, Any]]) -> None:
    data = PARAMS["data"]
    kinds = Counter(m["scene"]["defect"] for m in metas)
    assert set(kinds) == {None, *KINDS}
    for kind in KINDS:
        assert kinds[kind] / len(metas) == pytest.approx(data["defects"][kind]["share"], abs=0.02)
    synthetic = sum(m["synthetic"] for m in metas) / len(metas)
    assert synthetic == pytest.approx(data["synthetic"], abs=0.02)
    sources = Counter(m["source"] for m in metas)
    for name, source in data["sources"].items():
        assert sources[name] / len(metas) == pytest.approx(source["share"], abs=0.05)
    sizes = {(m["width"], m["height"]) for m in metas if m["scene"]["defect"] is None}
    assert {f"{w}x{h}" for w, h in sizes} == set(data["raw"]["sizes"])


def test_boxes_lie_within_and_show_their_colour(
    drawn: tuple[Path, Members], metas: list[dict[str, Any]]
) -> None:
    for meta in metas:
        scene, width, height = meta["scene"], meta["width"], meta["height"]
        low, high = PARAMS["data"]["defects"]["too_small"]["shorter_side"]
        if scene["defect"] == "too_small":
            assert low <= min(width, height) <= high
        else:
            assert min(width, height) >= 128
        assert bool(scene["objects"]) == (scene["defect"] != "blank")
        pixels = np.asarray(Image.open(io.BytesIO(drawn[1][meta["key"]]["jpg"]))).astype(int)
        for thing in scene["objects"]:
            x1, y1, x2, y2 = thing["box"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            if scene["defect"] in (None, "repeated") and thing["class"] != "ring":
                middle = pixels[int((y1 + y2) / 2), int((x1 + x2) / 2)]
                assert np.abs(middle - PARAMS["data"]["colors"][thing["color"]]).max() < 40


def test_repeated_pictures_name_an_earlier_sound_one(
    drawn: tuple[Path, Members], metas: list[dict[str, Any]]
) -> None:
    by_key = {m["key"]: m for m in metas}
    exact = 0
    for meta in metas:
        of = meta["scene"]["of"]
        assert (of is None) == (meta["scene"]["defect"] != "repeated")
        if of is None:
            continue
        first = by_key[of]
        assert of < meta["key"] and first["scene"]["defect"] is None
        assert first["caption"] == meta["caption"]
        exact += first["sha256"] == meta["sha256"]
        a, b = (
            np.asarray(Image.open(io.BytesIO(drawn[1][k]["jpg"]))).astype(int)
            for k in (of, meta["key"])
        )
        assert np.abs(a - b).mean() < 8
    assert 0 < exact < sum(m["scene"]["of"] is not None for m in metas)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("raw", "shard"), 20000, "data.raw.shard"),
        (("raw", "pictures"), 0, "data.raw.pictures"),
        (("raw", "jpeg_quality"), 0, "data.raw.jpeg_quality"),
        (("raw", "sizes"), {"128": 1.0}, "'128'"),
        (("raw", "sizes"), {"80x80": 1.0}, "too_small.shorter_side"),
        (("synthetic",), 2.0, "data.synthetic"),
        (("defects", "noisy", "share"), 0.95, "sum of all shares"),
        (("defects", "noisy", "sigma"), [5, 1], "data.defects.noisy.sigma"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, named: str
) -> None:
    params = small(4, 4)
    branch = params["data"]
    for part in place[:-1]:
        branch = branch[part]
    branch[place[-1]] = value
    with pytest.raises(UserError, match=re.escape(named)):
        write_raw(tmp_path / "data", params, Tracker(), workers=1)
    assert not list(tmp_path.iterdir())


def test_a_word_that_fits_nowhere_is_named() -> None:
    data = copy.deepcopy(PARAMS["data"])
    data["defects"]["lettering"] |= {"share": 1.0, "words": ["W" * 40]}
    for kind in set(KINDS) - {"lettering"}:
        data["defects"][kind]["share"] = 0.0
    with pytest.raises(UserError, match=r"data\.defects\.lettering\.words"):
        RawPictures(data).picture(0)
