"""What a sampler's settings cost and what they give: score against CPU seconds a picture.

python benchmarks/tradeoff.py MODEL [--pictures N] [--settings FILE] [--out FOLDER] [--rounds N]

Draws the embedded world's evaluation prompts (data and evaluation of params.yaml in the current
folder) with each of the settings, all with the same seeds, and scores them with the embedded
detector. The first of the settings is what the others are compared with, picture by picture.
Then one batch is timed with each in turn, round after round, on one thread: the least of the
rounds, as other work on the machine only ever adds.

FOLDER gets tradeoff.json after each of the settings; what it holds is not drawn again. At the end
comes tradeoff.png.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import load
from components.evaluation.detector import SceneDetector
from components.evaluation.draw_sets import model_hash
from components.evaluation.drawing import draw_pictures, load_pipeline
from components.evaluation.evaluate import benchmark, parse_size
from components.evaluation.geneval import clauses
from components.evaluation.statistics import Spread, spreads
from components.files import hash_of, read_json, write_json
from components.model.flops import drawn_picture
from components.model.sampler import SamplerConfig, cosine_step, guided_steps, head_evaluations
from components.processes import one_thread
from components.scenes.tasks import TASKS, Metadata
from components.scenes.world import World

SETTINGS = Path(__file__).with_suffix(".yaml")
Result = dict[str, Any]


def settings_of(file: Path) -> dict[str, dict[str, Any]]:
    """Name to the sampler's settings: those of `common`, with each one's own in their place."""
    read = yaml.safe_load(file.read_text())
    return {name: read["common"] | (own or {}) for name, own in read["settings"].items()}


def jobs_of(world: World, settings: Mapping[str, Any], pictures: int) -> list[tuple[Metadata, int]]:
    """What is asked for, and the seed, of about so many pictures, tasks and splits alike."""
    each = round(pictures / (2 * len(TASKS)))
    chosen = benchmark(world, settings | {"pictures": each})
    first = int(settings["seed"]) * 1_000_000
    prompts = [metadata for metadata, count in chosen for _ in range(count)]
    return [(metadata, first + i) for i, metadata in enumerate(prompts)]


def score(
    model: Path,
    jobs: Sequence[tuple[Metadata, int]],
    sampler: Mapping[str, Any],
    settings: Mapping[str, Any],
    world: World,
    what: str,
) -> Result:
    """Of each picture whether it is right, and the share of its clauses that are met."""
    detector = SceneDetector(world, settings["detector"])
    size, batch = parse_size(settings["size"]), int(settings["batch_size"])
    pictures = draw_pictures(
        model,
        [(metadata["prompt"], seed) for metadata, seed in jobs],
        size,
        batch,
        sampler,
        int(settings["workers"]),
        what,
    )
    shares = []
    for (metadata, _), picture in zip(jobs, pictures, strict=True):
        colored = {clause["class"] for clause in metadata["include"] if "color" in clause}
        met = [met for met, _ in clauses(metadata, detector.detect(picture, colored))]
        shares.append(sum(met) / len(met))
    return {"correct": [share == 1 for share in shares], "share": shares}


def seconds(
    model: Path,
    jobs: Sequence[tuple[Metadata, int]],
    every: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    rounds: int,
) -> dict[str, float]:
    """CPU seconds a picture of each of the settings: one batch, on one thread, in turn."""
    pipe, batch = load_pipeline(model), int(settings["batch_size"])
    width, height = parse_size(settings["size"])
    some = [jobs[i * len(jobs) // batch] for i in range(min(batch, len(jobs)))]
    least = dict.fromkeys(every, float("inf"))
    with one_thread():
        for number in range(rounds):
            for name, sampler in every.items():
                generators = [torch.Generator().manual_seed(seed) for _, seed in some]
                began = time.process_time()
                pipe(
                    [metadata["prompt"] for metadata, _ in some],
                    width=width,
                    height=height,
                    generator=generators,
                    **sampler,
                )
                least[name] = min(least[name], (time.process_time() - began) / len(some))
            print(f"round {number + 1} of {rounds} timed", flush=True)
    return least


def figures(
    results: Mapping[str, Result],
    jobs: Sequence[tuple[Metadata, int]],
    world: World,
    settings: Mapping[str, Any],
) -> dict[str, dict[str, Spread]]:
    """By name: score of all pictures, of the held-out, and differences to the first one's."""

    def spread_of(columns: list[list[float]], rows: Sequence[int]) -> list[Spread]:
        return spreads(
            [[float(column[row]) for row in rows] for column in columns],
            [jobs[row][0]["tag"] for row in rows],
            [jobs[row][0]["prompt"] for row in rows],
            int(settings["bootstrap"]),
            int(settings["seed"]),
        )

    everyone = range(len(jobs))
    held_out = [row for row in everyone if world.is_held_out(jobs[row][0])]
    first = next(iter(results.values()))
    made = {}
    for name, one in results.items():
        columns = [one["correct"], one["share"]]
        columns += [
            [a - b for a, b in zip(one[key], first[key], strict=True)]
            for key in ("correct", "share")
        ]
        names = ("score", "share", "difference", "share_difference")
        made[name] = dict(zip(names, spread_of(columns, everyone), strict=True))
        names = ("held_out", "held_out_difference")
        made[name] |= zip(names, spread_of([columns[0], columns[2]], held_out), strict=True)
    return made


