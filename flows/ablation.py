"""The paper's Table 4 as a Prefect flow: `python -m flows.ablation --seeds 3`.

Each group and seed is one DVC experiment in a copy of its own (`dvc exp run --temp`). Groups that
go on from one another share what they have in common through DVC's run cache, so a group starts
when the one it goes on from is done. docs/ablation.md says what the groups are.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from components.errors import UserError, needed

with needed("ablation", __name__):
    from prefect import flow, get_run_logger, task
    from prefect.artifacts import create_markdown_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.futures import PrefectFuture, as_completed
    from prefect.task_runners import ThreadPoolTaskRunner
    from pydantic import Field

    from components.compose import composed, load
    from components.evaluation.ablation import GROUPS, Result, path
    from components.files import hash_of
    from components.home import checkout
    from components.runs import open_run, with_group
    from components.tracking import recall, wait_sent
    from flows.command import StageFailed, command
    from flows.experiments import Experiment, commit_of, git
    from flows.pipeline import data
    from flows.process import stop_all

REPORT = Path("reports/ablation")
Job = tuple[int, str]  # seed, group
Group = Literal["A", "B", "C", "D", "E", "F", "G", "H", "I"]


def _parameters(jobs: Sequence[Job], own: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The parameters of each group with these overrides.

    Raises UserError for some that cannot be meant, or for other raw pictures than those here.
    """
    params, drawn = {}, _world(load())
    for group in dict.fromkeys(group for _, group in jobs):
        params[group] = composed([*own, f"ablation={group}"])
        if _world(params[group]) != drawn:
            raise UserError(
                f"With {own[0]} other raw pictures are drawn than params.yaml has: run `djepa "
                f"compose {own[0]}` first, or name a scale of the same `data` with --scale."
            )
    return params


def _experiments(
    jobs: Sequence[Job], own: Sequence[str], params: dict[str, dict[str, Any]], threads: int
) -> dict[Job, Experiment]:
    """The experiment of each job, in the order of the jobs."""
    code = [git("rev-parse", "HEAD"), git("diff", "HEAD")]
    made = {}
    for seed, group in jobs:
        digest = hash_of([*code, params[group] | {"seed": seed}])[:8]
        name = f"{params[group]['scale']}-{group}-{seed}-{digest}"
        settings = (*own, f"ablation={group}", f"seed={seed}")
        family = params[group]["family"]
        made[seed, group] = Experiment(family, group, seed, name, settings, threads)
    return made


def _world(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params["data"].items() if name != "encode"}


@task(cache_policy=NO_CACHE, task_run_name="prepare")
def prepare(first: Experiment, parent: str) -> None:
    """What all groups share, once: two that start together would both do it."""
    name = f"{first.name}-encode"
    if commit_of(name) is None:
        first.run(name, ["encode"], parent)


@task(cache_policy=NO_CACHE, task_run_name="group {experiment.group}, seed {experiment.seed}")
def one(
    experiment: Experiment, before: Sequence[Experiment], params: dict[str, Any], parent: str
) -> Result:
    """Run one group with one seed, or find that it has run; its figures go to its own run.

    before: the finished experiments that it goes on from, the first one first. params: its own.
    """
    group, seed = experiment.group, experiment.seed
    tags = {"kind": "ablation group", "ablation": group, "seed": str(seed)}
    tracker = open_run(experiment.family, f"{group} seed {seed}", tags, parent)
    tracker.log_params(params)
    about = experiment.about(params)
    tracker.set_tags(with_group(tracker.client, experiment.family, about))
    status = "FAILED"
    try:
        if commit_of(experiment.name) is None:
            experiment.run(experiment.name, experiment.targets, tracker.run_id)
        else:
            get_run_logger().info("%s is there", experiment.name)
        result = experiment.result()
        wait_sent()  # the stages' runs have their ids then
        tracker.log_metrics(result.figures() | experiment.tasks())
        tags = {}
        # Scores by images seen along the whole path, and the runs of its stages, also of those that
        # another group ran. At N, 2N, …: seeds go beyond by parts of a batch, and MLflow takes
        # means over seeds at equal steps only.
        for each in (*before, experiment):
            model, found = GROUPS[each.group].model, each.result()
            scores = {"overall": found.score, "all.overall": found.all_score}
            tracker.log_metrics(
                {f"by_images/geneval.{name}": value for name, value in scores.items()},
                step=GROUPS[each.group].phases * params["training"]["phase1"]["images"],
            )
            for file in (f"train/{model}", f"evaluate/{model}"):
                note = recall(each.read(file).encode())
                if note and note["run"]:
                    tags[f"child.{note['stage'].replace('@', '-')}"] = note["run"]
        tracker.set_tags(tags)
        status = "FINISHED"
        return result
    except StageFailed as failure:
        status = "KILLED" if failure.code < 0 else "FAILED"
        raise
    finally:
        tracker.end(status)


def _jobs(groups: Sequence[str], seeds: int, at_once: int) -> list[Job]:
    """Every seed of every group and of those it goes on from, each after what it needs."""
    if seeds < 1 or at_once < 1:
        raise UserError(f"--seeds {seeds} --at-once {at_once}: give whole numbers from 1 on.")
    unknown = [name for name in groups if name not in GROUPS]
    if unknown or not groups:
        raise UserError(
            f"There is no group {', '.join(unknown) or '(none given)'}: the groups are "
            f"{', '.join(GROUPS)}, given as --groups A,B,C."
        )
    wanted = {name for group in groups for name in path(group)}
    return [(seed, name) for seed in range(seeds) for name in GROUPS if name in wanted]


