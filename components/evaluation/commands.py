"""`djepa prompts …`, `djepa draw …`, `djepa score …`: thin calls that import when they run."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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


Model = Annotated[Path, typer.Argument(help="A model folder, e.g. models/phase1")]
Size = Annotated[str | None, typer.Option(help="WxH in pixels; by default the model's")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; by default evaluation.workers")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Drawn at once; by default evaluation.batch_size")
]


def _settings(
    size: str | None, workers: int | None, batch: int | None
) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """Size in pixels and params.evaluation for drawing: the model's own sampler, these options."""
    from components.compose import load
    from components.generate import parse_size

    settings = load()["evaluation"] | {"sampler": {}}
    for name, value in (("workers", workers), ("batch_size", batch)):
        if value is not None:
            settings[name] = value
    return None if size is None else parse_size(size), settings


@draw.command("geneval")
def draw_geneval_set(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Gets GenEval's folders; the run goes on in it")],
    images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt")] = 4,
    size: Size = None,
    workers: Workers = None,
    batch: BatchSize = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of metadata; by default the official 553")
    ] = None,
) -> None:
    """Draw GenEval's prompts as its folders, with the model's own sampler settings."""
    from components.evaluation.draw_sets import draw_geneval
    from components.evaluation.prompts import geneval_prompts, read_prompts

    pixels, settings = _settings(size, workers, batch)
    asked = geneval_prompts() if prompts is None else read_prompts(prompts)
    drawn = draw_geneval(model, out, asked, images, pixels, settings)
    print(f"{out}: {len(asked)} prompts, {images} pictures each, {drawn} of them drawn now")


@draw.command("compbench")
def draw_compbench_set(
    model: Model,
    prompt_file: Annotated[Path, typer.Argument(metavar="PROMPTS", help="color_val.txt, …")],
    out: Annotated[Path, typer.Argument(help="Gets samples/, e.g. compbench/phase1/color")],
    size: Size = None,
    workers: Workers = None,
    batch: BatchSize = None,
) -> None:
    """Draw an official prompt file of T2I-CompBench, ten pictures a prompt, seeds 42 to 51."""
    from components.evaluation.draw_sets import draw_compbench

    pixels, settings = _settings(size, workers, batch)
    drawn = draw_compbench(model, prompt_file, out, pixels, settings)
    print(f"{out / 'samples'}: {drawn} pictures drawn now")


@draw.command("genai")
def draw_genai_set(
    model: Model,
    prompt_file: Annotated[Path, typer.Argument(metavar="PROMPTS", help="genai_image.json")],
    out: Annotated[Path, typer.Argument(help="Gets 00000.jpeg, …, e.g. genai/phase1")],
    size: Size = None,
    workers: Workers = None,
    batch: BatchSize = None,
) -> None:
    """Draw GenAI-Bench's prompts, one picture each, as its tool reads them."""
    from components.evaluation.draw_sets import draw_genai

    pixels, settings = _settings(size, workers, batch)
    print(f"{out}: {draw_genai(model, prompt_file, out, pixels, settings)} pictures drawn now")


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


Out = Annotated[Path | None, typer.Option(help="Write the result to this file as JSON")]
AsJson = Annotated[bool, typer.Option("--json", help="The whole result as JSON")]