def cost(model: Path, sampler: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Passes of the network and evaluations of the head, a picture, both halves; GFLOP."""
    pipe, (width, height) = load_pipeline(model), parse_size(settings["size"])
    config = SamplerConfig(**sampler, width=width, height=height)
    tokens = (width // pipe.tokenizer.patch) * (height // pipe.tokenizer.patch)
    counts = cosine_step(config.autoregressive_steps, tokens)
    guided, asked = guided_steps(config, len(counts)), head_evaluations(config, len(counts))
    halves = [2 if step < guided else 1 for step in range(len(counts))]
    head = sum(n * h * drawn for n, h, drawn in zip(asked, halves, counts, strict=True)) / tokens
    work = drawn_picture(pipe.transformer, 10.0, tokens, config) / 1e9
    return f"{sum(halves)} | {head:.1f} | {work:.1f}"


def plot(rows: Mapping[str, Mapping[str, Any]], chosen: str, title: str, file: Path) -> None:
    """Score ± 1 standard error against CPU seconds; what nothing faster beats is joined."""
    figure, axes = plt.subplots(figsize=(9, 5.4))
    reference = next(iter(rows))
    best, front = -1.0, []
    for name in sorted(rows, key=lambda n: rows[n]["seconds"]):
        row = rows[name]
        kind = {reference: "black", chosen: "tab:red"}.get(name, "tab:blue")
        axes.errorbar(
            row["seconds"], row["score"].mean, row["score"].stderr, fmt="o", color=kind,
            markersize=5, elinewidth=0.6, alpha=0.9,
        )  # fmt: skip
        axes.annotate(
            name, (row["seconds"], row["score"].mean), xytext=(4, 4),
            textcoords="offset points", fontsize=7, color=kind,
        )  # fmt: skip
        if row["score"].mean > best:
            best = row["score"].mean
            front.append(name)
    axes.plot(
        [rows[n]["seconds"] for n in front], [rows[n]["score"].mean for n in front], "-",
        color="tab:gray", linewidth=1, zorder=0, label="none faster scores more",
    )  # fmt: skip
    published = rows[reference]["score"]
    axes.axhspan(
        published.mean - published.stderr, published.mean + published.stderr, color="black",
        alpha=0.06, label=f"{reference} ± 1 standard error",
    )  # fmt: skip
    axes.set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("CPU seconds a picture, one thread, 32 drawn together")
    axes.set_ylabel("GenEval overall on the embedded world, seen and held-out")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as docs/sampling-speed.md has them."""
    lines = [
        "| | passes | head evaluations | GFLOP | ms a picture | times faster | score | held-out "
        "| share of clauses | difference [95 %] | held-out [95 %] | of the shares [95 %] |",
        "|" + "---|" * 12,
    ]
    slowest = next(iter(rows.values()))["seconds"]
    for name, row in rows.items():
        difference, held_out, share = (
            row[key] for key in ("difference", "held_out_difference", "share_difference")
        )
        lines.append(
            f"| {name} | {row['cost']} | {1000 * row['seconds']:.0f} "
            f"| {slowest / row['seconds']:.1f} "
            f"| {row['score'].mean:.3f} ± {row['score'].stderr:.3f} "
            f"| {row['held_out'].mean:.3f} ± {row['held_out'].stderr:.3f} "
            f"| {row['share'].mean:.3f} ± {row['share'].stderr:.3f} "
            f"| {difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] "
            f"| {held_out.mean:+.3f} [{held_out.low:+.3f}, {held_out.high:+.3f}] "
            f"| {share.mean:+.3f} [{share.low:+.3f}, {share.high:+.3f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=672)
    parser.add_argument("--settings", type=Path, default=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("tradeoff"))
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--workers", type=int, help="processes that draw; default: evaluation's")
    asked = parser.parse_args()
    params = load()
    settings = params["evaluation"] | ({"workers": asked.workers} if asked.workers else {})
    world, every = World.from_params(params["data"]), settings_of(asked.settings)
    jobs = jobs_of(world, settings, asked.pictures)
    file = asked.out / "tradeoff.json"
    record = {"model": model_hash(asked.model), "jobs": hash_of(jobs)}
    kept = read_json(file) if file.exists() else {}
    if any(kept.get(name) != value for name, value in record.items()):
        kept = record | {"results": {}}
    results: dict[str, Result] = kept["results"]
    for name, sampler in every.items():
        if results.get(name, {}).get("sampler") != sampler:
            scored = score(asked.model, jobs, sampler, settings, world, name)
            results[name] = {"sampler": sampler, **scored}
            write_json(file, kept)
        right = sum(results[name]["correct"])
        print(f"{name}: {right} of {len(jobs)} pictures are right", flush=True)
    timed = seconds(asked.model, jobs, every, settings, asked.rounds)
    for name, value in timed.items():
        results[name]["seconds"] = min(value, results[name].get("seconds", value))
    write_json(file, kept)
    spread_of = figures({name: results[name] for name in every}, jobs, world, settings)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": results[name]["seconds"],
            "cost": cost(asked.model, sampler, settings),
            **spread_of[name],
        }
        for name, sampler in every.items()
    }
    own = settings["sampler"]
    chosen = next((name for name, sampler in every.items() if sampler == own), "")
    title = f"{params['scale']}, {len(jobs)} pictures a point, ± 1 standard error"
    plot(rows, chosen, title, asked.out / "tradeoff.png")
    print(table(rows))


if __name__ == "__main__":
    main()
