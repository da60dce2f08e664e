"""The score of any model in the registry: `python -m flows.evaluation model@newest`.

The model's bytes are found by the DVC hash of its version, so that one which no checkout has any
more is scored too. Pictures, grid and result lie in $DJEPA_HOME/evaluations; the figures go to a
run of MLflow's and, as tags, to the registered version.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from components.errors import needed

with needed("evaluation", __name__):
    from prefect import flow, get_run_logger
    from prefect.artifacts import create_image_artifact, create_table_artifact
    from pydantic import Field

    from components.compose import load
    from components.files import hash_of, read_json
    from components.home import checkout, djepa_home
    from components.registered import fetched, find, record
    from flows.command import command
    from flows.process import run

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


@flow(name="evaluation", log_prints=True)
def evaluation(
    model: Annotated[str, Field(min_length=1)] = "model@newest",
    pictures: Count | None = None,
    seed: Seed | None = None,
) -> Path:
    """Draw the benchmark's prompts with a registered model and score them.

    Args:
        model: NAME@ALIAS or NAME/VERSION of MLflow's registry, such as model@newest or model/3;
            or a model's folder, such as models/dpo.
        pictures: drawn for each task and split. Left out, evaluation.pictures of params.yaml.
        seed: of the choice of prompts and of the noise. Left out, evaluation.seed.

    Returns the folder with the pictures and result.json. Raises UserError for a model that there is
    none of, StageFailed where the drawing ended badly.
    """
    params, log = load(), get_run_logger()
    given = {"pictures": pictures, "seed": seed}
    settings = {k: params["evaluation"][k] if v is None else v for k, v in given.items()}
    found = find(model)
    key = hash_of([params["data"], params["evaluation"] | settings])[:8]
    out = djepa_home() / "evaluations" / f"{found.label}-{key}"
    options = [part for k, v in settings.items() for part in (f"--{k}", str(v))]
    with fetched(found) as folder:
        log.info("%s is evaluated into %s", model, out)
        draw = [sys.executable, "-m", "components.cli", "evaluate", str(folder), str(out)]
        run(f"evaluation of {model}", [*draw, *options])
    identifier = record(found, out, settings)
    show(out, f"{model}, {settings['pictures']} pictures a task and split, seed {settings['seed']}")
    log.info("The figures are in MLflow's run %s", identifier)
    return out


def show(out: Path, words: str) -> None:
    """Publish the figures and the grid as artifacts of the flow run."""
    geneval = read_json(out / "result.json")["geneval"]
    rows: list[dict[str, Any]] = [
        {"figure": name, "value": geneval[name]} for name in ("overall", "stderr", "chance", "n")
    ]
    rows += [{"figure": task, "value": score} for task, score in geneval["tasks"].items()]
    create_table_artifact(rows, key="evaluation", description=f"GenEval of {words}")
    grid = base64.b64encode((out / "grid.png").read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{grid}", key="grid", description=words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.evaluation", description=__doc__)
    parser.add_argument("model", nargs="?", default="model@newest", help="or model/3, models/dpo")
    parser.add_argument("--pictures", type=int, help="of each task and split")
    parser.add_argument("--seed", type=int, help="of prompts and noise")
    options = vars(parser.parse_args(arguments))

    def body() -> None:
        checkout()
        load()
        find(options["model"])  # refused before Prefect's server is started
        evaluation(**options)

    return command("evaluation", body, "Pictures drawn so far are kept; run the same command.")


if __name__ == "__main__":
    sys.exit(main())
