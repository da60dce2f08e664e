"""Trains the starter again and packs it: `python -m flows.starter`.

Draws and curates the world of scale `starter`, trains phase 1, packs the model into
components/starter/model, scores what was packed and writes the scores into its card.
"""

import argparse
import sys
from collections.abc import Sequence

from components.errors import needed

with needed("starter", __name__):
    from prefect import flow

    from components.compose import load
    from components.home import checkout
    from components.lockfile import check_lock
    from flows.command import command
    from flows.pipeline import pipeline
    from flows.process import run

TRAINED = ("curate", "contract", "encode", "phase1")


@flow(name="starter", log_prints=True)
def starter(overrides: Sequence[str] = ()) -> None:
    """Train, pack and score the starter; what is up to date is not run again.

    Args:
        overrides: NAME=VALUE of parameters beside scale=starter.
    """
    pipeline(overrides=["scale=starter", *overrides], stages=TRAINED)
    pack = [sys.executable, "-m", "components.cli", "pack"]
    run("pack", pack)
    pipeline(stages=["evaluate-beside@starter"])
    run("pack", [*pack, "--scores", "starter"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.starter", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="NAME=VALUE beside scale=starter")
    overrides = parser.parse_args(arguments).overrides

    def body() -> None:
        checkout()
        load()
        check_lock()
        starter(overrides)

    kept = "Finished stages are kept; mend it and run the same command."
    return command("starter", body, kept)


if __name__ == "__main__":
    sys.exit(main())
