"""Makes room: `python -m flows.cleanup` lists what nobody uses any more, --remove removes it.

By hand the list comes first, since a snapshot that is gone cannot be gone on with; a schedule
says for itself that it removes.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from components.errors import needed

with needed("cleanup", __name__):
    from prefect import flow, get_run_logger
    from prefect.artifacts import create_table_artifact
    from pydantic import Field

    from components.cleanup import collect, leftovers, remove
    from components.compose import load
    from components.home import checkout, djepa_home
    from components.registered import pinned
    from flows.command import command


@flow(name="cleanup", log_prints=True)
def cleanup(
    days: Annotated[float, Field(ge=0)] | None = None,
    dry_run: bool = True,
    cache: bool = False,
) -> int:
    """List, and unless it is a dry run remove, what killed and old runs left on the disk.

    Args:
        days: what was touched since stays. Left out, operation.keep_days of params.yaml.
        dry_run: list only.
        cache: of DVC's cache too, what no commit, experiment, checkout or registered model names.

    Returns the bytes that are, or would be, free. Raises UserError where the cache cannot be
    cleaned now, after all else is done.
    """
    log, root = get_run_logger(), checkout()
    days = float(load()["operation"]["keep_days"]) if days is None else days
    rows: list[dict[str, Any]] = []
    total = 0

    def note(kind: str, what: str, size: int, age: float | None, done: str) -> None:
        rows.append({"kind": kind, "what": what, "MB": round(size / 1e6, 1)})
        rows[-1] |= {"days": "" if age is None else round(age, 1), "done": done}
        log.info("%s %s, %.1f MB: %s", kind, what, size / 1e6, done)

    for one in leftovers(djepa_home(), root, days):
        gone = not dry_run and remove(one, root)
        done = "removed" if gone else "would be removed" if dry_run else "in use by now"
        total += one.bytes if gone or dry_run else 0
        note(one.kind, str(one.path), one.bytes, one.days, done)
    try:
        if cache:
            files, size = collect(root, list(pinned()), dry_run)
            done = "would be removed" if dry_run else "removed"
            note("DVC's cache", f"{files} files that nothing names", size, None, done)
            total += size
    finally:
        words = "would be free" if dry_run else "are free"
        log.info("%d leftovers, %.1f MB %s", len(rows), total / 1e6, words)
        create_table_artifact(rows, key="clean-up", description=f"{total / 1e6:.1f} MB {words}")
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.cleanup", description=__doc__)
    parser.add_argument("--days", type=float, help="what was touched since stays")
    parser.add_argument("--remove", action="store_true", help="not only list")
    parser.add_argument("--cache", action="store_true", help="DVC's cache too")
    options = parser.parse_args(arguments)

    def body() -> None:
        checkout()
        load()
        cleanup(options.days, not options.remove, options.cache)

    return command("cleanup", body)


if __name__ == "__main__":
    sys.exit(main())
