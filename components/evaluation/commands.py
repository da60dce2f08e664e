"""`djepa prompts …` and `djepa score …`: thin calls that import what they need when they run."""

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
        DetectorName, typer.Option(help="embedded: of the scenes; mask2former: the official one's")
    ] = DetectorName.embedded,
    results: Annotated[
        Path | None, typer.Option(help="Write the official result lines to this file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON")] = False,
) -> None:
    """Score pictures by GenEval's official rules."""
    from components.compose import load
    from components.evaluation.evaluate import sentence
    from components.evaluation.folder import gaps
    from components.evaluation.scoring import score_folder, write_results
    from components.scenes.world import World

    params = load()
    official = None
    if detector is DetectorName.mask2former and detections is None:
        from components.evaluation.clip_colors import ClipColors
        from components.evaluation.mask2former import Mask2FormerDetector

        settings = params["evaluation"]
        official = Mask2FormerDetector(settings["mask2former"], ClipColors(settings["colors"]))
    result, scored = score_folder(
        folder, params["evaluation"], World.from_params(params["data"]), detections, official
    )
    for problem in gaps([one.sample for one in scored]):
        print(f"djepa: {folder}: {problem}", file=sys.stderr, flush=True)
    if results is not None:
        write_results(results, scored)
    print(json.dumps(result, indent=2) if as_json else sentence(folder.name, result))