@score.command()
def compbench(
    folder: Annotated[Path, typer.Argument(help="Official layout: color/samples/, …")],
    category: Annotated[
        list[str] | None, typer.Option(help="color, shape, …; by default all that are there")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Results of the official tool, laid out as the folder")
    ] = None,
    chunks: Annotated[
        Path | None, typer.Option(help="JSON lines of noun chunks found elsewhere; no spaCy then")
    ] = None,
    prompt_files: Annotated[
        Path | None, typer.Option("--prompts", help="Folder of color_val.txt, …, to check by")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Score pictures by T2I-CompBench++: BLIP-VQA, CLIPScore, and the official tool's results."""
    from components.compose import load
    from components.evaluation.compbench import Scorer, score_compbench

    settings = load()["evaluation"]
    made: dict[str, Scorer] = {}

    def scorer(kind: str) -> Scorer:
        if kind not in made:
            from components.evaluation.blip_vqa import BlipVqa, chunk_file, spacy_chunks
            from components.evaluation.clip_score import ClipScore

            one: BlipVqa | ClipScore
            if kind == "blip":
                own = settings["blip_vqa"]
                found = chunk_file(chunks) if chunks else spacy_chunks(str(own["spacy"]))
                one = BlipVqa(own, *found)
            else:
                one = ClipScore(settings["clip_score"])
            one.self_test()
            made[kind] = one
        return made[kind]

    result = score_compbench(folder, settings, scorer, category or [], annotations, prompt_files)
    _show(result, folder, "categories", out, as_json)


@score.command()
def genai(
    folder: Annotated[Path, typer.Argument(help="The model's pictures: 00000.jpeg, …")],
    results: Annotated[Path, typer.Option(help="VQAScore's MODEL_N_prompts.pt, or {id: score}")],
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", help="genai_image.json, genai_skills.json beside it")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Make GenAI-Bench's table by skill from VQAScore's results."""
    from components.compose import load
    from components.evaluation.genai import score_genai

    result = score_genai(folder, results, load()["evaluation"], prompt_file)
    _show(result, folder, "skills", out, as_json)


def _show(result: dict, folder: Path, rows: str, out: Path | None, as_json: bool) -> None:
    """Print a benchmark's result, and what is missing to stderr; write it if asked to."""
    from components.files import write_json

    _say(folder, result["problems"])
    if out is not None:
        write_json(out, result)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, row in result[rows].items():
        by = f"  {row['scored_by']}" if "scored_by" in row else ""
        print(f"{name:<18} {row['score']:.4f} ± {row['stderr']:.4f}  n {row['n']}{by}")


@score.command()
def preference(
    model: Annotated[Path, typer.Argument(help="Evaluation folder, for example samples/dpo")],
    baseline: Annotated[Path, typer.Argument(help="Another of the same prompts")],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Win rate of a model over a baseline, PickScore judging."""
    from components.compose import load
    from components.evaluation.pick_score import PickScore, judge_folders
    from components.evaluation.win_rates import sentence
    from components.files import write_json

    settings = load()["evaluation"]
    judge = PickScore(settings["pick_score"])
    judge.self_test()
    result = judge_folders(model, baseline, judge, settings)
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2) if as_json else sentence(result))


@prompts.command("preference")
def preference_prompts(
    compbench: Annotated[
        Path | None, typer.Option(help="Folder of T2I-CompBench's color_val.txt, …")
    ] = None,
    pickscore: Annotated[
        Path | None, typer.Option(help="Pick-a-Pic: parquet with caption, or text, one a line")
    ] = None,
    parti: Annotated[Path | None, typer.Option(help="PartiPrompts.tsv")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts in all")] = 532,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice")] = 0,
) -> None:
    """A set for human preference from GenEval and users' copies of three other sources."""
    from components.evaluation.preference_prompts import preference_set

    chosen, missing = preference_set(compbench, pickscore, parti, count, seed)
    for sentence in missing:
        print(f"djepa: {sentence}", file=sys.stderr, flush=True)
    for prompt in chosen:
        print(json.dumps(prompt.line(), ensure_ascii=False))


def winrate(
    file: Annotated[Path, typer.Argument(help="What `djepa rate export` wrote of a pairs job")],
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", help="JSON lines with prompt and tag: also by tag")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Win rate of raters' answers, with its 95 % bootstrap interval over prompts."""
    from components.compose import load
    from components.evaluation.win_rates import raters_win_rate, sentence
    from components.files import write_json

    result = raters_win_rate(file, load()["evaluation"], prompt_file)
    if out is not None:
        write_json(out, result)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{sentence(result)}; {result['pairs']} pairs, {result['judge']}")
    for tag, row in result["intervals"].items():
        print(f"  {tag:<18} {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]  n {row['n']}")
