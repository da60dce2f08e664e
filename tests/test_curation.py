"""Curation from shards to shards, on a few drawn pictures."""

import copy
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.curation import pool
from components.curation.contract import check
from components.curation.curate import curate
from components.curation.passes import Job
from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import read_shard, write_shard
from components.curation.sources import Unit
from components.errors import UserError
from components.tokens.pictures import locate, read_manifest
from components.tracking import Tracker

SETTINGS = {
    "seed": 0,
    "workers": 1,
    "limits": {"picture_bytes": 1 << 20, "text_bytes": 4096, "pixels": 1 << 20, "batch": 8,
               "shard": 8, "memory": "256MB"},
    "columns": {"image": ["image"], "caption": ["caption", "text"], "key": ["key"]},
    "skip": [],
    "own": {},
    "aesthetic": {"model": "none", "threshold": 5.0},
    "captions": {"write": "never", "model": "none"},
    "caption": {"letters": 3},
    "resolution": {"shorter_side": 96},
    "aspect": {"ratio": 3.0},
    "contrast": {"levels": 24.0},
    "noise": {"levels": 12.0},
    "sharpness": {"ratio": 0.25},
    "duplicates": {"distance": 12, "colour": 6.0},
    "faces": {"policy": "tag", "smallest": 0.15, "scale_factor": 1.2, "neighbours": 4},
    "text": {
        "area": 0.0, "line_score": 0.7, "characters": 3, "detector_side": 256,
        "gate": {"threshold": 0.0, "step": 24, "line": 10, "window": 5, "sample": 0.0},
    },
    "nsfw": {"probability": 0.5, "gate": {"threshold": 0.0, "sample": 0.0}},
    "synthetic": {"share": 0.3},
    "notions": {
        "least": 1, "entities": 10, "side_bin": 64, "aspect_bin": 0.25,
        "attributes": {"numeral": ["two"], "colour": ["red", "blue"], "relation": ["left of"]},
        "stop_words": ["a", "photo", "of"],
    },
    "contract": {"rows": 4, "tail": 1, "required": ["red"], "examples": 3},
    "report": {"pictures": 4, "thumbnail": 48},
}  # fmt: skip
COLOURS = {"red": (216, 32, 36), "blue": (36, 64, 214), "yellow": (244, 214, 40)}


def params(**changes: dict) -> dict:
    settings = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    return {"curation": settings}


def scene(seed: int, width: int = 144, height: int = 128) -> tuple[np.ndarray, str]:
    """A picture of two circles, anti-aliased, with a little noise, and its colour."""
    rng = np.random.default_rng(seed)
    name = list(COLOURS)[seed % len(COLOURS)]
    pixels = np.full((height, width, 3), 110 + seed % 7 * 6, np.uint8)
    for _ in range(2):
        x, y = int(rng.integers(25, width - 25)), int(rng.integers(25, height - 25))
        cv2.circle(pixels, (x, y), int(rng.integers(12, 24)), COLOURS[name], -1, cv2.LINE_AA)
    noisy = pixels + rng.normal(0, 1.5, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), name


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def members(pixels: np.ndarray, caption: str, defect: str | None = None, **meta: object) -> dict:
    meta = {"caption": caption, "source": "tests", "scene": {"defect": defect}} | meta
    return {"png": png(pixels), "txt": caption.encode(), "json": json.dumps(meta).encode()}


def sound(seed: int, **meta: object) -> dict:
    pixels, colour = scene(seed)
    return members(pixels, f"a photo of two {colour} circles", **meta)


def lettered() -> np.ndarray:
    pixels, _ = scene(50, 224, 160)
    cv2.putText(pixels, "MODERN", (30, 90), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (250, 250, 250), 3)
    return pixels


