"""A user's own filter: one file and one line of params, and a sentence for each mistake in them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from components.curation.aesthetic import Aesthetic
from components.curation.detectors import Faces, Nsfw, Text, model_filters
from components.curation.filters import Filter, Picture, cheap_filters
from components.curation.own import TAKEN, checked_score, checked_setup, own_files, own_filters
from components.curation.shards import write_shard
from components.errors import UserError
from tests.conftest import ROOT
from tests.test_curation import members, scene, sound

EXAMPLE = ROOT / "docs" / "own_filter.py"
HEAD = "import numpy as np\nfrom components.curation.filters import Filter, Measure\n"
ONE = HEAD + "class Mine(Filter):\n    def score(self, batch):\n        return {}\n"


def picture(level: int) -> Picture:
    return Picture("000000000", np.full((32, 48, 3), level, np.uint8), "a ring", {})


def written(folder: Path, text: str, **changes: Any) -> dict[str, Any]:
    """`params.curation.own` with one filter, mine, of this text."""
    (folder / "mine.py").write_text(text)
    return {"mine": {"file": str(folder / "mine.py"), "threshold": 1.0} | changes}


def refused(own: Mapping[str, Any], *words: str) -> None:
    with pytest.raises(UserError) as error:
        own_filters(own)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    for word in words:
        assert word in str(error.value), error.value


def test_the_example_is_a_filter() -> None:
    own = {"brightness": {"file": str(EXAMPLE), "threshold": 40.0}}
    assert own_files(own) == [EXAMPLE]
    (stage,) = own_filters(own)
    assert (stage.name, stage.threshold, stage.keep_high, stage.dear) == (
        "brightness",
        40.0,
        True,
        False,
    )
    checked_setup(stage)
    scores = checked_score(stage, [picture(10), picture(40), picture(200)])
    assert scores.tolist() == [10, 40, 200] and scores.dtype == np.float64
    assert stage.keeps(scores).tolist() == [False, True, True]
    said = stage.reason.format(score=scores[0], threshold=stage.threshold)
    assert said == "mean brightness 10, at least 40 wanted"
    assert len(EXAMPLE.read_text().splitlines()) <= 25


def test_paths_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, ONE.format("[1.0] * len(batch)"))
    monkeypatch.chdir(tmp_path)
    (stage,) = own_filters({"mine": {"file": "mine.py", "threshold": 2}})
    assert checked_score(stage, [picture(0)]).tolist() == [1.0]
    assert own_files({"mine": {"file": "mine.py", "threshold": 2}}) == [Path("mine.py")]


def test_further_keys_go_to_the_filter_and_a_reason_is_made_up(tmp_path: Path) -> None:
    text = (
        HEAD + "class Mine(Filter):\n    dear = True\n"
        "    def __init__(self, threshold, channel):\n"
        "        super().__init__(threshold)\n        self.channel = channel\n"
        "    def score(self, batch):\n"
        "        return np.array([p.pixels[..., self.channel].mean() for p in batch])\n"
    )
    (stage,) = own_filters(written(tmp_path, text, channel=2))
    assert stage.dear and checked_score(stage, [picture(7)]).tolist() == [7]
    assert stage.reason.format(score=7.0, threshold=1.0) == "mine 7, at most 1 wanted"
    refused(written(tmp_path, text), "mine.py", "Mine(threshold", "channel")
    refused(written(tmp_path, text, channel=2, radius=3), "Mine(threshold", "radius")


def test_two_lines_may_share_a_file(tmp_path: Path) -> None:
    line = {"file": str(EXAMPLE), "threshold": 40.0}
    dark, black = own_filters({"dark": line, "black": line | {"threshold": 5.0}})
    assert (dark.name, black.name, black.threshold) == ("dark", "black", 5.0)


def test_names_of_what_is_there_are_taken() -> None:
    curation = yaml.safe_load((ROOT / "params/curation/default.yaml").read_text())
    assert curation["own"] == {} and own_filters(curation["own"]) == []
    built_in = [*cheap_filters(curation), *model_filters(curation)]
    assert {stage.name for stage in built_in} | {Aesthetic.name} <= set(TAKEN)
    for name in ("sharpness", "near_duplicate"):
        refused({name: {"file": str(EXAMPLE), "threshold": 1.0}}, f"curation.own.{name}", "another")
    refused({"two words": {"file": str(EXAMPLE), "threshold": 1.0}}, "two words", "underscores")


def test_filters_that_run_a_model_are_dear() -> None:
    assert all(kind.dear for kind in (Faces, Text, Nsfw, Aesthetic)) and not Filter.dear


@pytest.mark.parametrize("threshold", ["forty", None, True, float("nan")])
def test_a_threshold_that_is_no_number_is_refused(threshold: object) -> None:
    own = {"mine": {"file": str(EXAMPLE), "threshold": threshold}}
    refused(own, "curation.own.mine.threshold", repr(threshold))


def test_lines_and_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    refused({"mine": str(EXAMPLE)}, "curation.own.mine", "a file and a threshold")
    refused({"mine": {"file": str(EXAMPLE)}}, "curation.own.mine", "threshold")
    own = {"mine": {"file": str(tmp_path / "gone.py"), "threshold": 1}}
    refused(own, "curation.own.mine.file", "gone.py")
    with pytest.raises(UserError, match=r"gone\.py"):
        own_files(own)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD, ("mine.py", "0 filters", "none", "exactly one")),
        (ONE.format("0") + ONE.format("0").replace("Mine", "Other"), ("2 filters", "Mine, Other")),
        (HEAD + "raise RuntimeError('no luck')\n", ("mine.py, line 3", "RuntimeError, no luck")),
        (HEAD + "class Mine(Filter\n", ("mine.py, line 3", "SyntaxError")),
        ("import nowhere_to_be_found\n", ("line 1", "nowhere_to_be_found")),
        ("from components.curation.filters import Filtre\n", ("line 1", "Filtre")),
        (HEAD + "class Mine(Filter):\n    pass\n", ("Mine(threshold", "score")),
        (ONE.format("0") + "    reason = '{mean} is low'\n", ("mine", "KeyError")),
    ],
)
def test_a_file_that_makes_no_filter_is_named(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    refused(written(tmp_path, text), *words)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[1.0]", ("shape (1,)", "2 pictures")),
        ("np.zeros((2, 1))", ("shape (2, 1)",)),
        ("['1', '2']", ("'mine'", "<U1 values")),
        ("None", ("object values",)),
        ("[float('inf'), 0]", ("infinite",)),
        ("[1, [2]]", ("ValueError", "score()")),
        ("1 / 0", ("mine.py, line 5", "ZeroDivisionError, division by zero")),
    ],
)
def test_wrong_scores_are_laid_at_the_files_door(
    tmp_path: Path, returned: str, words: tuple[str, ...]
) -> None:
    (stage,) = own_filters(written(tmp_path, ONE.format(returned)))
    with pytest.raises(UserError) as error:
        checked_score(stage, [picture(0), picture(1)])
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    for word in ("'mine'", "mine.py", *words):
        assert word in str(error.value), error.value


def test_a_failing_setup_is_laid_at_the_files_door(tmp_path: Path) -> None:
    text = ONE.format("0") + "    def setup(self):\n        open('/nowhere/weights')\n"
    (stage,) = own_filters(written(tmp_path, text))
    with pytest.raises(UserError, match=r"mine\.py, line 7 failed in setup\(\) \(FileNotFound"):
        checked_setup(stage)


def test_scores_that_were_not_looked_at_pass(tmp_path: Path) -> None:
    (stage,) = own_filters(written(tmp_path, ONE.format("[np.nan, 3]")))
    scores = checked_score(stage, [picture(0), picture(1)])
    assert np.isnan(scores[0]) and stage.keeps(scores).tolist() == [True, False]


def test_built_in_filters_answer_for_themselves() -> None:
    faces = Faces({"policy": "tag", "smallest": 0.2, "scale_factor": 1.2, "neighbours": 4})
    with pytest.raises(AttributeError):  # a bug of ours is not the user's fault
        checked_score(faces, [picture(0)])
    checked_setup(faces)
    assert checked_score(faces, [picture(0)]).tolist() == [0]


def test_one_line_on_the_command_line_runs_it_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    dark = members(scene(3)[0] // 4, "a dark picture")
    write_shard(tmp_path / "raw/a.tar", [("bright", sound(1)), ("dark", dark)])
    shutil.copy(EXAMPLE, tmp_path / "brightness.py")
    line = "+curation.own.brightness={file: brightness.py, threshold: 60}"
    small = ["curation.resolution.shorter_side=96", "curation.skip=[text,nsfw,faces,contrast]"]
    answer = subprocess.run(
        [sys.executable, "-m", "components.cli", "curate", "raw", "out", *small, line],
        cwd=tmp_path,  # no checkout
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    rejects = pd.read_parquet(tmp_path / "out/rejects.parquet")
    assert rejects[["key", "filter"]].to_numpy().tolist() == [["dark", "brightness"]]
    manifest = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert manifest["score_brightness"].item() > 60
    assert (tmp_path / "out/contract/index.html").is_file()
