"""Curation of the shards that have arrived since the last run: `python -m flows.curation IN OUT`.

Each run that finds new shards in IN leaves one more curated set in OUT, with manifest, rejects,
report and contract (docs/curation.md, "New shards every night").
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from components.errors import UserError, needed

with needed("curation", __name__):
    from prefect import flow, get_run_logger
    from prefect.artifacts import create_markdown_artifact
    from pydantic import Field

    from components.arrivals import Batch, at_work, begin, finish, repeats
    from components.compose import defaults
    from components.files import read_json
    from components.tracking import Tracker
    from flows.command import command
    from flows.curate import spread_on


@flow(name="curation", log_prints=True)
def curation(
    source: Path,
    out: Path,
    overrides: list[str] | None = None,
    workers: Annotated[int, Field(ge=1)] | None = None,
) -> Path | None:
    """Curate the shards that arrived since the last run, as a set of their own.

    Args:
        source: the folder where shards (.tar, as img2dataset writes them) arrive.
        out: the folder that gets a set a run, batch-DATE-N, and the ledger of what was taken.
        overrides: parameters as NAME=VALUE, such as curation.resolution.shorter_side=256.
        workers: processes of one thread each. Left out, curation.workers.

    Returns the folder of the new set, or None where nothing new has arrived. Raises UserError for
    folders or parameters that cannot be meant, and after the batch is recorded when it breaks its
    contract.
    """
    log = get_run_logger()
    params = defaults(overrides or [])
    if workers is not None:
        params["curation"]["workers"] = workers
    with at_work(source, out):
        found = begin(source, out, 60 * float(params["operation"]["quiet_minutes"]))
        for words in found.left:
            log.warning("Left out: %s", words)
        batch = found.batch
        if batch is None:
            log.info("Nothing new in %s", source)
            return None
        log.info("%s: %d new shards", batch.name, len(batch.shards))
        broken = _curate(batch, params)
        again = repeats(batch)
        figures = read_json(batch.out / "summary.json")
        about: dict[str, Any] = {"total": figures["total"], "kept": figures["kept"]}
        about |= {"kept_before": again, "contract": broken or "held"}
        about["overrides"] = overrides or []
        finish(batch, about)
    page = _page(batch, found.left, again, broken)
    create_markdown_artifact(page, key="new-shards", description=f"Curation of {batch.name}")
    log.info("%s holds %d of %d pictures", batch.out, figures["kept"], figures["total"])
    if broken:
        raise UserError(broken)
    return batch.out


def _curate(batch: Batch, params: dict[str, Any]) -> str:
    """Curate the batch unless a killed run had; what its contract finds broken, or nothing."""
    from components.curation.contract import check
    from components.curation.curate import curate

    if not (batch.out / "manifest.parquet").exists():
        with spread_on("processes", None, int(params["curation"]["workers"])) as each:
            curate(batch.links, batch.out, params, Tracker(), each=each)
    try:
        place = batch.out
        check(place, place / "contract.json", place / "contract", params, Tracker())
    except UserError as problem:
        return str(problem)
    return ""


def _page(batch: Batch, left: Sequence[str], again: int, broken: str) -> str:
    """The batch's report in Markdown, with what is to be known of the run."""
    lines = [(batch.out / "report.md").read_text(), f"In `{batch.out}`.", ""]
    lines.append(f"Contract: {broken or 'held'}")
    if again:
        lines += ["", f"{again} kept pictures are, byte for byte, in earlier batches too: "]
        lines[-1] += "`repeats.parquet` lists them."
    if left:
        lines += ["", "Left out:", "", *(f"- {words}" for words in left)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.curation", description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="where shards arrive")
    parser.add_argument("out", type=Path, metavar="OUT", help="gets a set a run, and the ledger")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="parameters")
    parser.add_argument("--workers", type=int, help="processes of one thread each")
    options = vars(parser.parse_intermixed_args(arguments))
    kept = "The batch is kept; mend it and run the same command."
    return command("curation", lambda: curation(**options), kept)


if __name__ == "__main__":
    # By its name, as the workers import it: of __main__ they would get a copy.
    from flows.curation import main as run

    sys.exit(run())
