"""Shards that arrive in a folder over time, curated a batch at a time.

OUT/ledger.json says which shards were taken, by name, size, time of change and SHA-256, and in
which batch. OUT/batch.json is the batch in work: a run that was killed goes on with it, so that
a batch's content does not depend on when a run was stopped. Each batch is a curated set of its own.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.files import atomic_file, read_json, write_json
from components.processes import only_one

LEDGER, WORK, LINKS, LOCK = "ledger.json", "batch.json", "links", "curation.lock"
REPEATS = "repeats.parquet"
State = dict[str, Any]  # size in bytes, mtime_ns, sha256 in hex of a shard


@dataclass(frozen=True)
class Batch:
    """New shards to curate: `links` is a folder with links to them, `out` gets the curated set."""

    name: str
    shards: dict[str, State]  # by path below the source
    links: Path
    out: Path


@dataclass(frozen=True)
class Found:
    """What lies in the source: the batch to curate, if any, and in words what was left out."""

    batch: Batch | None
    left: list[str]


@contextmanager
def at_work(source: Path, out: Path) -> Iterator[None]:
    """Keep others from taking the same shards while the block runs.

    Raises UserError when there is no folder `source`, or it and `out` lie in each other; Busy where
    another process curates into `out`.
    """
    source, out = source.resolve(), out.resolve()
    if not source.is_dir():
        raise UserError(f"There is no folder {source}: name the one where shards arrive.")
    if source == out or source in out.parents or out in source.parents:
        raise UserError(f"{out} and {source} lie in each other: write to a folder elsewhere.")
    with only_one(out / LOCK, f"The curation into {out}"):
        yield


def begin(source: Path, out: Path, quiet: float) -> Found:
    """Find the shards that no batch has, and note them as the batch in work.

    Args:
        source: where shards arrive, at any depth: NAME.tar, with NAME.parquet beside it if
            img2dataset lists its keys there. Hidden and half-written (`.tmp`) names count for
            nothing.
        out: where the batches lie.
        quiet: seconds for which a shard has not been changed when it counts as whole.

    A shard that was changed since it was taken is new. One with the bytes of another that was
    taken is noted and left out.
    """
    source, out = source.resolve(), out.resolve()
    ledger = _ledger(out)
    work = out / WORK
    if work.exists():
        note = read_json(work)
        name, shards = note["name"], note["shards"]
        if name not in ledger["batches"] and all(
            _is_as(source / path, state) for path, state in shards.items()
        ):
            return Found(_linked(source, out, name, shards), [])
        # Finished but for this note, or its shards are no longer those.
        for rest in (out / LINKS, *out.glob(f"{name}.tmp-*")):
            shutil.rmtree(rest, ignore_errors=True)
        work.unlink()
    new, left = _new(source, ledger, quiet)
    write_json(out / LEDGER, ledger)
    if not new:
        return Found(None, left)
    name = _free_name(out, ledger)
    write_json(work, {"name": name, "shards": new})
    return Found(_linked(source, out, name, new), left)


def finish(batch: Batch, about: Mapping[str, Any]) -> None:
    """Record the batch in the ledger; from here on its shards are taken.

    about: what is to be known of it later, as JSON.
    """
    out = batch.out.parent
    ledger = _ledger(out)
    taken = {path: state | {"batch": batch.name} for path, state in batch.shards.items()}
    ledger["shards"] |= taken
    ledger["batches"][batch.name] = {"shards": len(batch.shards), **about}
    write_json(out / LEDGER, ledger)
    (out / WORK).unlink(missing_ok=True)
    shutil.rmtree(out / LINKS, ignore_errors=True)


def repeats(batch: Batch) -> int:
    """How many kept pictures have the bytes of one that an earlier batch keeps.

    They are listed in the batch's repeats.parquet: key, shard, batch (the earlier one), first (its
    key there). They stay in the set. What only looks alike is not looked for across batches.
    """
    import duckdb

    names = [name for name in _ledger(batch.out.parent)["batches"] if name != batch.name]
    manifests = [batch.out.parent / name / "manifest.parquet" for name in names]
    earlier = [str(path) for path in manifests if path.is_file()]
    if not earlier:
        return 0
    with duckdb.connect() as db, atomic_file(batch.out / REPEATS) as temporary:
        db.execute(
            "create table repeats as select n.key, n.shard, e.filename.parse_path()[-2] as batch, "
            "min(e.key) as first from read_parquet(?) n join read_parquet(?, filename=true, "
            "union_by_name=true) e using (sha256) group by all order by n.key, batch",
            [str(batch.out / "manifest.parquet"), earlier],
        )
        db.execute(f"copy repeats to '{temporary}' (format parquet)")
        row = db.execute("select count(distinct key) from repeats").fetchone()
    return int(row[0]) if row else 0


def _ledger(out: Path) -> dict[str, Any]:
    path = out / LEDGER
    return read_json(path) if path.exists() else {"shards": {}, "batches": {}}


def _new(source: Path, ledger: dict[str, Any], quiet: float) -> tuple[dict[str, State], list[str]]:
    """The shards to take; the ledger gets those that were taken under another name or time."""
    known = ledger["shards"]
    by_bytes = {state["sha256"]: (path, state["batch"]) for path, state in known.items()}
    new: dict[str, State] = {}
    left: list[str] = []
    for path in sorted(source.rglob("*.tar")):
        name = path.relative_to(source).as_posix()
        if any(part.startswith(".") or ".tmp" in part for part in name.split("/")):
            continue
        if name in known and _is_as(path, known[name]):
            continue
        try:
            if _age(path) < quiet or _age(path.with_suffix(".parquet")) < quiet:
                left.append(f"{name} was changed in the last {quiet / 60:g} minutes")
                continue
            state = _state(path)
        except OSError as problem:
            left.append(f"{name} cannot be read ({problem.strerror})")
            continue
        if not _is_as(path, state):
            left.append(f"{name} changed while it was read")
        elif state["sha256"] in by_bytes:
            first, batch = by_bytes[state["sha256"]]
            known[name] = state | {"batch": batch}
            if first != name:
                left.append(f"{name} has the bytes of {first}, which is in {batch}")
        else:
            new[name] = state
    return new, left


def _age(path: Path) -> float:
    """Seconds since the file was changed; for ever where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _state(path: Path) -> State:
    before = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": before.st_size, "mtime_ns": before.st_mtime_ns, "sha256": digest}


def _is_as(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether size and time of change are still those."""
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (state["size"], state["mtime_ns"])


def _free_name(out: Path, ledger: Mapping[str, Any]) -> str:
    """batch-DATE-N with the first number of today that is not taken."""
    number = 1
    while True:
        name = f"batch-{date.today().isoformat()}-{number}"
        if name not in ledger["batches"] and not (out / name).exists():
            return name
        number += 1


def _linked(source: Path, out: Path, name: str, shards: dict[str, State]) -> Batch:
    """The batch, with links to its shards in a folder of their own."""
    links = out / LINKS / name
    shutil.rmtree(out / LINKS, ignore_errors=True)
    for path in shards:
        link = links / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source / path)
        table = (source / path).with_suffix(".parquet")
        if table.is_file():
            link.with_suffix(".parquet").symlink_to(table)
    return Batch(name, shards, links, out / name)
