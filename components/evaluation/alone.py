"""The evaluation of any model folder, outside the pipeline's stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.evaluation.draw_sets import model_hash
from components.evaluation.evaluate import evaluate
from components.files import hash_of, read_json, refuse_other, write_json
from components.home import djepa_home
from components.processes import only_one
from components.tracking import Tracker

RESULT = "result.json"


def evaluate_alone(model: Path, out: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Draw and score as the stage evaluate does, into one folder; returns the figures.

    Args:
        model: a diffusers folder.
        out: gets the pictures in GenEval's layout, grid.png, seen/ and result.json: what the
            stage writes to metrics/evaluate, and the model's hash.
        params: all parameters; `data` and `evaluation` are read.

    A run that was killed goes on with the pictures it drew.

    Raises:
        UserError: as `evaluate`; `out` holds something else, which would be lost; Busy where the
            same evaluation is running.
    """
    refuse_other(out, (RESULT, "results.jsonl"))  # the second alone: killed before the first
    digest = model_hash(model)
    key = hash_of(["evaluate_alone", digest, params["data"], params["evaluation"]])
    resume = djepa_home() / "resume" / key
    with only_one(resume.with_suffix(".lock"), f"The evaluation of {model}"):
        result = out / RESULT
        geneval = evaluate(model, out, result, params, Tracker(), resume=resume)
        write_json(result, read_json(result) | {"model_hash": digest})
    return geneval
