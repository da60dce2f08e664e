"""What only all units together can tell: repeats, the share of synthetic pictures, the notions.

Each decision goes through DuckDB files and reads the passes' tables one after the other, so
that memory does not grow with the number of pictures; each writes one file, whole or absent.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import floor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.curation.chain import EXACT, KEY, NEAR
from components.curation.database import Database, open_database
from components.curation.duplicates import Comparison
from components.curation.notions import Notion, choose
from components.curation.passes import Job, verdict
from components.curation.sources import Unit
from components.files import atomic_file, read_json, write_json


def find_repeats(units: Sequence[Unit], job: Job) -> int:
    """Compare all pictures that passed the scan; return how many repeat an earlier one.

    Writes passes/repeats.parquet; the first in the input's order is the one that stays.
    """
    path = job.work / "passes" / "repeats.parquet"
    if not path.exists():
        rules, memory = job.curation["duplicates"], job.curation["limits"]["memory"]
        columns = ["row", "key", "sha256", "phash", "thumb"]
        with open_database(job.work / "repeats", memory) as db, atomic_file(path) as temporary:
            comparison = Comparison(db, int(rules["distance"]))
            for unit in units:
                for table in _still_in(job.path(unit, "scan.parquet"), columns):
                    comparison.add(unit.name, *(table[name].to_pylist() for name in columns))
            comparison.find(float(rules["colour"]))
            comparison.write(temporary)
    return pq.read_metadata(path).num_rows


def repeat_verdict(repeat: dict[str, Any], distance: int) -> dict[str, Any]:
    """The verdict on a row of passes/repeats.parquet."""
    first, bits = repeat["first"], repeat["bits"]
    if repeat["kind"] == "key":
        return verdict(KEY, None, None, f"key {first} comes earlier in the input")
    if repeat["kind"] == "sha256":
        return verdict(EXACT, 0.0, 0.0, f"same bytes as {first}")
    return verdict(NEAR, float(bits), float(distance), f"{bits} bits of 256 from {first}")


def drop_synthetic(units: Sequence[Unit], job: Job) -> float:
    """Choose the synthetic pictures beyond their share; return the share there was.

    Writes passes/capped.parquet (unit, row). Those with the lowest random numbers stay.
    """
    path = job.work / "passes" / "capped.parquet"
    figure = job.work / "passes" / "synthetic.json"
    if not figure.exists():
        most = float(job.curation["synthetic"]["share"])
        with (
            open_database(job.work / "synthetic", job.curation["limits"]["memory"]) as db,
            atomic_file(path) as temporary,
        ):
            real, synthetic = _gather_synthetic(units, job, db)
            room = synthetic_room(real, synthetic, most)
            db.execute(
                "copy (select unit, row from (select *, row_number() over (order by draw, place, "
                f"row) as n from part) where n > {room} order by place, row) to '{temporary}' "
                "(format parquet)"
            )
        write_json(figure, {"share": synthetic / max(real + synthetic, 1)})
    return float(read_json(figure)["share"])


def _gather_synthetic(units: Sequence[Unit], job: Job, db: Database) -> tuple[int, int]:
    """Fill the table `part` with the synthetic pictures still in; count the real and those."""
    db.execute("create table part (place bigint, unit varchar, row bigint, draw double)")
    joined = "from read_parquet(?) s join read_parquet(?) j using (row) where j.filter is null"
    real = 0
    for place, unit in enumerate(units):
        tables = [str(job.path(unit, f"{name}.parquet")) for name in ("scan", "judge")]
        db.execute(
            f"insert into part select ?, ?, s.row, s.draw {joined} and s.synthetic",
            [place, unit.name, *tables],
        )
        real += _one(db.execute(f"select count(*) {joined} and not s.synthetic", tables))
    return real, _one(db.execute("select count(*) from part"))


def synthetic_room(real: int, synthetic: int, share: float) -> int:
    """How many of `synthetic` pictures may stay so that they are at most `share` of what stays.

    real: number of pictures that are not synthetic and stay.
    """
    if share >= 1:
        return synthetic
    return min(synthetic, floor(share * real / (1 - share) + 1e-9))


def capped(unit: Unit, job: Job) -> set[int]:
    """The unit's rows that `drop_synthetic` chose."""
    path = job.work / "passes" / "capped.parquet"
    return set(pq.read_table(path, filters=[("unit", "=", unit.name)])["row"].to_pylist())


def choose_notions(units: Sequence[Unit], job: Job) -> list[Notion]:
    """Count the notions of the kept captions and choose those that get a column.

    Writes passes/notions.json.
    """
    path = job.work / "passes" / "notions.json"
    if not path.exists():
        rules = job.curation["notions"]
        with open_database(job.work / "notions", job.curation["limits"]["memory"]) as db:
            often = _count_notions(units, job, db, rules["least"])
        found = {Notion(word, kind): n for word, kind, n in often}
        chosen = choose(found, rules["least"], rules["entities"])
        write_json(path, [[notion.word, notion.kind] for notion in chosen])
    return [Notion(word, kind) for word, kind in read_json(path)]


def _count_notions(
    units: Sequence[Unit], job: Job, db: Database, least: int
) -> list[tuple[str, str, int]]:
    """Word, kind and number of captions of what is in at least `least` kept captions."""
    db.execute("create table counts (word varchar, kind varchar, n bigint)")
    for unit in units:
        counts = Counter(
            (word, kind)
            for row in _kept(unit, job)
            for word, kind in zip(row["words"], row["kinds"], strict=True)
        )
        if counts:
            words, kinds = zip(*counts, strict=True)
            db.register("part", pa.table({"word": words, "kind": kinds, "n": [*counts.values()]}))
            db.execute("insert into counts select * from part")
            db.unregister("part")
    return db.execute(
        "select word, kind, sum(n)::bigint from counts group by word, kind having sum(n) >= ?",
        [least],
    ).fetchall()


def _kept(unit: Unit, job: Job) -> Iterator[dict[str, Any]]:
    out = capped(unit, job)
    for table in _still_in(job.path(unit, "judge.parquet"), ["row", "words", "kinds"]):
        yield from (row for row in table.to_pylist() if row["row"] not in out)


def _still_in(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table that no filter has rejected, a stretch at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[*columns, "filter"]):
            yield batch.filter(pa.compute.is_null(batch["filter"]))


def _one(result: Database) -> int:
    row = result.fetchone()
    return int(row[0]) if row else 0
