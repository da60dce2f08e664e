"""GenEval's rules on hand-made detections, folders, and the statistics."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.checks import gaps
from components.evaluation.folder import read_folder, write_prompt
from components.evaluation.geneval import clauses, found, relative_position, score_image
from components.evaluation.prompts import geneval_prompts
from components.evaluation.scoring import score_folder
from components.evaluation.statistics import spreads
from components.scenes import tasks
from components.scenes.tasks import meaning

SETTINGS = {"seed": 0, "other_prompts": 20, "bootstrap": 50}


def thing(x: float, y: float, score: float = 0.95, color: str = "red", side: float = 10) -> list:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2, score, color]


def right(metadata: dict, detections: dict) -> bool:
    return score_image(metadata, detections)[0]


def test_wording_is_the_official_one() -> None:
    assert tasks.single_object("oven")["prompt"] == "a photo of an oven"
    assert tasks.two_object("bench", "apple")["prompt"] == "a photo of a bench and an apple"
    assert tasks.counting("bus", 3)["prompt"] == "a photo of three buses"
    assert tasks.counting("toothbrush", 2)["prompt"] == "a photo of two toothbrushs"
    assert tasks.colors("car", "orange")["prompt"] == "a photo of an orange car"
    assert tasks.position("cat", "left of", "dog") == {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a cat left of a dog",
    }
    assert (
        tasks.color_attr("cup", "red", "tie", "orange")["prompt"]
        == "a photo of a red cup and an orange tie"
    )


def test_the_official_prompts_are_the_official_ones() -> None:
    prompts = geneval_prompts()
    counts = Counter(metadata["tag"] for metadata in prompts)
    assert counts == {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94,
                      "position": 100, "color_attr": 100}  # fmt: skip
    lines = "".join(json.dumps(metadata) + "\n" for metadata in prompts)
    # Of evaluation_metadata.jsonl in djghosh13/geneval.
    assert hashlib.md5(lines.encode()).hexdigest() == "9a0ed515640279a48ed3380d90aec0ed"


def test_the_same_asked_in_other_words_has_the_same_meaning() -> None:
    assert meaning(tasks.two_object("a", "b")) == meaning(tasks.two_object("b", "a"))
    assert meaning(tasks.position("a", "above", "b")) == meaning(tasks.position("b", "below", "a"))
    assert meaning(tasks.position("a", "above", "b")) != meaning(tasks.position("b", "above", "a"))
    assert meaning(tasks.color_attr("a", "red", "b", "blue")) != meaning(
        tasks.color_attr("a", "blue", "b", "red")
    )


def test_single_object_needs_a_score_above_the_threshold_and_ignores_others() -> None:
    prompt = tasks.single_object("cup")
    assert right(prompt, {"cup": [thing(9, 9, 0.31)], "dog": [thing(5, 5)]})
    assert not right(prompt, {"cup": [thing(9, 9, 0.3)]})
    assert not right(prompt, {"dog": [thing(9, 9)]})
    assert not right(prompt, {})


def test_counting_is_strict_and_wants_a_higher_score() -> None:
    prompt = tasks.counting("cup", 2)
    assert right(prompt, {"cup": [thing(5, 5), thing(20, 20)]})
    assert not right(prompt, {"cup": [thing(5, 5)]})
    assert not right(prompt, {"cup": [thing(5, 5), thing(20, 20), thing(25, 5)]})
    # The third is too unsure to count, and so is the second here.
    assert right(prompt, {"cup": [thing(5, 5), thing(20, 20), thing(25, 5, 0.9)]})
    assert not right(prompt, {"cup": [thing(5, 5), thing(20, 20, 0.9)]})
    correct, reason = score_image(prompt, {"cup": [thing(5, 5)] * 4})
    assert not correct
    assert reason == "expected cup<3, found 4"


def test_colour_is_asked_of_the_best_ones_only() -> None:
    prompt = tasks.colors("cup", "red")
    assert right(prompt, {"cup": [thing(5, 5, 0.9, "red"), thing(9, 9, 0.8, "blue")]})
    # The best cup is blue: the red one does not help.
    assert not right(prompt, {"cup": [thing(5, 5, 0.8, "red"), thing(9, 9, 0.9, "blue")]})


def test_attributes_must_not_be_swapped() -> None:
    prompt = tasks.color_attr("cup", "red", "tie", "blue")
    assert right(prompt, {"cup": [thing(5, 5)], "tie": [thing(9, 9, color="blue")]})
    assert not right(prompt, {"cup": [thing(5, 5, color="blue")], "tie": [thing(9, 9)]})


def test_position_is_of_the_named_one_to_the_other() -> None:
    prompt = tasks.position("cat", "left of", "dog")
    assert right(prompt, {"cat": [thing(5, 20)], "dog": [thing(30, 20)]})
    assert not right(prompt, {"cat": [thing(30, 20)], "dog": [thing(5, 20)]})
    assert not right(prompt, {"cat": [thing(20, 5)], "dog": [thing(20, 30)]})
    correct, reason = score_image(prompt, {"cat": [thing(5, 20)]})
    assert not correct
    assert "no target for cat to be left of" in reason


def test_position_is_checked_only_where_colour_passed() -> None:
    prompt = tasks.position("cat", "left of", "dog")
    prompt["include"][1]["color"] = "red"
    wrong = {"cat": [thing(30, 20, color="blue")], "dog": [thing(5, 20)]}
    assert score_image(prompt, wrong)[1] == "expected red cat>=1, found 0 (blue)"


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ((0, 40), {"left of"}),
        ((80, 40), {"right of"}),
        ((40, 0), {"above"}),
        ((40, 80), {"below"}),
        ((0, 0), {"left of", "above"}),
        ((80, 80), {"right of", "below"}),
        ((40, 40), set()),
        # Less than a tenth of the summed sizes away: nowhere.
        ((41, 40), set()),
        # dx = −(20 − 2)/√(20² + 40²) = −0.40: only above.
        ((20, 0), {"above"}),
    ],
)
def test_relations(a: tuple[float, float], expected: set[str]) -> None:
    assert relative_position(thing(*a), thing(40, 40)) == expected


coordinates = st.floats(0, 64)
boxes = st.tuples(coordinates, coordinates, st.floats(1, 20)).map(
    lambda v: thing(v[0], v[1], side=v[2])
)


@given(boxes, boxes)
def test_relations_are_opposite_the_other_way_round(a: list, b: list) -> None:
    assert {tasks.OPPOSITE[r] for r in relative_position(a, b)} == relative_position(b, a)


@given(boxes, boxes, coordinates, coordinates)
def test_relations_do_not_depend_on_the_place(a: list, b: list, dx: float, dy: float) -> None:
    # Whole pixels, so that moving is exact and no borderline flips.
    a, b = ([round(v) for v in box[:4]] for box in (a, b))
    dx, dy = round(dx), round(dy)
    moved = [[box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy] for box in (a, b)]
    assert relative_position(a, b) == relative_position(*moved)


def test_sixteen_a_class_best_first() -> None:
    items = [thing(5, 5, 0.5 + i / 100) for i in range(20)]
    kept = found({"tag": "colors"}, {"cup": items})["cup"]
    assert len(kept) == 16
    assert [item[4] for item in kept] == sorted((i[4] for i in items), reverse=True)[:16]


def test_of_equal_scores_the_later_box_comes_first() -> None:
    prompt = tasks.colors("cup", "red")
    red, blue = thing(5, 5, color="red"), thing(50, 5, color="blue")
    assert red[4] == blue[4]
    assert right(prompt, {"cup": [blue, red]}) and not right(prompt, {"cup": [red, blue]})


def test_clauses_say_what_is_met() -> None:
    prompt = tasks.two_object("cup", "tie")
    assert [met for met, _ in clauses(prompt, {"tie": [thing(5, 5)]})] == [False, True]


def write_folder(folder: Path, prompts: list[dict], images: int = 2) -> None:
    for index, metadata in enumerate(prompts):
        samples = write_prompt(folder, index, metadata)
        for i in range(images):
            Image.new("RGB", (64, 64), (128, 128, 128)).save(samples / f"{i:04d}.png")


def write_detections(path: Path, found: dict[str, Any]) -> None:
    lines = [json.dumps({"filename": name, "detections": d}) for name, d in found.items()]
    path.write_text("\n".join(lines) + "\n")


def test_detections_made_elsewhere_score_any_world(tmp_path: Path) -> None:
    prompts = [tasks.single_object(n) for n in ("cup", "tie", "dog")] + [
        tasks.colors("cup", c) for c in ("red", "blue")
    ]
    write_folder(tmp_path / "out", prompts)
    everything = {"cup": [thing(5, 5)], "tie": [thing(40, 40)]}
    files = [s.filename for s in read_folder(tmp_path / "out")]
    assert files[:2] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    write_detections(tmp_path / "d.jsonl", dict.fromkeys(files, everything))
    result, scored = score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    assert result["tasks"] == {"single_object": pytest.approx(2 / 3, abs=1e-4), "colors": 0.5}
    assert result["overall"] == pytest.approx(7 / 12, abs=1e-4)
    assert result["n"] == 10
    # Each picture under the other prompts of its task: cups and ties are in every picture.
    assert result["chance_tasks"]["single_object"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["chance_tasks"]["colors"] == 0.5
    assert result["difference"]["mean"] == pytest.approx(0, abs=1e-4)
    line = scored[0].line()
    assert set(line) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert json.loads(line["metadata"]) == prompts[0]


def test_bad_folders_and_detections_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No folder"):
        read_folder(tmp_path / "nowhere")
    write_folder(tmp_path / "out", [tasks.single_object("cup")])
    with pytest.raises(UserError, match="does not know cup"):
        score_folder(tmp_path / "out", SETTINGS, None)
    (tmp_path / "d.jsonl").write_text('{"filename": "00000/samples/0000.png", "detections": {}}\n')
    with pytest.raises(UserError, match=r"no line for 00000/samples/0001\.png"):
        score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="line 1 is no line of detections"):
        score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    write_detections(
        tmp_path / "d.jsonl", {"00000/samples/0000.png": {"cup": [[0, 0, 9, 9, 7, "red"]]}}
    )
    with pytest.raises(UserError, match="line 1 is no line of detections"):
        score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    sample = read_folder(tmp_path / "out")[0]
    sample.path.write_bytes(sample.path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        sample.open()
    (tmp_path / "out/00000/metadata.jsonl").write_text('{"tag": "colors"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl is no line"):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize(("name", "other"), [("computer mouse", "mouse"),
                                            ("dining table", "DiningTable")])  # fmt: skip
def test_classes_under_other_names_are_refused(tmp_path: Path, name: str, other: str) -> None:
    write_folder(tmp_path / "out", [tasks.single_object(name)], 2)
    first, second = (s.filename for s in read_folder(tmp_path / "out"))
    box = [1, 1, 9, 9, 0.9, ""]
    write_detections(tmp_path / "d.jsonl", {first: {other: [box]}, second: {}})
    with pytest.raises(UserError, match=f"has no '{name}', which prompts ask for, but '{other}'"):
        score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    # Another of COCO's classes is no other name.
    write_detections(tmp_path / "d.jsonl", {first: {"tv": [box], name: []}, second: {"tv": [box]}})
    result, _ = score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    assert result["overall"] == 0


def test_what_a_whole_run_would_not_lack_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", [tasks.single_object(x) for x in ("cup", "tie", "bed")], 2)
    assert gaps(read_folder(tmp_path / "out")) == []
    shutil.rmtree(tmp_path / "out/00001")
    (tmp_path / "out/00002/samples/0001.png").unlink()
    said = gaps(read_folder(tmp_path / "out"))
    assert "1 folders are missing (00001)" in said[0]
    assert "1 prompts have fewer than 2 pictures (00002)" in said[1]


def test_a_colour_that_is_asked_for_must_be_in_the_detections(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", [tasks.colors("cup", "red"), tasks.single_object("cup")], 1)
    plain = {"cup": [[1, 1, 9, 9, 0.9]]}
    files = [s.filename for s in read_folder(tmp_path / "out")]
    write_detections(tmp_path / "d.jsonl", {files[0]: {}, files[1]: plain})
    _, scored = score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")
    assert [s.correct for s in scored] == [False, True]
    write_detections(tmp_path / "d.jsonl", dict.fromkeys(files, plain))
    with pytest.raises(UserError, match="no colour for a cup in 00000"):
        score_folder(tmp_path / "out", SETTINGS, None, detections=tmp_path / "d.jsonl")


def test_spread_is_the_unweighted_mean_of_tasks() -> None:
    # Task a has many pictures, task b few: both count alike.
    values, names = [1.0] * 30 + [0.0] * 2, ["a"] * 30 + ["b"] * 2
    prompts = [str(i) for i in range(32)]
    (result,) = spreads([values], names, prompts, 100, 0)
    assert result.mean == 0.5
    assert result.stderr == 0
    assert (result.low, result.high) == (0.5, 0.5)


def test_standard_error_is_clustered_by_prompt() -> None:
    rng = np.random.default_rng(1)
    n, k = 100, 8
    by_prompt = (rng.random(n) < 0.5).astype(float)
    values, prompts = np.repeat(by_prompt, k), np.repeat(np.arange(n), k).astype(str)
    (result,) = spreads([list(values)], ["t"] * n * k, list(prompts), 2000, 0)
    # All pictures of a prompt agree, so there are only n observations.
    assert result.stderr == pytest.approx(by_prompt.std() / n**0.5, rel=0.1)
    (apart,) = spreads([list(values)], ["t"] * n * k, [str(i) for i in range(n * k)], 2000, 0)
    assert apart.stderr == pytest.approx(result.stderr / k**0.5, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("ab"), st.integers(0, 5)), min_size=1))
def test_interval_lies_within_the_values(rows: list[tuple[float, str, int]]) -> None:
    values, names = [r[0] for r in rows], [r[1] for r in rows]
    (result,) = spreads([values], names, [f"{r[1]}{r[2]}" for r in rows], 50, 0)
    assert min(values) - 1e-9 <= result.low <= result.high <= max(values) + 1e-9