def raw(folder: Path, shards: int = 3) -> Path:
    """Shards of six sound pictures and, in the first, one of each defect."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        samples = [(f"{shard:05d}{i:04d}", sound(10 * shard + i)) for i in range(6)]
        if shard == 0:
            pixels, _ = scene(1)
            rng = np.random.default_rng(0)
            noisy = np.clip(pixels + rng.normal(0, 40, pixels.shape), 0, 255).astype(np.uint8)
            bad = {
                "small": pixels[:64, :64],
                "long": np.concatenate([pixels] * 4, axis=1),
                "blank": np.full_like(pixels, 128),
                "noisy": noisy,
                "blurred": cv2.GaussianBlur(scene(60)[0], (0, 0), 4),
                "text": lettered(),
                "repeated": pixels,
                "near": np.clip(pixels.astype(int) + 2, 0, 255).astype(np.uint8),
            }
            for i, (defect, image) in enumerate(bad.items()):
                samples.append((f"{shard:05d}{i + 100:04d}", members(image, "a red ring", defect)))
            broken = members(pixels, "cut off", "damaged")
            broken["png"] = broken["png"][: len(broken["png"]) // 2]
            samples.append(("000000202", {"png": b"no picture", "txt": b"a ring"}))
            samples += [("000000200", broken), ("000000201", members(scene(70)[0], "", "mute"))]
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation")
    curate(raw(folder / "data"), folder / "curated", params(), Tracker(), folder / "curate.json")
    return folder / "curated"


def test_each_defect_is_rejected_by_its_filter(curated: Path) -> None:
    rejects = pd.read_parquet(curated / "rejects.parquet").set_index("key")
    wanted = ["resolution", "aspect", "contrast", "noise", "sharpness", "text"]
    wanted += ["exact_duplicate", "near_duplicate"]
    for i, name in enumerate(wanted):
        row = rejects.loc[f"00000{i + 100:04d}"]
        assert row["filter"] == name, (name, row.to_dict())
        assert row["reason"]
    assert set(rejects.loc[["000000200", "000000202"], "filter"]) == {"damaged"}
    assert rejects.loc["000000201", "filter"] == "caption"
    truth = json.loads((curated / "summary.json").read_text())["ground_truth"]
    assert truth["sound"] == {"count": 18, "passed": 18, "share": 1.0, "rejected_by": {}}
    assert all(row["recall"] == 1 for row in truth["defects"].values())


def test_manifest_and_shards_agree(curated: Path) -> None:
    manifest = pd.read_parquet(curated / "manifest.parquet")
    assert len(manifest) == 18 and manifest["key"].is_unique
    for stem, rows in manifest.groupby("shard"):
        samples = list(read_shard(curated / f"{stem}.tar", SETTINGS["limits"]))
        assert [s.key for s in samples] == list(rows["key"])
        for sample, row in zip(samples, rows.itertuples(), strict=True):
            assert hashlib.sha256(sample.members["png"]).hexdigest() == row.sha256
            assert sample.caption == row.caption and (row.width, row.height) == (144, 128)
    red = manifest["caption"].str.contains("red")
    assert (manifest["notion_red"] == red).all() and manifest["notion_circle"].all()
    assert "two" in manifest.loc[0, "notion_words"]


def test_report_is_whole_and_offline(curated: Path) -> None:
    page = (curated / "report.html").read_text()
    assert "data:image/jpeg" in page and "data:image/png" in page
    assert "http" not in page.replace("data:", "")


def test_killed_run_goes_on_in_two_processes_and_gives_the_same_bytes(
    curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = curated.parent / "data"
    for name in pool.PASSES:
        done: list[str] = []

        def killed(unit: Unit, job: Job, name: str = name, done: list[str] = done) -> None:
            if done:
                raise KeyboardInterrupt
            done.append(unit.name)
            pool.PASSES[name](unit, job)

        passes = pool.PASSES | {name: killed}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pool, "run_one", lambda n, unit, job, p=passes: p[n](unit, job))
            curate(data, tmp_path / "out", params(), Tracker())
        assert not (tmp_path / "out").exists()
    curate(data, tmp_path / "out", params(workers=2), Tracker())
    assert digest(tmp_path / "out") == digest(curated)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_as_an_older_result_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = raw(tmp_path / "data", shards=2)
    out = tmp_path / "out"
    curate(data, out, params(), Tracker())
    expected = digest(out)

    real = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if (path / "manifest.parquet").exists() and ".tmp-" not in path.parent.name:
            (path / "manifest.parquet").unlink()
            raise KeyboardInterrupt
        real(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        curate(data, out, params(), Tracker())
    assert not out.exists()
    curate(data, out, params(), Tracker())
    assert digest(out) == expected


def test_input_that_changes_under_a_killed_run_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(unit: Unit, job: Job) -> None:
        raise KeyboardInterrupt

    data = raw(tmp_path / "data", shards=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(pool.PASSES, "judge", killed)
        curate(data, tmp_path / "out", params(), Tracker())
    write_shard(data / "00001.tar", [("000010000", sound(33))])
    curate(data, tmp_path / "out", params(), Tracker())
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert list(manifest.loc[manifest["shard"] == "00001", "key"]) == ["000010000"]


@pytest.mark.parametrize("place", ["data", "data/out", ".", "own"])
def test_output_never_overwrites_what_is_not_its_own(tmp_path: Path, place: str) -> None:
    raw(tmp_path / "data", shards=1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"lie in each other|holds something else"):
        curate(tmp_path / "data", tmp_path / place, params(), Tracker())
    assert (tmp_path / "own/notes.txt").read_text() == "mine"
    assert (tmp_path / "data/00000.tar").exists()


def test_shards_parquet_and_loose_pictures_give_the_same_set(tmp_path: Path) -> None:
    samples = {f"{i:09d}": sound(i, source="here", synthetic=False) for i in range(6)}
    samples["000000006"] = members(np.full((128, 144, 3), 128, np.uint8), "a blank")
    forms = {name: tmp_path / name for name in ("shards", "table", "loose")}
    for folder in forms.values():
        folder.mkdir()
    write_shard(forms["shards"] / "a.tar", samples.items())
    rows = [
        {
            "key": key,
            "image": {"bytes": m["png"], "path": None},
            "caption": m["txt"].decode(),
            "source": "here",
        }
        for key, m in samples.items()
    ]
    pd.DataFrame(rows).to_parquet(forms["table"] / "a.parquet")
    with (forms["loose"] / "metadata.jsonl").open("w") as file:
        for key, m in samples.items():
            (forms["loose"] / f"{key}.jpg").write_bytes(m["png"])  # a PNG by another name
            line = {"file_name": f"{key}.jpg", "text": m["txt"].decode(), "source": "here"}
            file.write(json.dumps(line) + "\n")
    found = {}
    for name, folder in forms.items():
        out = tmp_path / f"{name}-out"
        curate(folder, out, params(), Tracker())
        manifest = pd.read_parquet(out / "manifest.parquet").drop(columns="shard")
        rejects = pd.read_parquet(out / "rejects.parquet").drop(columns="shard")
        assert len(manifest) == 6 and list(rejects["filter"]) == ["contrast"]
        check(out, tmp_path / "metrics.json", tmp_path / "docs", params(), Tracker())
        (shard,) = out.glob("*.tar")
        with tarfile.open(shard) as tar:
            names = tar.getnames()
        found[name] = (manifest.to_json(), rejects.to_json(), names)
    assert found["shards"] == found["table"] == found["loose"]
    assert found["loose"][2][:3] == ["000000000.png", "000000000.txt", "000000000.json"]


def test_curated_keys_in_any_order_can_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for shard, numbers in (("a", (1, 3)), ("b", (0, 2))):
        write_shard(tmp_path / f"data/{shard}.tar", [(f"key{n}", sound(n)) for n in numbers])
    curate(tmp_path / "data", tmp_path / "out", params(), Tracker())
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["key"]) == ["key1", "key3", "key0", "key2"]
    assert list(manifest["shard"]) == ["a", "a", "b", "b"]
    assert (locate(tmp_path / "out", manifest)["size"] > 0).all()


def test_keys_that_repeat_in_another_shard_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for shard in range(2):
        samples = [(f"{i:09d}", sound(20 * shard + i)) for i in range(2 + shard)]
        write_shard(tmp_path / f"data/{shard:05d}.tar", samples)
    curate(tmp_path / "data", tmp_path / "out", params(), Tracker())
    rejects = pd.read_parquet(tmp_path / "out/rejects.parquet")
    assert rejects[["key", "shard", "filter"]].to_numpy().tolist() == [
        ["000000000", "00001", "duplicate_key"],
        ["000000001", "00001", "duplicate_key"],
    ]
    assert len(pd.read_parquet(tmp_path / "out/manifest.parquet")) == 3


def test_damaged_shard_loses_only_what_is_damaged(tmp_path: Path) -> None:
    shard = tmp_path / "00001.tar"
    keys = [f"00001{i:04d}" for i in range(8)]
    write_shard(shard, [(key, sound(i)) for i, key in enumerate(keys)])
    table = pd.DataFrame({"key": [*keys, "000010099"]})
    table["error_message"] = [None] * 8 + ["HTTP Error 404"]
    table.to_parquet(tmp_path / "00001.parquet")
    data = bytearray(shard.read_bytes())
    at = data.index(b"000010002.png")
    data[at : at + 512] = b"\xff" * 512  # the header of the third picture
    shard.write_bytes(bytes(data[: data.index(b"000010006.txt")]))  # and the end cut off
    samples = {s.key: s for s in read_shard(shard, SETTINGS["limits"])}
    whole = {key for key, s in samples.items() if not s.error}
    assert {keys[i] for i in (0, 1, 3, 4, 5)} <= whole
    lost = {key: s.error for key, s in samples.items() if s.error}
    assert set(lost) == {f"@{at}", keys[2], keys[7], "000010099"}
    assert lost["000010099"] == "HTTP Error 404" and "absent" in lost[keys[7]]


def test_hostile_members_are_refused_and_listed(tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    with tarfile.open(shard, "w") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))

        for path in ("../../etc/passwd.jpg", "/abs.png", "a/b.png", "..", ".png"):
            add(path, b"x")
        add("link.png", b"", tarfile.SYMTYPE)
        add("huge.png", b"x" * (SETTINGS["limits"]["picture_bytes"] + 1))
        add("deep.png", b"x")
        add("deep.json", b"[" * 4000)
        for extension, data in sound(1).items():
            add(f"good.{extension}", data)
        for extension, data in sound(2).items():
            add(f"other.{extension}", data)
        add("good.png", b"again")
    samples = list(read_shard(shard, SETTINGS["limits"]))
    assert [s.key for s in samples if not s.error] == ["good", "other"]
    errors = " | ".join(s.error for s in samples)
    for words in (
        "'../../etc/passwd.jpg' refused",
        "'a/b.png' refused",
        "link",
        "limit",
        "repeats",
    ):
        assert words in errors


@pytest.mark.parametrize("kind", ["bomb", "text", "cut", "gif"])
def test_pictures_that_are_none_are_refused(kind: str) -> None:
    good = png(scene(1)[0])
    buffer = io.BytesIO()
    Image.new("1", (4000, 4000)).save(buffer, "GIF" if kind == "gif" else "PNG")
    data = {
        "bomb": buffer.getvalue(),
        "gif": buffer.getvalue(),
        "text": b"hello",
        "cut": good[:900],
    }
    with pytest.raises(DamagedPicture):
        decode(data[kind], SETTINGS["limits"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"faces": {"policy": "maybe"}}, "curation.faces.policy is 'maybe'"),
        ({"synthetic": {"share": 2}}, "curation.synthetic.share is 2"),
        ({"workers": 0}, "curation.workers is 0"),
        ({"limits": {"memory": "lots"}}, "curation.limits.memory is 'lots'"),
        ({"skip": ["colour"]}, "curation.skip names 'colour'"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        curate(tmp_path, tmp_path / "out", params(**change), Tracker())


def test_no_shards_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to curate in"):
        curate(tmp_path, tmp_path.parent / "out-of-nothing", params(), Tracker())
