"""The command line: `djepa`. Every verb is a thin call of something importable."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

from components.errors import explain, say

try:
    import typer

    from components.evaluation.commands import draw, prompts, score, winrate
    from components.rating.commands import rate
except ModuleNotFoundError as missing:  # another Python than the one that was installed into
    sys.exit(say("djepa", explain(missing) or str(missing)))

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def djepa() -> None:
    """Trains D-JEPA·T2I: masked-autoregressive text-to-image with data feedback."""


@app.command()
def compose(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE …; none keeps the standing choice")
    ] = None,
) -> None:
    """Compose params/ into params.yaml; overrides become the whole choice, kept in the tree."""
    from components.compose import compose as compose_tree

    compose_tree(overrides=overrides or [])


@app.command()
def data(
    accept: Annotated[
        bool, typer.Option(help="Record what is drawn here even where data.dvc differs")
    ] = False,
) -> None:
    """Draw the embedded world's raw pictures into data/ and check them against data.dvc."""
    from components.compose import load
    from components.home import checkout
    from components.lockfile import check_lock, forget_lost
    from components.rawdata import draw_data
    from components.tracking import Tracker

    checkout()  # `dvc add` records the pictures in it
    check_lock()
    draw_data(load(), Tracker(), accept)
    lost = forget_lost()
    if lost:
        print(
            f"dvc.lock named results of {len(lost)} stages that are neither here nor in DVC's "
            f"cache ({', '.join(lost)}): the run cache has them, or they are made when they are due"
        )


@app.command()
def atlas(
    file: Annotated[Path, typer.Argument(help="File to write, e.g. openmoji.npz")],
) -> None:
    """Write the glyphs of data.glyphs: openmoji to a file, for machines that cannot draw them."""
    from components.scenes.atlas import FILE, write

    write(file)
    print(f"{file}: name it in the environment variable {FILE} on the other machine")


@app.command()
def stage(name: Annotated[str, typer.Argument(help="A stage of dvc.yaml, e.g. phase2@r1")]) -> None:
    """Run one stage of dvc.yaml here (what `dvc repro` calls)."""
    from components.stages import run_stage

    run_stage(name)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='For example "a photo of a red circle"')],
    model: Annotated[
        Path | None,
        typer.Option(help="A model folder; by default the last one trained here, or the starter"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels; by default the model's")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next has seed + 1")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file; several pictures get -0, -1, …")] = Path(
        "generated.png"
    ),
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 for none; by default the model's")
    ] = None,
    layout_offset: Annotated[
        float | None,
        typer.Option(help="Moves the layout of a picture that is not square: VoPE's b, in tokens"),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter")] = None,
    enlarge: Annotated[
        int, typer.Option(min=1, help="Side of the square that each pixel becomes, for looking at")
    ] = 1,
) -> None:
    """Draw a prompt to a PNG."""
    from components.generate import generate as draw_prompt

    for path in draw_prompt(
        prompt, model, size, images, seed, out, guidance, layout_offset, lora, enlarge
    ):
        print(path)


@app.command()
def pack(
    scores: Annotated[
        str, typer.Option(help="Put these scores into the card: NAME of metrics/evaluate/NAME.json")
    ] = "",
) -> None:
    """Pack models/phase1 as this checkout's starter; `python -m flows.starter` does all of it."""
    from components.compose import load
    from components.rawdata import RECORD
    from components.stages import METRICS, MODELS, SAMPLES
    from components.starter.pack import pack as pack_starter

    scored = (METRICS / "evaluate" / f"{scores}.json", SAMPLES / scores) if scores else None
    trained = METRICS / "train" / "phase1.json"
    pack_starter(MODELS / "phase1", load(), trained, RECORD, scored)


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="NAME=VALUE …, on top of the standing choice")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many share a batch")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON")] = False,
) -> None:
    """Say what a scale costs: parameters, operations, memory, cache, images a second, days."""
    from components.compose import composed
    from components.plan import plan as plan_for
    from components.plan import text

    found = plan_for(composed(overrides or []), gpus)
    print(json.dumps(found, indent=2) if as_json else text(found))


