"""One more round of data feedback: `python -m flows.refresh`, for a schedule or by hand.

Appends a round to feedback.rounds, composes the parameters, brings the pipeline up to date and
commits parameters and dvc.lock on a branch. A refresh that was stopped goes on with its round.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from components.errors import needed

with needed("refresh", __name__):
    from prefect import flow, get_run_logger
    from pydantic import Field

    from components.branch import check_branch, go_on_from
    from components.compose import ROUNDS, append_round, load
    from components.home import checkout
    from flows.command import command
    from flows.pipeline import commit_results, pipeline
    from flows.worktree import fill


@flow(name="refresh", log_prints=True)
def refresh(
    labels: Literal["auto", "people"] = "auto",
    branch: Annotated[str, Field(min_length=1)] = "refresh",
) -> str:
    """Train one more round with a new critic; returns the commit that has it.

    Args:
        labels: who says which of the model's pictures are good: `auto`, the benchmark's rules, or
            `people`, for whom the run pauses.
        branch: the git branch that gets the commit; made where it is missing.
    """
    log = get_run_logger()
    start_from(branch)
    newest = list(load()["feedback"]["rounds"])[-1]
    if finished(newest):
        newest = append_round(labels)
        log.info("Round %s was added to %s", newest, ROUNDS)
    else:
        log.info("Round %s is not finished: this run goes on with it", newest)
    pipeline()
    said = load()["feedback"]["rounds"][newest]["labels"]
    made = commit_results(branch, f"Round {newest} of data feedback, labels: {said}")
    log.info("Commit %s on the branch %s has the round", made[:10], branch)
    return made


def start_from(branch: str) -> None:
    """See that the commit will be possible; a worktree's refresh goes on from the branch's rounds.

    By hand it goes on from what is checked out: nobody's checkout is moved.
    """
    if go_on_from(branch):
        fill()
    check_branch(branch)


def finished(round_name: str) -> bool:
    """Whether DVC finds nothing to do for the round's model and its pictures."""
    from dvc.repo import Repo

    with Repo() as repo:
        return not repo.status(targets=[f"phase2@{round_name}", f"evaluate@{round_name}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.refresh", description=__doc__)
    parser.add_argument("--labels", choices=("auto", "people"), default="auto")
    parser.add_argument("--branch", default="refresh", help="the branch that gets the commit")
    options = vars(parser.parse_args(arguments))

    def body() -> None:
        checkout()
        refresh(**options)

    return command("refresh", body, "The round is kept; mend it and run the same command.")


if __name__ == "__main__":
    sys.exit(main())
