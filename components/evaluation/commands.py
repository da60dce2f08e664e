"""`djepa prompts …`, `djepa draw …`, `djepa score …`: thin calls that import when they run."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

prompts = typer.Typer(no_args_is_help=True)


@prompts.callback()
def sets() -> None:
    """Print a benchmark's prompts as JSON lines."""


@prompts.command("geneval")
def geneval_set() -> None:
    """GenEval's 553 prompts with their metadata, in the official order."""
    from components.evaluation.prompts import geneval_prompts

    for metadata in geneval_prompts():
        print(json.dumps(metadata))


draw = typer.Typer(no_args_is_help=True)


@draw.callback()
def pictures() -> None:
    """Draw a benchmark's pictures with a saved model; a run that was stopped goes on."""


@draw.command("geneval")
def draw_geneval_set(
    model: Annotated[Path, typer.Argument(help="A model folder, e.g. models/phase1")],
    out: Annotated[Path, typer.Argument(help="Gets GenEval's folders; the run goes on in it")],
    images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt")] = 4,
    size: Annotated[str | None, typer.Option(help="WxH in pixels; by default the model's")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default evaluation.workers")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Drawn at once; by default evaluation.batch_size")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of metadata; by default the official 553")
    ] = None,
) -> None:
    """Draw GenEval's prompts as its folders, with the model's own sampler settings."""
    from components.compose import load
    from components.evaluation.draw_sets import draw_geneval
    from components.evaluation.prompts import geneval_prompts, read_prompts
    from components.generate import parse_size

    settings = load()["evaluation"] | {"sampler": {}}
    if workers is not None:
        settings["workers"] = workers
    if batch is not None:
        settings["batch_size"] = batch
    asked = geneval_prompts() if prompts is None else read_prompts(prompts)
    pixels = None if size is None else parse_size(size)
    drawn = draw_geneval(model, out, asked, images, pixels, settings)
    print(f"{out}: {len(asked)} prompts, {images} pictures each, {drawn} of them drawn now")


class DetectorName(StrEnum):
    """Who looks for things in pictures."""

    embedded = "embedded"
    mask2former = "mask2former"


score = typer.Typer(no_args_is_help=True)


@score.callback()
def benchmarks() -> None:
    """Score a folder of pictures by a benchmark's rules."""


@score.command()
def geneval(
    folder: Annotated[Path, typer.Argument(help="Official layout: 00000/metadata.jsonl, samples/")],
    detections: Annotated[
        Path | None, typer.Option(help="JSON lines of boxes found elsewhere; no detector then")
    ] = None,
    detector: Annotated[
        DetectorName | None,
        typer.Option(help="embedded (default): of the scenes; mask2former: the official one's"),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write the official result lines to this file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON")] = False,
) -> None:
    """Score pictures by GenEval's official rules."""
    if detections is not None and detector is not None:
        from components.errors import UserError

        raise UserError(
            f"--detections {detections} gives the boxes, so --detector {detector} would look for "
            "nothing: leave out one of them."
        )
    from components.compose import load
    from components.evaluation.checks import notes
    from components.evaluation.evaluate import sentence
    from components.evaluation.scoring import score_folder, write_results
    from components.scenes.world import World

    params = load()
    official = None
    if detector is DetectorName.mask2former:
        from components.evaluation.clip_colors import ClipColors
        from components.evaluation.mask2former import Mask2FormerDetector

        settings = params["evaluation"]
        official = Mask2FormerDetector(settings["mask2former"], ClipColors(settings["colors"]))
    result, scored = score_folder(
        folder, params["evaluation"], World.from_params(params["data"]), detections, official
    )
    problems = notes([one.sample for one in scored], [one.detections for one in scored])
    _say(folder, problems)
    if results is not None:
        write_results(results, scored)
    result |= {"problems": problems}
    print(json.dumps(result, indent=2) if as_json else sentence(folder.name, result))


def _say(where: Path, problems: list[str]) -> None:
    for problem in problems:
        print(f"djepa: {where}: {problem}", file=sys.stderr, flush=True)


@score.command()
def results(
    file: Annotated[Path, typer.Argument(help="Result lines of the official tool, or of ours")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON")] = False,
) -> None:
    """Sum up GenEval's result lines: the tasks, overall, its standard error; no chance floor."""
    from components.compose import load
    from components.evaluation.checks import notes
    from components.evaluation.results import read_results, sentence, summary

    read = read_results(file)
    result = summary(read, file, load()["evaluation"])
    problems = notes([one.sample for one in read]) + result.pop("problems")
    _say(file, problems)
    result |= {"problems": problems}
    print(json.dumps(result, indent=2) if as_json else sentence(file.name, result))
