"""The paper's Table 4: what its groups change, the table's statistics, and the flow for real."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from components.compose import _composed, composed
from components.errors import UserError
from components.evaluation.ablation import (
    COMPARED,
    EFFECTS,
    GROUPS,
    Result,
    mean_of,
    path,
    pictures_needed,
    power,
    seeds_needed,
    summary,
)
from components.evaluation.ablation_report import plot, write_ablation
from components.limits import numbers
from flows.ablation import _jobs
from flows.experiments import _copy_of
from tests.conftest import ROOT, Checkout
from tests.test_graph import copy, runs


@cache
def of_group(name: str, scale: str = "ablation") -> dict[str, Any]:
    """Parameters of a group; what limits.py says of labels is tested where they are built."""
    return yaml.safe_load(_composed(ROOT / "params", [f"scale={scale}", f"ablation={name}"]))


@pytest.mark.parametrize(("name", "scale"), [*((g, "ablation") for g in GROUPS), ("G", "micro")])
def test_phases_of_a_group_train_alike(name: str, scale: str) -> None:
    params = of_group(name, scale)
    assert params["training"]["phase2"] == params["training"]["phase1"]
    assert params["ablation"] == name
    assert not any("phase2" in line for line in params["feedback"]["rounds"].values())


def test_groups_differ_from_none_in_their_feedback_alone() -> None:
    plain = numbers(of_group("none"))
    for name in GROUPS:
        other = numbers(of_group(name))
        changed = {key for key in plain | other if plain.get(key) != other.get(key)}
        allowed = ("feedback.sampling", "feedback.critic", "feedback.rounds.", "training.phase2.")
        allowed += ("ablation",) + (("evaluation.baseline",) if name in COMPARED else ())
        assert all(key.startswith(allowed) for key in changed), changed


def shared(name: str, group: str) -> dict[str, Any]:
    """What the stages up to the end of `name` depend on, in the parameters of `group`."""
    params = of_group(group)
    rounds = list(params["feedback"]["rounds"].items())[: GROUPS[name].phases - 1]
    flat = numbers(params)
    ours = {"ablation", "evaluation.baseline"}
    if name in "AC":  # phase 1 knows no critic; dvc.yaml does not list it there
        ours.add("feedback.critic")
    kept = {k: v for k, v in flat.items() if k not in ours and "feedback.rounds." not in k}
    return kept | {f"round {key}": line for key, line in rounds}


@pytest.mark.parametrize("name", [name for name in GROUPS if GROUPS[name].follows])
def test_a_group_begins_as_the_one_it_goes_on_from(name: str) -> None:
    before = str(GROUPS[name].follows)
    assert shared(before, before) == shared(before, name)


def test_first_phases_do_not_depend_on_the_critic() -> None:
    """Else D and F would each train C's phase again."""
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["phase1"]
    assert not {"feedback", "feedback.critic", "feedback.rounds", "ablation"} & set(stage["params"])


def test_groups_are_the_papers() -> None:
    sampling = {name: of_group(name)["feedback"]["sampling"] for name in GROUPS}
    assert {name for name in GROUPS if sampling[name] == "uniform"} == {"A", "B"}
    critic = {name: of_group(name)["feedback"]["critic"] for name in GROUPS}
    assert {name for name in GROUPS if critic[name] == "resnet18"} == {"F", "G", "H", "I"}
    last = {name: of_group(name)["feedback"]["rounds"].get("r3") for name in GROUPS}
    assert last["H"] == {"model": "r2", "critic": "r2", "labels": "auto"}
    assert last["I"] == {"model": "r2", "critic": "r2", "labels": "simulated"}
    assert of_group("G")["feedback"]["rounds"]["r2"]["critic"] == "r1"
    assert [of_group(name)["evaluation"]["baseline"] for name in COMPARED] == ["r2", "r2"]
    assert path("H") == ["C", "F", "G", "H"]


def test_the_scale_is_an_ordinary_one() -> None:
    params = composed(["scale=ablation", "ablation=C"])
    assert params["scale"] == "ablation"
    assert params["data"] == composed(["scale=demo"])["data"], "else other pictures are drawn"
    assert params["training"]["phase1"]["images"] == params["training"]["phase2"]["images"]


def test_jobs_add_what_a_group_goes_on_from() -> None:
    assert _jobs(["G"], 2, 1) == [(seed, name) for seed in (0, 1) for name in "CFG"]
    with pytest.raises(UserError, match="Q"):
        _jobs(["A", "Q"], 1, 1)


# The statistics.


