"""How runs look in MLflow: their names and notes, and views of the runs table and of the charts.

MLflow keeps a saved view as a tag of the experiment, `mlflow.sharedViewState.KEY`, in JSON that
only its own page reads. What is written here is for MLflow 3.17 and was looked at in a browser.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.files import hash_of

FAMILY = "djepa-"  # an experiment's name is this and its family
CHARTS, TABLE = "CHART", "TABLE"  # MLflow's names of the two ways to see a view

# The columns of the table and their widths in pixels, so that all of a name can be read.
COLUMNS = {
    "metrics.`geneval.overall`": 130,
    "metrics.`geneval.stderr`": 125,
    "metrics.`geneval.chance`": 130,
    "metrics.`geneval.all.overall`": 150,
    "metrics.`win_rate`": 90,
    "metrics.`images`": 80,
    "tags.`group`": 110,
    "tags.`seed`": 70,
    "tags.`scale`": 90,
    "tags.`git.commit`": 110,
}
# Pipelines and groups of an ablation, not what is above them or below.
COMPARED = "tags.kind != 'stage' AND tags.kind != 'ablation'"
TRAINED = "tags.kind = 'stage' AND tags.stage LIKE 'phase%'"
Sections = Mapping[str, Sequence[tuple[str, ...]]]  # charts: LINE or BAR, then metrics
SCORES: Sections = {
    "Scores by images seen": [
        ("LINE", "by_images/geneval.overall"),
        ("LINE", "by_images/geneval.all.overall"),
    ],
    "At the end, chance below": [
        ("BAR", "geneval.overall", "geneval.chance"),
        ("BAR", "geneval.all.overall", "geneval.all.chance"),
        ("BAR", "win_rate"),
    ],
}
LOSSES: Sections = {
    "Losses by images seen": [
        ("LINE", "by_images/train/loss"),
        ("LINE", "by_images/validation/flow"),
        ("LINE", "by_images/train/flow"),
        ("LINE", "by_images/validation/jepa"),
    ],
}


def run_name(params: Mapping[str, Any]) -> str:
    """What the parent run of a pipeline is called: `demo seed 0`, of a group `demo C seed 0`."""
    group = "" if params["ablation"] == "none" else f" {params['ablation']}"
    return f"{params['scale']}{group} seed {params['seed']}"


def group_tags(params: Mapping[str, Any], commit: str, data: str) -> dict[str, str]:
    """Tags that runs share which differ by their seed alone: what they are called, and a hash."""
    same = {name: value for name, value in params.items() if name != "seed"}
    name = params["scale"] if params["ablation"] == "none" else params["ablation"]
    return {"group": str(name), "group.hash": hash_of([same, commit, data])}


def experiment_note(family: str) -> str:
    """What the page of a family's experiment says above its runs, in Markdown."""
    return f"""\
**Family `{family}`: runs of the pipeline to compare with one another.** How to read them:

- A row is a run of the pipeline (`demo seed 0`) or one group and seed of an ablation (`C seed 0`).
  Below it are the stages that ran for it; the tags `child.STAGE` name those that had run before.
- Runs of one `group` differ by their seed alone. Digits after its name (`C 1f3c`) tell apart what
  differs in other parameters, in code or in raw pictures.
- `geneval.overall`: share of pictures right by GenEval's rules, mean of six tasks, on combinations
  held out of training. `geneval.stderr`: its standard error over prompts. `geneval.chance`: the
  same pictures under other prompts; a score as low as this shows nothing.
  `geneval.all.overall`: held-out and seen combinations.
- On the embedded world of simple shapes **this is not GenEval of real pictures**: its scores
  compare with one another only.
- Metrics below `by_images/` have the number of images seen as their step, so that runs with
  different batch sizes compare.
- The menu at the top right has views: *Mean over seeds*, *One row a run*, *Losses*.
  `djepa compare --family {family}` writes table and plots for a paper.
"""


def pipeline_note(params: Mapping[str, Any]) -> str:
    """What the parent run of a pipeline says of itself, in Markdown."""
    return (
        f"The pipeline at scale {params['scale']}, ablation {params['ablation']}, seed "
        f"{params['seed']}: `dvc repro` at the tag `git.commit`, with this run's parameters. Its "
        "stages are the runs below; the tags `child.STAGE` name those too that had run before."
    )


def stage_note(name: str, desc: str) -> str:
    """What a stage's run says of itself, in Markdown.

    Args:
        name: as `dvc repro` takes it, e.g. evaluate-phase1.
        desc: what dvc.yaml says of it; may be empty.
    """
    said = f"{desc}. " if desc else ""
    return (
        f"{said}What it read and made is the entry `{name}` of dvc.lock. "
        f"`dvc repro {name}` does it again where something before it changed."
    )


def _chart(key: str, section: str, kind: str, *metrics: str) -> dict[str, Any]:
    chart = {
        "uuid": key,
        "type": kind,
        "metricSectionId": section,
        "metricKey": metrics[0],
        "selectedMetricKeys": metrics,
        "deleted": False,
        "isGenerated": False,
    }
    if kind == "LINE":
        chart |= {
            "xAxisKey": "step",
            "useGlobalXaxisKey": False,
            "useGlobalLineSmoothing": False,
            "lineSmoothness": 0,
            "scaleType": "linear",
            "xAxisScaleType": "linear",
            "range": {},
            "yAxisKey": "metric",
            "yAxisExpressions": [],
        }
    return chart


def _state(search: str, sections: Sections, groups: Sequence[str]) -> dict[str, Any]:
    """A view as MLflow's page keeps it; runs are averaged over all but the tags in `groups`."""
    charts = [
        _chart(f"{name}-{number}", name, *chart)
        for name, of_it in sections.items()
        for number, chart in enumerate(of_it)
    ]
    shown = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 2}
        for name in sections
    ]
    kinds = [{"mode": "tag", "groupByData": tag} for tag in groups]
    return {
        "searchFilter": search,
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": shown,
        "isAccordionReordered": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": kinds} if groups else None,
    }


VIEWS = {
    "groups": ("Mean over seeds", CHARTS, _state(COMPARED, SCORES, ["group"])),
    "runs": ("One row a run", TABLE, _state(COMPARED, SCORES, [])),
    "losses": ("Losses", CHARTS, _state(TRAINED, LOSSES, ["group", "stage"])),
}


def describe_experiment(client: Any, experiment_id: str, family: str) -> None:
    """Give an experiment its note and views; what it has already is not written again.

    Args:
        client: an MLflow client.
        experiment_id: MLflow's.
        family: as in `djepa-FAMILY`.
    """
    experiment = client.get_experiment(experiment_id)
    tags = {
        "mlflow.note.content": experiment_note(family),
        # Else its page is one about traces of language models.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "geneval.overall",
    }
    made = experiment.creation_time
    for key, (name, _, state) in VIEWS.items():
        view = {"name": name, "createdAt": made, "updatedAt": made, "state": json.dumps(state)}
        tags[f"mlflow.sharedViewState.{key}"] = json.dumps(view)
    for name, value in tags.items():
        if experiment.tags.get(name) != value:
            client.set_experiment_tag(experiment_id, name, value)


def view_page(experiment_id: str, view: str) -> str:
    """Where a view is, below the address of all experiments."""
    mode = VIEWS[view][1]
    return (
        f"{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={view}&compareRunsMode={mode}"
    )
