"""Parts of curation one by one: scores, gates, duplicates, the cap."""

import tempfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.curation.database import open_database
from components.curation.decisions import synthetic_room
from components.curation.detectors import Faces, Nsfw, Text
from components.curation.duplicates import THUMB_BYTES, Comparison, perceptual_hash, thumbnail
from components.curation.filters import Picture, aspect, contrast, noise, sharpness
from components.curation.summary import _gate
from tests.test_curation import SETTINGS, lettered, scene


def picture(pixels: np.ndarray, caption: str = "a ring") -> Picture:
    return Picture("000000000", pixels, caption, {})


def test_noise_is_measured_in_levels() -> None:
    plain = np.full((128, 160, 3), 128.0)
    plain[:, 80:] = 40  # an edge is no noise
    for sigma in (4.0, 12.0):
        grey = np.random.default_rng(0).normal(0, sigma, (128, 160, 1))
        assert noise(picture(np.clip(plain + grey, 0, 255).astype(np.uint8))) == pytest.approx(
            sigma, rel=0.1
        )


def test_sharpness_falls_with_blur_and_not_with_contrast() -> None:
    pixels, _ = scene(3)
    faint = (pixels.astype(float) * 0.4 + 60).astype(np.uint8)
    scores = [
        sharpness(picture(cv2.GaussianBlur(pixels, (0, 0), s) if s else pixels)) for s in (0, 2, 4)
    ]
    assert scores[0] > 0.3 > scores[1] > scores[2]
    assert sharpness(picture(faint)) == pytest.approx(scores[0], abs=0.12)


def test_contrast_and_aspect() -> None:
    blank = np.full((64, 200, 3), 90, np.uint8)
    assert contrast(picture(blank)) == 0 and contrast(picture(scene(1)[0])) > 60
    assert aspect(picture(blank)) == 3.125


def test_text_gate_and_reader() -> None:
    text = Text(SETTINGS["text"], seed=0)
    assert text.gate_score(picture(lettered())) > 2 * text.gate_score(picture(scene(4)[0]))
    text.setup()
    scores = text.score([picture(lettered()), picture(scene(4)[0])])
    assert 0.02 < scores[0] < 0.5 and scores[1] == 0
    assert text.keeps(scores).tolist() == [False, True]
    assert text.keeps(np.array([np.nan])).all()


def test_gate_examines_suspects_and_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    nsfw = Nsfw({"probability": 0.5, "gate": {"threshold": 0.5, "sample": 0.2}}, seed=0)
    monkeypatch.setattr(nsfw, "examine", lambda batch: [0.9] * len(batch))
    grey = np.full((32, 32, 3), 80, np.uint8)
    blue = np.full((32, 32, 3), (20, 40, 220), np.uint8)
    batch = [Picture(f"{i:09d}", grey if i < 20 else blue, "", {}) for i in range(320)]
    scores = nsfw.score(batch)
    assert not np.isnan(scores[:20]).any()
    assert sum(nsfw.sampled) == (~np.isnan(scores[20:])).sum() and 30 < sum(nsfw.sampled) < 90
    assert np.isnan(nsfw.score(batch[::-1])[::-1]).tolist() == np.isnan(scores).tolist()


def test_gate_recall_counts_what_the_sample_found() -> None:
    counts = {
        "suspects": 50,
        "suspects_found": 40,
        "sampled": 100,
        "sampled_found": 1,
        "passed": 900,
    }
    gate = _gate(counts)
    assert gate["recall"] == 0.8  # 40 found, 1 % of 1000 missed
    assert gate["recall_low"] < 0.6


def test_faces_policies() -> None:
    rules = SETTINGS["faces"]
    drop, tag = Faces(rules | {"policy": "drop"}), Faces(rules)
    drop.setup()
    assert drop.score([picture(scene(2)[0])]).tolist() == [0]
    found = np.array([0.0, 1.0])
    assert drop.keeps(found).tolist() == [True, False] and tag.keeps(found).all()


Found = list[tuple[int, str, str, int]]


def repeats(
    folder: Path, pictures: list[tuple[str, str, bytes, bytes]], distance: int, colour: float
) -> Found:
    """Row, kind, first and bits of what repeats; pictures (key, sha256, hash, thumbnail)."""
    half = len(pictures) // 2
    with open_database(folder / "seen", "128MB") as db:
        comparison = Comparison(db, distance)
        for unit, part in enumerate((pictures[:half], pictures[half:])):
            rows = range(unit * half, unit * half + len(part))
            comparison.add(f"{unit}", rows, *(list(c) for c in zip(*part, strict=True)))
        comparison.find(colour)
        comparison.write(folder / "repeats.parquet")
    table = pq.read_table(folder / "repeats.parquet").to_pylist()
    return [(row["row"], row["kind"], row["first"], row["bits"]) for row in table]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_banded_search_finds_every_near_picture(seed: int, distance: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (24, 32), np.uint8)
    for i in range(12):  # near ones: flip some bits of an earlier hash
        bits = np.unpackbits(hashes[i])
        bits[rng.choice(256, rng.integers(0, 48), replace=False)] ^= 1
        hashes[12 + i] = np.packbits(bits)
    unlike = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    wanted: dict[int, tuple[int, int]] = {}
    for j in range(24):  # compared with kept ones only, so a chain does not end in nothing
        near = [i for i in range(j) if unlike[i, j] <= distance and i not in wanted]
        if near:
            wanted[j] = (near[0], int(unlike[near[0], j]))
    pictures = [(f"{i}", f"{i}", h.tobytes(), bytes(THUMB_BYTES)) for i, h in enumerate(hashes)]
    with tempfile.TemporaryDirectory() as folder:
        found = repeats(Path(folder), pictures, distance, 6.0)
    assert found == [(j, "near", f"{i}", bits) for j, (i, bits) in wanted.items()]


def test_first_of_repeats_stays_and_colour_counts(tmp_path: Path) -> None:
    pixels, _ = scene(1)
    brighter = np.clip(pixels.astype(int) + 2, 0, 255).astype(np.uint8)
    recoloured = np.ascontiguousarray(pixels[:, :, ::-1])
    images = {"a": pixels, "b": scene(2)[0], "near": brighter, "other": recoloured}
    listed = [(k, k, perceptual_hash(p), thumbnail(p)) for k, p in images.items()]
    listed += [("a", "a", *listed[0][2:]), ("again", "b", *listed[1][2:])]
    found = repeats(tmp_path, listed, 12, 6.0)
    assert [row[:3] for row in found] == [(2, "near", "a"), (4, "key", "a"), (5, "sha256", "b")]


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0, 1))
def test_cap_keeps_as_many_synthetic_as_the_share_allows(
    real: int, synthetic: int, share: float
) -> None:
    left = synthetic_room(real, synthetic, share)
    assert left <= share * (left + real) + 1e-6
    if left < synthetic:
        assert left + 1 > share * (left + 1 + real) - 1e-6