def test_the_copy_of_a_killed_experiment_goes_whatever_the_others_notes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", '{"name": '), ("b", '{"name": "mine", "root_dir": "gone"}')):
        note = tmp_path / ".dvc/tmp/exps/run" / name / f"{name}.run"
        note.parent.mkdir(parents=True)
        note.write_text(text)
    (tmp_path / "gone").mkdir()
    with _copy_of("mine"):
        pass
    assert not (tmp_path / "gone").exists()


def test_power_and_sample_size_of_the_paired_t_test_are_the_known_ones() -> None:
    # Cohen 1988 and every package: d = 0.5 needs 34 pairs, d = 1 ten, d = 0.2 199.
    assert [seeds_needed(0.05 / d) for d in (0.5, 1.0, 0.2)] == [34, 10, 199]
    assert power(34, 0.5) == pytest.approx(0.8078, abs=1e-3)


def test_sample_size_agrees_with_drawn_experiments() -> None:
    rng, deviation = np.random.default_rng(0), 0.06
    n = seeds_needed(deviation)
    drawn = rng.normal(0.05, deviation, (4000, n))
    seen = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
    assert 0.78 < seen.mean() < 0.86


def test_pictures_grow_with_the_error_squared() -> None:
    z = 1.959964 + 0.841621
    assert pictures_needed(0.03, 300) == math.ceil(300 * 2 * (z * 0.03 / 0.05) ** 2)
    assert pictures_needed(0.06, 300) == pytest.approx(4 * pictures_needed(0.03, 300), abs=4)


