"""Runs in a real MLflow (sqlite) beside one another: the table, the plots, the views."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.comparison.compare import MOST, tables_of, write_comparison
from components.comparison.parents import LOSSES, SCORES, Parent, read_parents
from components.comparison.rows import differing, rows_of
from components.errors import UserError
from components.headline import SHARED, compared_model, headline
from components.runs import client, experiment, open_run, runs_pages, with_group
from components.runs_view import COLUMNS, VIEWS, group_tags
from components.scenes.tasks import TASKS

COMMIT = {"git.commit": "0123456789abcdef", "data.hash": "fedcba98.dir", "scale": "micro"}
ABOUT = {"scale": "micro", "ablation": "none", "seed": 0, "depth": 4}
MEANS = {"A": 0.1, "C": 0.3}


def score_of(group: str, seed: int) -> float:
    return MEANS[group] + 0.01 * seed**2


def group_run(above: str, group: str, seed: int, status: str = "FINISHED") -> str:
    """A group's run as the ablation's flow leaves it, with a stage that trained it."""
    tags = {"kind": "ablation group", "ablation": group, "seed": str(seed)}
    run = open_run("test", f"{group} seed {seed}", tags, above)
    sampling = {"sampling": "uniform" if group == "A" else "statistical", "critic": "none"}
    run.log_params({"seed": seed, "ablation": group, "feedback": sampling, "depth": 4})
    run.set_tags(COMMIT)
    if status == "FINISHED":
        score = score_of(group, seed)
        figures = {"geneval.overall": score, "geneval.stderr": 0.02, "geneval.chance": 0.05}
        figures |= {f"geneval.tasks.{task}": score for task in TASKS}
        run.log_metrics({**figures, "images": 256 + seed})
        stage = open_run("test", "phase1", {"kind": "stage", "stage": "phase1"} | tags, run.run_id)
        for step in (1, 2):
            stage.log_metrics({"train/loss": 3.0 - step}, step=step, images=100 * step + seed)
        stage.log_metrics({"seconds": 90.0})
        stage.end("FINISHED")
        run.set_tags({"child.phase1": stage.run_id})
        run.log_metrics({"by_images/geneval.overall": score}, step=256)
        run.end(status)
    return run.run_id


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store with an ablation of two groups; gives its run's id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJEPA_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        top = open_run("test", "Table 4 at scale micro", {"kind": "ablation", "ablation.key": "k"})
        for seed in range(3):
            for group in MEANS:
                group_run(top.run_id, group, seed)
        group_run(top.run_id, "C", 3, "RUNNING")
        top.end("FINISHED")
        for name in ("twice", "twice"):
            twice = client().create_run(
                experiment(client(), "other"), run_name=name, tags={"kind": "pipeline"} | COMMIT
            )
            client().set_terminated(twice.info.run_id, "FINISHED")
        yield top.run_id


def test_an_ablation_is_its_groups_with_means_over_seeds(above: str, tmp_path: Path) -> None:
    parents = read_parents(client(), ["Table 4 at scale micro"], None)
    assert len(parents) == 7
    text = write_comparison(parents, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [
        (group, ["0", "1", "2"]) for group in MEANS
    ]
    for group, row in zip(MEANS, found["rows"], strict=True):
        scores = [score_of(group, seed) for seed in range(3)]
        overall = row["figures"]["geneval.overall"]
        assert overall["mean"] == pytest.approx(statistics.mean(scores))
        assert overall["stderr"] == pytest.approx(statistics.stdev(scores) / 3**0.5)
        assert f"{overall['mean']:.3f} ± {overall['stderr']:.3f} | 0.050" in text
        assert row["training_seconds"] == 90
    assert found["differ"] == {"feedback.sampling": ["uniform", "statistical"]}
    assert "parameters: feedback.sampling" in text and "depth" not in text
    assert "Not compared: C seed 3" in text and "is RUNNING." in text
    for plot in ("scores.png", "losses.png", "tasks.png"):
        with Image.open(tmp_path / plot) as picture:
            assert picture.size[0] > 400
        assert plot in (tmp_path / "compare.html").read_text()
    latex = (tmp_path / "compare.tex").read_text()
    assert r"single\_object" in latex and latex.count(r"\begin{tabular}") == 1


def test_losses_of_seeds_are_compared_where_all_have_some(above: str) -> None:
    rows, _ = rows_of(read_parents(client(), [above[:8]], None))
    points = rows[0].curve("by_images/train/loss")
    assert [x for x, _, _ in points] == [200.0], "the first seed's points that all have reached"
    assert points[0][1] == pytest.approx((1.0 + 1.01 + 1.02) / 3)
    assert points[0][2] > 0


def test_one_run_alone_has_its_error_over_prompts(above: str, tmp_path: Path) -> None:
    assert "| C seed 1 | 1 |" in write_comparison(
        read_parents(client(), ["test/C seed 1"], "test"), tmp_path
    )
    assert "0.310 ± 0.020" in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("names", "family", "said"),
    [
        (["nowhere"], None, r"no run 'nowhere' to compare: there are .*C seed 3"),
        (["twice"], None, r"2 runs are called 'twice': name one by the id .*other/twice \("),
        ([], "nobody", r"no family 'nobody' of runs: there are .*test"),
        (["twice"], "test", "no run 'twice'"),
    ],
)
def test_who_is_not_there_is_said_with_those_who_are(
    above: str, names: list[str], family: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_parents(client(), names, family)
    assert "\n" not in str(refused.value)


def test_runs_without_figures_are_named_and_not_compared(above: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"twice \(.*has no final figures"):
        write_comparison(read_parents(client(), [], "other"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_run_at_all_says_how_to_have_one(above: str) -> None:
    experiment(client(), "empty")
    with pytest.raises(UserError, match="no run 'A', and no other to compare: `dvc repro`"):
        read_parents(client(), ["A"], "empty")


def made_up(run: str, seed: int = 0, **params: Any) -> Parent:
    tags = COMMIT | {"seed": str(seed), "ablation": "none"}
    tags["group"] = group_tags(ABOUT | params, "commit", "data")["group.hash"]
    return Parent(run, f"micro seed {seed}", "micro", "FINISHED", tags,
                  {name: str(value) for name, value in params.items()} | {"seed": str(seed)},
                  {"geneval.overall": 0.2})  # fmt: skip


def test_what_differs_in_more_than_its_seed_is_a_row_of_its_own() -> None:
    rows, left = rows_of([made_up("a"), made_up("b", seed=1), made_up("c", depth=6)])
    assert [len(row.parents) for row in rows] == [2, 1] and not left
    assert [row.name for row in rows] == ["micro", "micro seed 0"]
    rows, left = rows_of([made_up("first"), made_up("again")])
    assert [parent.run for parent in rows[0].parents] == ["again"]
    assert "was run again" in left[0]


def test_runs_of_one_name_are_told_apart_by_their_group(above: str) -> None:
    rows, _ = rows_of([made_up("a"), made_up("b", depth=6)])
    assert len({row.name for row in rows}) == 2

    def tagged(**params: Any) -> str:
        """The group of a new run in MLflow."""
        tags = with_group(client(), "other", group_tags(ABOUT | params, "commit", "data"))
        open_run("other", "x", {"kind": "pipeline", **tags})
        return tags["group"]

    assert [tagged(), tagged(seed=7), tagged(ablation="C")] == ["micro", "micro", "C"]
    other = tagged(depth=6)
    assert other.startswith("micro ") and tagged(depth=6, seed=3) == other
    assert tagged(seed=8) == "micro"


def test_many_parameters_that_differ_are_a_table_of_their_own() -> None:
    few = {f"p{i}": i for i in range(MOST)}
    rows, _ = rows_of([made_up("a"), made_up("b", **few)])
    assert len(tables_of(rows, [])) == 1
    rows, _ = rows_of([made_up("a"), made_up("b", **few, one_more=1)])
    table = tables_of(rows, [])[1]
    assert [row[0] for row in table.sections[0].rows] == list(differing(rows))
    assert len(table.sections[0].rows) == MOST + 1


# What the parents have, and MLflow's page shows.


def parameters(ablation: str) -> dict[str, Any]:
    rounds = {"r1": {"model": "phase1"}, "r2": {"model": "r1"}}
    return {"ablation": ablation, "feedback": {"rounds": rounds}, "dpo": {"from": "r2"}}


def test_a_run_is_compared_by_its_last_model_and_a_group_by_its_own() -> None:
    scored = {"phase1", "r1", "r2"}
    assert compared_model(parameters("none"), scored | {"dpo"}) == "dpo"
    assert compared_model(parameters("none"), scored) == "r2"
    assert compared_model(parameters("C"), scored | {"dpo"}) == "phase1"
    assert compared_model(parameters("no_jepa"), set()) is None
    figures = {"evaluate/dpo/geneval.overall": 0.4, "evaluate/r2/geneval.overall": 0.3,
               "compare/dpo/win_rate": 0.6, "train/r2/images_total": 500.0}  # fmt: skip
    assert headline(figures, parameters("none")) == {
        "geneval.overall": 0.4,
        "win_rate": 0.6,
        "images": 500.0,
    }


def test_views_name_only_what_runs_have(above: str) -> None:
    shared = {*SHARED["evaluate"], *SHARED["compare"], "images"}
    told = {name.partition(".")[2].strip("`") for name in COLUMNS if name.startswith("metrics.")}
    assert told <= shared
    curves = {*SCORES, *LOSSES, "by_images/train/flow", "by_images/validation/jepa"}
    for _, _, state in VIEWS.values():
        charted = {m for chart in state["compareRunCharts"] for m in chart["selectedMetricKeys"]}
        assert charted <= shared | curves


def test_a_family_has_its_note_and_views(above: str) -> None:
    tags = client().get_experiment(experiment(client(), "test")).tags
    assert "Family `test`" in tags["mlflow.note.content"]
    for key, (name, _, state) in VIEWS.items():
        view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        assert view["name"] == name and json.loads(view["state"]) == json.loads(json.dumps(state))
    words = [said for said, _ in runs_pages(5000)]
    assert {f"test, {name.lower()}" for name, _, _ in VIEWS.values()} <= set(words)
