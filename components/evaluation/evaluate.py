"""Draws a benchmark's pictures with a model and scores them."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.errors import UserError
from components.evaluation.draw_sets import (
    claim,
    draw_missing,
    model_hash,
    network_parameters,
)
from components.evaluation.drawing import Pipeline, load_pipeline
from components.evaluation.folder import RUN, write_prompt
from components.evaluation.grid import grid
from components.evaluation.scoring import Scored, score_folder, write_results
from components.evaluation.seen import write_seen
from components.files import atomic_folder, hash_of, write_json
from components.scenes.tasks import TASKS, Metadata
from components.scenes.world import World
from components.tracking import Tracker


def benchmark(world: World, settings: Mapping[str, Any]) -> list[tuple[Metadata, int]]:
    """The prompts and how many pictures of each.

    `pictures` for each task and split, spread over at most pictures / images prompts. A split
    with fewer prompts gets more pictures of each; where the world is scored on the official
    prompts each gets `images`, as officially, so that all count alike.
    """
    rng = np.random.default_rng(int(settings["seed"]))
    pictures, images = int(settings["pictures"]), int(settings["images"])
    chosen: list[tuple[Metadata, int]] = []
    for task in TASKS:
        for split in ("seen", "held_out"):
            prompts = world.benchmark_prompts(split, task)
            n = min(len(prompts), max(pictures // images, 1))
            picked = [prompts[int(i)] for i in rng.permutation(len(prompts))[:n]]
            if world.official:
                chosen += [(m, images) for m in picked]
            else:
                chosen += [(m, pictures // n + (i < pictures % n)) for i, m in enumerate(picked)]
    return [(metadata, count) for metadata, count in chosen if count]


def parse_size(text: str) -> tuple[int, int]:
    """`48x32` → (48, 32): width and height in pixels."""
    try:
        width, height = (int(part) for part in str(text).split("x"))
    except ValueError:
        raise UserError(f"'{text}' is no size: give WIDTHxHEIGHT, such as 32x32.") from None
    return width, height


def draw(
    model: Path,
    chosen: Sequence[tuple[Metadata, int]],
    out: Path,
    settings: Mapping[str, Any],
    what: str,
    load: Callable[[Path], Pipeline] = load_pipeline,
) -> int:
    """Draw each prompt's missing pictures into `out` in GenEval's layout; a seed a picture.

    what: named by the progress lines. `model`, `load`, what is returned and the errors raised
    as in `draw_sets.draw_missing`.
    """
    prompts, paths = [], []
    for index, (metadata, count) in enumerate(chosen):
        folder = write_prompt(out, index, metadata)
        prompts += [metadata["prompt"]] * count
        paths += [folder / f"{i:04d}.png" for i in range(count)]
    first = int(settings["seed"]) * 1_000_000
    jobs = [
        (prompt, first + i, path)
        for i, (prompt, path) in enumerate(zip(prompts, paths, strict=True))
    ]
    return draw_missing(model, jobs, parse_size(settings["size"]), settings, what, load)


def evaluate(
    model: Path,
    samples_out: Path,
    metrics_out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
    load: Callable[[Path], Pipeline] = load_pipeline,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Draw GenEval's tasks on the embedded world with a model and score them.

    Writes `samples_out` (official folders, results.jsonl, grid.png, seen/TASK.png) and
    `metrics_out` ({"model", "parameters": of its network, "size", "sampler", "geneval": see
    components/evaluation/scoring.py}).

    Args:
        model: a diffusers folder.
        samples_out, metrics_out: replaced when the stage ends well.
        params: all parameters; `data` and `evaluation` are read.
        tracker: gets geneval/…, the grid and what the detector saw.
        load: how a model folder becomes a pipeline.
        resume: keeps the pictures until the stage ends well, so that a killed one goes on; what
            another model or other settings drew there is dropped.

    Raises:
        UserError: settings, world or model folder that do not fit, or a drawing process died.
    """
    settings = params["evaluation"]
    world = World.from_params(params["data"])
    chosen = benchmark(world, settings)
    with atomic_folder(samples_out) as folder:
        started, what = time.monotonic(), f"drawing {samples_out.name}"
        if resume is None:
            drawn = draw(model, chosen, folder, settings, what, load)
        else:
            names = ("size", "seed", "batch_size", "sampler")
            record = {"model": model_hash(model), "prompts": hash_of(chosen)}
            claim(resume, record | {name: settings[name] for name in names}, clear=True)
            drawn = draw(model, chosen, resume, settings, what, load)
            shutil.copytree(
                resume, folder, ignore=shutil.ignore_patterns(RUN, "*.tmp-*"), dirs_exist_ok=True
            )
        seconds = time.monotonic() - started
        geneval, scored = score_folder(folder, settings, world)
        write_results(folder / "results.jsonl", scored)
        sample_grid(scored, settings["grid"]).save(folder / "grid.png")
        write_seen(scored, folder / "seen", settings["grid"])
    write_json(
        metrics_out,
        {
            "model": samples_out.name,
            "parameters": network_parameters(model),
            "size": str(settings["size"]),
            "sampler": dict(settings["sampler"]),
            "geneval": geneval,
        },
    )
    tracker.log_metrics(
        flatten(geneval, "geneval") | {"geneval/pictures_per_second": drawn / seconds}
    )
    tracker.log_artifact(samples_out / "grid.png")
    tracker.log_artifact(samples_out / "seen", "seen")
    if resume is not None:
        shutil.rmtree(resume)
    print(sentence(samples_out.name, geneval), flush=True)
    return geneval


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Nested figures as `prefix/a/b`; what is no figure is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}/{name}"] = float(value)
    return flat


def sentence(name: str, geneval: Mapping[str, Any]) -> str:
    """A result in one line."""
    gain = geneval["difference"]
    seen = f", seen {geneval['seen']['overall']:.3f}" if "seen" in geneval else ""
    return (
        f"{name}: GenEval overall {geneval['overall']:.3f} ± {geneval['stderr']:.3f}{seen}, "
        f"chance {geneval['chance']:.3f}, difference {gain['mean']:.3f} "
        f"[{gain['low']:.3f}, {gain['high']:.3f}], {geneval['n']} pictures"
    )


def sample_grid(scored: Sequence[Scored], settings: Mapping[str, Any]) -> Image.Image:
    """The first picture of as many prompts as asked for, tasks and splits alike."""
    firsts: dict[tuple[str, str], dict[str, Scored]] = {}
    for s in scored:
        group = firsts.setdefault((s.sample.metadata["tag"], s.split), {})
        group.setdefault(s.sample.metadata["prompt"], s)
    queues = [list(group.values()) for group in firsts.values()]
    picked: list[tuple[int, int]] = []
    for depth in range(max(len(q) for q in queues)):
        picked += [(q, depth) for q in range(len(queues)) if depth < len(queues[q])]
    shown = [queues[q][d] for q, d in sorted(picked[: int(settings["prompts"])])]
    return grid(
        [s.sample.open() for s in shown],
        [s.sample.metadata["prompt"] for s in shown],
        [f"{s.split.replace('_', ' ')} {'right' if s.correct else 'wrong'}".strip() for s in shown],
        [s.correct for s in shown],
        int(settings["columns"]),
        int(settings["cell"]),
    )
