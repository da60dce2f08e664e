"""The figures that a run of the pipeline is compared by: those of one of its models.

They have the same names on every parent run in MLflow, whatever the model is called, so that one
column of the runs table, and one of `djepa compare`, holds them all.
"""

from collections.abc import Mapping
from typing import Any

from components.evaluation.ablation import GROUPS
from components.scenes.tasks import TASKS

SHARED = {
    "evaluate": (
        *(f"geneval.{figure}" for figure in ("overall", "stderr", "chance")),
        *(f"geneval.all.{figure}" for figure in ("overall", "stderr", "chance")),
        *(f"geneval.{kind}.{task}" for kind in ("tasks", "chance_tasks") for task in TASKS),
    ),
    "compare": ("win_rate", "low", "high"),
}


def compared_model(params: Mapping[str, Any], scored: set[str]) -> str | None:
    """The model that stands for the run: the last one scored, None where none was.

    A group of the paper's Table 4 has a model of its own, though its pipeline trains others after.

    Args:
        params: params.yaml.
        scored: names of the models that have been evaluated.
    """
    group = GROUPS.get(params["ablation"])
    if group is not None and group.model in scored:
        return group.model
    order = ["phase1", *params["feedback"]["rounds"], "dpo"]
    return next((name for name in reversed(order) if name in scored), None)


def headline(figures: Mapping[str, float], params: Mapping[str, Any]) -> dict[str, float]:
    """What a parent run has of `compared_model`, by the names that all parents share.

    Args:
        figures: all figures below metrics/, such as `evaluate/r1/geneval.overall`.
        params: params.yaml.
    """
    scored = {name.split("/")[1] for name in figures if name.startswith("evaluate/")}
    model = compared_model(params, scored)
    if model is None:
        return {}
    found = {}
    for name, value in figures.items():
        kind, _, rest = name.partition("/")
        of, _, figure = rest.partition("/")
        if of == model and figure in SHARED.get(kind, ()):
            found[figure] = value
    # Preference optimisation learns from pairs: its model has seen what the one before had seen.
    trained = params["dpo"]["from"] if model == "dpo" else model
    if f"train/{trained}/images_total" in figures:
        found["images"] = figures[f"train/{trained}/images_total"]
    return found