def test_interval_over_seeds_is_students() -> None:
    values = [0.1, 0.2, 0.4]
    found = mean_of(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert mean_of([0.3]) == {"mean": 0.3, "stderr": None, "low": None, "high": None}


def made_up(seeds: int, effect: float = 0.1, noise: float = 0.02) -> list[Result]:
    """A world where each group gains `effect` over its partner, seeds shifting all groups alike."""
    rng = np.random.default_rng(1)
    level = {"A": 0.1, "B": 0.2, "C": 0.1 + effect, "D": 0.2 + effect, "E": 0.4, "F": 0.4}
    level |= {"G": 0.5, "H": 0.55, "I": 0.6}
    results = []
    for seed in range(seeds):
        shift = rng.normal(0, 0.2)
        for name, mean in level.items():
            score = mean + shift + rng.normal(0, noise)
            win = {"win_rate": 0.5 + score / 10, "low": 0.4, "high": 0.7}
            images, won = 1000 * GROUPS[name].phases, win if name in COMPARED else None
            over = (score, 0.01, 0.03, 300, score, 0.01, 0.02, 600)
            results.append(Result(name, seed, images, *over, won))
    return results


def test_differences_are_paired_by_seed() -> None:
    found = summary(made_up(8))
    assert [e["pair"] for e in found["effects"]] == [f"{a} − {b}" for a, b, _ in EFFECTS]
    sas = found["effects"][0]
    assert sas["score"]["mean"] == pytest.approx(0.1, abs=0.03)
    # The seeds' own spread, ten times as large, is not in the difference.
    assert sas["score"]["stderr"] < 0.02 < found["groups"]["C"]["score"]["stderr"]
    assert sas["score"]["low"] < 0.1 < sas["score"]["high"]
    assert found["effects"][-1]["win_rate"]["mean"] > 0
    size = found["sample_size"]["score"]
    assert size["degrees_of_freedom"] == 7 * len(EFFECTS)
    assert size["deviation"] == pytest.approx(0.02 * math.sqrt(2), rel=0.3)
    assert size["seeds_low"] <= size["seeds"] <= size["seeds_high"]


def test_only_seeds_that_both_groups_have_are_compared() -> None:
    some = [r for r in made_up(3) if not (r.group == "D" and r.seed == 1)]
    found = summary(some)
    assert next(e for e in found["effects"] if e["pair"] == "D − B")["seeds"] == [0, 2]
    assert found["groups"]["B"]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("kept", ["A", "C", "ABC", "ABCDEFG", "ABCDEFGHI"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_page_plot_and_json_of_any_part_of_the_table(kept: str, seeds: int, tmp_path: Path) -> None:
    results = [r for r in made_up(seeds) if r.group in kept]
    page = write_ablation(results, tmp_path, {"scale": "micro", "seeds": seeds})
    assert (tmp_path / "ablation.md").read_text() == page
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    assert [row for row in rows if row in GROUPS and row] == list(kept)
    assert "*paper*" in page
    assert ("*0.38*" in page) == ("A" in kept)
    assert ("An effect of 0.05 would be visible" in page) == (seeds > 1 and len(kept) > 1)
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.size[0] > 500
    read = json.loads((tmp_path / "ablation.json").read_text())
    assert len(read["results"]) == len(results)
    assert read["about"]["scale"] == "micro"


def test_no_point_of_the_plot_is_cut_off() -> None:
    # The highest point is of the last line and on the right alone.
    results = [replace(r, all_score=0.97) if r.group == "I" else r for r in made_up(3)]
    figure = plot(summary(results))
    for axes in figure.axes:
        low, high = axes.get_ylim()
        values = [y for line in axes.get_lines() for y in line.get_ydata() if y == y]
        assert low == 0 and max(values) <= high
    assert max(values) == pytest.approx(0.97)
    plt.close(figure)


def test_scores_all_alike_tell_no_sample_size(tmp_path: Path) -> None:
    same = [replace(r, score=0.0, all_score=0.0) for r in made_up(3)]
    assert summary(same)["sample_size"] == {"score": None, "all": None}
    assert "would be visible" not in write_ablation(same, tmp_path, {})


# The flow.

# Enough pictures for statistics to discard some: with fewer, C trains on the very pictures of A,
# their models are the same bytes, and whichever is evaluated first serves both.
IMAGES = 256
TINY = ("training.workers=1", "training.grids=0", f"training.phase1.images={IMAGES}",
        "evaluation.pictures=1", "evaluation.grid.prompts=4")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two minutes on two idle cores, and the fixture
def test_flow_shares_prefixes_tracks_a_tree_and_writes_the_table(
    micro: Checkout, tmp_path: Path
) -> None:
    checkout = copy(micro, tmp_path / "ablation")
    checkout.ok("git", "add", "-A")
    checkout.ok("git", "commit", "-qm", "micro")
    command = (sys.executable, "-m", "flows.ablation", "--seeds", "1", "--groups", "B,F",
               "--scale", "micro", *TINY)  # fmt: skip
    before = checkout.ok("git", "status", "--porcelain")
    page = checkout.ok(*command)
    for row in ("| A |", "| B |", "| C |", "| F |", "| C − A |"):
        assert row in page

    frame = runs(checkout)
    by_id = frame.set_index("run_uuid")["name"].to_dict()
    top = [run for run, name in by_id.items() if name == "Table 4 at scale micro"]
    groups = frame[frame["kind"] == "ablation group"]
    assert len(top) == 1 and set(groups["mlflow.parentRunId"]) == set(top)
    above = frame["mlflow.parentRunId"].isin([*top, *groups["run_uuid"]])
    stages = frame[(frame["kind"] == "stage") & above]
    ran = Counter(
        (by_id[p], s) for p, s in zip(stages["mlflow.parentRunId"], stages["stage"], strict=True)
    )
    second = {"references@r1", "critic@r1", "phase2@r1", "evaluate@r1"}
    assert ran == Counter(
        # The pictures were curated before; phase 2 has fewer sizes to encode for.
        [("Table 4 at scale micro", "encode")]
        + [(f"{g} seed 0", s) for g in "AC" for s in ("phase1", "evaluate@phase1")]
        # B and F took phase 1 from the run cache.
        + [(f"{g} seed 0", s) for g in "BF" for s in second]
    )
    assert sorted(zip(groups["ablation"], groups["seed"], strict=True)) == [
        (g, "0") for g in "ABCF"
    ]
    assert set(frame["status"]) == {"FINISHED"}
    of_a, of_b = (groups[groups["ablation"] == g].iloc[0] for g in "AB")
    assert of_a["child.phase1"] == of_b["child.phase1"]

    found = json.loads((checkout.root / "reports/ablation/ablation.json").read_text())
    assert [r["group"] for r in found["results"]] == ["A", "B", "C", "F"]
    seen = {r["group"]: r["images"] for r in found["results"]}
    assert seen["B"] >= 2 * IMAGES > seen["A"] >= IMAGES
    # The workspace is as it was, and nothing runs a second time.
    assert checkout.ok("git", "status", "--porcelain") == before
    assert not list((checkout.root / ".dvc/tmp/exps/standalone").glob("tmp*"))
    assert checkout.ok(*command) == page
    assert len(runs(checkout)) == len(frame)


def test_wrong_groups_and_other_pictures_are_one_sentence(checkout: Checkout) -> None:
    for arguments, said in (
        (("--groups", "A,Q"), "no group Q"),
        (("--scale", "micro"), "djepa compose scale=micro"),
        (("--seeds", "0"), "from 1 on"),
    ):
        answer = checkout.call(sys.executable, "-m", "flows.ablation", *arguments)
        assert answer.returncode == 2, answer.stderr
        assert said in answer.stderr
        assert answer.stderr.count("\n") == 1, "one sentence, before Prefect starts"