@flow(name="ablation", log_prints=True)
def ablation(
    seeds: Annotated[int, Field(ge=1)] = 3,
    groups: Sequence[Group] = ("A", "B", "C", "D", "E", "F", "G"),
    scale: str = "ablation",
    at_once: Annotated[int, Field(ge=1)] = 2,
    hours: Annotated[float, Field(ge=0)] | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Run groups of Table 4 and write the table and plot to reports/ablation.

    Args:
        seeds: how many, from 0 on.
        groups: their letters; those they go on from are run too.
        scale: of params/scale.
        at_once: experiments that run side by side.
        hours: after so many, no further experiment is started.
        overrides: NAME=VALUE of parameters, for all groups alike.

    Returns the page. Raises UserError for groups or parameters that there are none of, StageFailed
    when an experiment failed, after the others have run and the table is written.
    """
    from components.evaluation.ablation_report import write_ablation

    started, log = time.monotonic(), get_run_logger()
    own = [f"scale={scale}", *overrides]
    jobs = _jobs(groups, seeds, at_once)
    params = _parameters(jobs, own)
    data()
    threads = max(1, (os.cpu_count() or 1) // at_once)
    made = _experiments(jobs, own, params, threads)
    # What a run has as a parameter cannot change: other code or parameters are other runs.
    code = [git("rev-parse", "HEAD"), git("diff", "HEAD")]
    key = hash_of([sorted(own), code, load()["data"]])
    tags = {"kind": "ablation", "ablation.key": key}
    parent = open_run(made[jobs[0]].family, f"Table 4 at scale {scale}", tags)
    status = "KILLED"
    try:
        prepare(made[jobs[0]], parent.run_id)
        results, failed = _run_all(made, params, parent.run_id, at_once, started, hours)
        status = "FAILED" if failed else "FINISHED"
        if results:
            about = {"scale": scale, "seeds": seeds, "overrides": " ".join(overrides)}
            page = write_ablation(results, REPORT, about)
            parent.log_artifact(REPORT, "ablation")
            create_markdown_artifact(page, key="ablation", description="Table 4")
            log.info("%d of %d experiments are in %s/ablation.md", len(results), len(jobs), REPORT)
    except BaseException:
        stop_all()  # the threads of the tasks wait for their experiments
        raise
    finally:
        parent.end(status)
    if failed:
        raise failed[0]
    return page if results else ""


def _run_all(
    made: dict[Job, Experiment],
    params: dict[str, dict[str, Any]],
    parent: str,
    at_once: int,
    started: float,
    hours: float | None,
) -> tuple[list[Result], list[BaseException]]:
    """Run each experiment once the one it goes on from is done, so many at a time."""
    waiting: list[Job] = list(made)
    running: dict[PrefectFuture[Result], Job] = {}
    done: dict[Job, Result] = {}
    failed: list[BaseException] = []

    def ready() -> Job | None:
        late = hours is not None and time.monotonic() - started > hours * 3600
        free = [job for job in waiting if _before(job) is None or _before(job) in done]
        return free[0] if free and not late and len(running) < at_once else None

    runner: ThreadPoolTaskRunner[Result] = ThreadPoolTaskRunner(max_workers=at_once)
    with runner as threads:
        try:
            while True:
                while (job := ready()) is not None:
                    waiting.remove(job)
                    future = threads.submit(
                        one,
                        {
                            "experiment": made[job],
                            "before": [made[job[0], name] for name in path(job[1])[:-1]],
                            "params": params[job[1]] | {"seed": job[0]},
                            "parent": parent,
                        },
                    )
                    running[future] = job
                if not running:
                    break
                finished = next(as_completed(list(running)))
                job = running.pop(finished)
                result = finished.result(raise_on_failure=False)
                if isinstance(result, Result):
                    done[job] = result
                else:
                    failed.append(result)
        except BaseException:
            stop_all()
            raise
    for seed, group in waiting:
        get_run_logger().warning("group %s, seed %d was not started", group, seed)
    return [done[job] for job in made if job in done], failed


def _before(job: Job) -> Job | None:
    before = GROUPS[job[1]].follows
    return None if before is None else (job[0], before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; a failure is one sentence and exit code 1, a refusal exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.ablation", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="for all groups alike")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", default="A,B,C,D,E,F,G", help="letters, by commas")
    parser.add_argument("--scale", default="ablation", help="of params/scale")
    parser.add_argument("--at-once", type=int, default=2, help="experiments side by side")
    parser.add_argument("--hours", type=float, help="no new experiment is started after so many")
    options = vars(parser.parse_intermixed_args(arguments))
    options["groups"] = [name.strip() for name in options["groups"].split(",") if name.strip()]

    def body() -> None:
        # Refused before Prefect's server is started, as in pipeline.py.
        checkout()
        jobs = _jobs(options["groups"], options["seeds"], options["at_once"])
        _parameters(jobs, [f"scale={options['scale']}", *options["overrides"]])
        print(ablation(**options))

    kept = "What has finished is kept; mend it and run the same command."
    return command("ablation", body, kept)


if __name__ == "__main__":
    sys.exit(main())
