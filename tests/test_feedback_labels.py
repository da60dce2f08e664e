"""Who says what is good: people's exports, whole and broken, and the rater that there is not."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.errors import UserError
from components.feedback.labels import label, read_labels, simulated
from components.rating.jobs import label_job

RATER = {"realism": 0.8, "noise": 0.1}


@pytest.fixture
def references(tmp_path):
    """Six reference pictures; the automatic rule calls the first three good."""
    folder = tmp_path / "references" / "r2"
    files = [f"{i:05d}/samples/0000.png" for i in range(6)]
    for i, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / file)
    pd.DataFrame(
        {
            "file": files,
            "prompt": "a photo",
            "label": [True] * 3 + [False] * 3,
            "realism": [0.9, 0.85, 0.7, 0.9, 0.2, 0.0],
            "seed": range(100, 106),
        }
    ).to_parquet(folder / "references.parquet")
    return folder


def file_of(i):
    return f"{i:05d}/samples/0000.png"


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of(references, path):
    return label(references, "r2", path, RATER, 0)


def test_automatic_labels_are_the_benchmarks(references, tmp_path):
    said = label(references, "auto", tmp_path / "absent", RATER, 0)
    assert said.table["label"].tolist() == [True] * 3 + [False] * 3
    assert (said.by, said.threshold) == ("auto", "auto")


def test_raters_who_disagree_are_counted_and_ties_left_out(references, tmp_path):
    votes = [(0, True), (0, False), (0, False), (1, True), (1, False), (2, True), (2, True)]
    path = lines(tmp_path / "r2.jsonl", *({"file": file_of(i), "label": v} for i, v in votes))
    said = of(references, path)
    assert dict(zip(said.table["file"], said.table["label"], strict=True)) == {
        file_of(0): False,
        file_of(2): True,
    }
    assert said.facts == {"labels_disagree": 2, "labels_tied": 1, "not_rated": 3}
    assert (said.by, said.threshold) == ("human", "human")
    lines(path, *({"file": file_of(0), "label": v} for v in (True, False)))
    with pytest.raises(UserError, match="they tie"):
        of(references, path)


GOOD = {"file": file_of(0), "label": True}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (json.dumps(GOOD).encode() + b'\n{"file": "00001/sam', "line 2: cut off"),
        (b"{}\n[1]\nnull\n3\n", "4 lines .*line 1.*line 4"),
        (b"[" * 5000 + b"\n", "line 1: cut off"),
        (b'{"file": "00009/samples/0000.png", "label": true}\n', "line 1: no picture '00009/samp"),
        (b'{"file": ["a"], "label": true}\n', "line 1: no picture"),
        (b'{"file": "00000/samples/0000.png", "label": 1}\n', "line 1: label '1'"),
        (b'{"file": "00000/samples/0000.png", "label": "good"}\n', "line 1: label 'good'"),
        (b'\xff\xfe{"file": "00000/samples/0000.png"}\n', "line 1: not UTF-8"),
        (b'{"file": "' + b"x" * 20_000 + b'"}\n', "line 1: longer than"),
        (json.dumps(GOOD).encode() + b'\n{"fallback": "auto", "why": "late"}\n', "line 2: cut off"),
        (json.dumps(GOOD | {"item": "0" * 16}).encode(), "line 1: another picture"),
    ],
)
def test_a_corrupt_export_is_refused_by_its_lines(references, tmp_path, written, words):
    path = tmp_path / "r2.jsonl"
    path.write_bytes(written)
    with pytest.raises(UserError, match=words) as refused:
        of(references, path)
    assert "djepa rate export" in str(refused.value)


def test_labels_of_another_rounds_pictures_are_not_taken_for_this_ones(references, tmp_path):
    items = label_job(references).items
    rows = [{"file": i.facts["file"], "label": True, "item": i.id} for i in items]
    path = lines(tmp_path / "r2.jsonl", *rows)
    table = pd.read_parquet(references / "references.parquet")
    assert len(read_labels(path, table, references)[0]) == 6
    Image.new("RGB", (8, 8), (1, 2, 3)).save(references / file_of(4))  # drawn anew
    with pytest.raises(UserError, match="line 5: another picture"):
        of(references, path)


@pytest.mark.parametrize("written", [None, "", "\n\n"])
def test_labels_that_are_not_there_fail_with_the_commands_that_make_them(
    references, tmp_path, written
):
    path = tmp_path / "labels" / "r2.jsonl"
    path.parent.mkdir()
    if written is not None:
        path.write_text(written)
    with pytest.raises(UserError) as refused:
        of(references, path)
    folder = references.parent
    assert f"`djepa rate labels {folder}/r2`" in str(refused.value)
    command = f"`djepa rate export {folder}/ratings.sqlite --job labels/r2 --out {path}`"
    assert command in str(refused.value)


def test_people_who_did_not_come_leave_the_automatic_labels_and_a_reason(references, tmp_path):
    why = "3 of 80 labels after 24 h"
    said = of(references, lines(tmp_path / "r2.jsonl", {"fallback": "auto", "why": why}))
    assert said.table["label"].tolist() == [True] * 3 + [False] * 3
    assert (said.by, said.threshold, said.facts) == ("auto", "auto", {"fallback": why})


def test_the_simulated_rater_wants_realism_and_errs_by_picture(references, tmp_path):
    table = pd.read_parquet(references / "references.parquet")
    assert simulated(table, 0.8, 0.0, 0).tolist() == [True, True, False, False, False, False]
    assert simulated(table, 0.8, 1.0, 0).tolist() == [False, False, True, True, True, True]
    said = label(references, "simulated", tmp_path / "absent", RATER, 0)
    assert (said.by, said.threshold) == ("simulated", "human")
    assert said.facts == {"simulated_rater": RATER}
    many = pd.DataFrame({"label": True, "realism": 1.0, "seed": np.arange(4000)})
    errors = ~simulated(many, 0.8, 0.1, 0)
    assert 0.08 < errors.mean() < 0.12
    # A picture's error is its own: not of its place, and not of the others.
    backwards = simulated(many[::-1], 0.8, 0.1, 0)[::-1]
    assert (~backwards == errors).all()
    assert (~simulated(many, 0.8, 0.1, 1) != errors).any()
