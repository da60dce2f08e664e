"""At home: what a bare GPU machine is to run, and the table of what it brought back.

    python -m benchmarks.gpu.plan small --minutes 15
    python -m benchmarks.gpu.plan ablation --scale starter --seeds 3
    python -m benchmarks.gpu.plan table .lease/lease.jsonl …

The first two compose parameters, for which that machine has no Hydra, into .lease/plan.json, which
lease.sh takes there. NAME=VALUE are overrides for all jobs alike, after those of lease.yaml.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Results, said
from components.compose import composed
from components.errors import UserError, explain, say
from components.evaluation.ablation import COMPARED, GROUPS, Result
from components.files import hash_of, read_yaml, write_json

OVERRIDES = Path(__file__).with_name("lease.yaml")
REPORT = Path("reports/ablation")
AT_ONCE = 6
TRAINING = ("references", "critic", "phase2")  # stages of a round


def job(
    name: str,
    model: str,
    params: Mapping[str, Any],
    about: Mapping[str, Any],
    follows: str | None = None,
) -> dict[str, Any]:
    """One job: the stages that train `model`, on what the job `follows` left, and score it.

    `key` is the hash of its parameters: figures of other ones are other figures. about: said in
    the line with its figures.
    """
    own = ["phase1"] if model == "phase1" else [f"{stage}@{model}" for stage in TRAINING]
    return {
        "name": name,
        "key": hash_of(params)[:8],
        "follows": follows,
        "model": model,
        "stages": [*own, f"evaluate@{model}"],
        "params": params,
        "about": {**about, "code": said(["git", "describe", "--always", "--dirty"])},
    }


def small(minutes: float, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Phase 1 of scale small for `minutes` of training, and before it a short one that says how
    many images those are."""
    known = read_yaml(OVERRIDES)
    own = ["scale=small", *known["bare"], *known["small"], *overrides]
    about = {"scale": "small", "overrides": " ".join(overrides)}
    short = composed([*own, *known["trial"]])
    trial = job("trial", "phase1", short, about)
    whole = job("small", "phase1", composed(own), about)
    return [
        trial | {"stages": ["phase1"]},
        whole
        | {
            "stages": [*whole["stages"], "keep"],
            "fit": {"to": "trial", "seconds": 60 * minutes},
        },
    ]


def ablation(scale: str, seeds: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Groups A to G, seed after seed, each after the one that it goes on from."""
    known = read_yaml(OVERRIDES)
    own = [f"scale={scale}", *known["bare"], *known["ablation"], *overrides]
    groups = [name for name in GROUPS if name not in COMPARED]
    params = {name: composed([*own, f"ablation={name}"]) for name in groups}
    jobs = []
    for seed in range(seeds):
        for name in groups:
            before, model = GROUPS[name].follows, GROUPS[name].model
            follows = f"{before}-{seed}" if before else None
            about = {"scale": scale, "group": name, "overrides": " ".join(overrides)}
            seeded = params[name] | {"seed": seed}
            jobs.append(job(f"{name}-{seed}", model, seeded, about, follows))
    return jobs


def table(files: Sequence[Path], folder: Path = REPORT) -> str:
    """Write the ablation's report from lines that lease.py wrote; returns the page.

    Raises:
        UserError: there are none, or they are of different parameters.
    """
    from components.evaluation.ablation_report import write_ablation

    lines = [line for line in Results(files).lines.values() if line.get("group") in GROUPS]
    made = sorted({(line["scale"], line["overrides"]) for line in lines})
    if len(made) != 1:
        raise UserError(
            f"{', '.join(map(str, files))}: there are figures of "
            f"{made if made else 'no group of the ablation'}; give the files of one plan."
        )
    names = [each.name for each in fields(Result)]
    results = [Result(**{name: line[name] for name in names}) for line in lines]
    about = {
        "scale": made[0][0],
        "seeds": len({result.seed for result in results}),
        "overrides": made[0][1],
        "on": ", ".join(sorted({str(line["gpu"]) for line in lines})),
    }
    return write_ablation(results, folder, about)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a refusal is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.plan", description=__doc__)
    parser.add_argument("what", choices=["small", "ablation", "table"])
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE | FILE")
    parser.add_argument("--out", type=Path, default=Path(".lease/plan.json"))
    parser.add_argument("--minutes", type=float, default=15, help="of training, for small")
    parser.add_argument("--scale", default="starter", help="of the ablation")
    parser.add_argument("--seeds", type=int, default=3, help="of the ablation")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="its jobs side by side")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.what == "table":
            print(table([Path(file) for file in options.values]))
            return 0
        if options.what == "small":
            jobs, at_once = small(options.minutes, options.values), 1
        else:
            jobs = ablation(options.scale, options.seeds, options.values)
            at_once = options.at_once
        write_json(options.out, {"at_once": at_once, "jobs": jobs})
        print(f"{options.out}: {len(jobs)} jobs, {at_once} at once")
        return 0
    except UserError as error:
        return say("plan", explain(error) or str(error), error)


if __name__ == "__main__":
    sys.exit(main())