@app.command()
def curate(
    source: Annotated[
        Path, typer.Argument(help="Folder of webdataset shards, parquet files or pictures")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the curated shards, manifest, report")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="NAME=VALUE …, e.g. curation.resolution.shorter_side=256"),
    ] = None,
) -> None:
    """Filter any folder of pictures with captions; docs/curation.md says how to set it."""
    from components.compose import defaults
    from components.curation.contract import check
    from components.curation.curate import curate as curate_folder
    from components.tracking import Tracker

    params, tracker = defaults(overrides or []), Tracker()
    curate_folder(source, out, params, tracker)
    print(f"{out / 'report.html'} shows what was kept and rejected", flush=True)
    check(out, out / "contract.json", out / "contract", params, tracker)


app.add_typer(prompts, name="prompts")
app.add_typer(draw, name="draw")
app.add_typer(score, name="score")
app.add_typer(rate, name="rate")
app.command()(winrate)


@app.command()
def compare(
    parents: Annotated[
        list[str] | None,
        typer.Argument(help="Runs in MLflow by id or name; none for all of --family"),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Look among the runs of this family only, e.g. demo")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and plots")] = Path(
        "reports/compare"
    ),
) -> None:
    """Put runs of the pipeline, or groups of an ablation, beside one another: tables and plots."""
    from components.comparison.compare import write_comparison
    from components.comparison.parents import read_parents
    from components.errors import UserError
    from components.runs import client
    from components.tracking import wait_sent

    if not parents and family is None:
        raise UserError("Say what to compare: `djepa compare RUN RUN …` or `--family FAMILY`.")
    wait_sent()
    print(write_comparison(read_parents(client(), parents or [], family), out))
    print(f"{out / 'compare.html'} has the plots too")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder, e.g. models/dpo")],
    out: Annotated[Path, typer.Argument(help="Folder for pictures, grid and result.json")],
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Of each task; by default evaluation.pictures")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="By default evaluation.seed: prompts and noise")
    ] = None,
) -> None:
    """Draw the benchmark with any model folder and score it, as the stage evaluate does."""
    from components.compose import load
    from components.evaluation.alone import evaluate_alone

    params, given = load(), {"pictures": pictures, "seed": seed}
    params["evaluation"] |= {k: v for k, v in given.items() if v is not None}
    # A polite stop clears up what is half written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    evaluate_alone(model, out, params)


@app.command()
def never_drawn(
    state: Annotated[Path, typer.Argument(help="A training state, e.g. states/r1")],
    encoded: Annotated[Path, typer.Option(help="The encoded set")] = Path("encoded"),
) -> None:
    """Print the keys of the samples that a state was never trained on."""
    from components.feedback.ledger import never_drawn as keys
    from components.tokens.encoded import EncodedSet

    for key in keys(state, EncodedSet.open(encoded)):
        print(key)


@app.command()
def summary() -> None:
    """Print the table of models and where to look: pictures, reports, MLflow, Prefect."""
    from components.summary import print_summary

    print_summary()


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1")] = 5000,
) -> None:
    """Open the MLflow UI on this project's runs (127.0.0.1; Ctrl-C stops it)."""
    from components.home import djepa_home
    from components.runs import runs_pages
    from components.tracking import store, wait_sent

    wait_sent()
    for words, address in runs_pages(port):
        print(f"MLflow: {address} ({words})", flush=True)
    print("Prefect: `prefect server start`, then http://127.0.0.1:4200", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_BACKEND_STORE_URI"] = store()  # on the command line all would read it
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(djepa_home() / "artifacts")]
    os.execv(sys.executable, command)


def main() -> None:
    """Run the command line; what is not a defect of ours ends in one sentence and exit code 2."""
    try:
        return app()
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        code = say("djepa", sentence, error)
    # Out here nothing holds the error's frames, and libraries can let go of what they opened.
    sys.exit(code)


if __name__ == "__main__":
    main()
