"""The last passes: the curated shard, its part of the tables, the report's pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.curation.chain import SYNTHETIC
from components.curation.decisions import capped, repeat_verdict
from components.curation.notions import Notion, NotionTables, column
from components.curation.passes import VERDICT, Job, ready, repeated, verdict
from components.curation.pictures import DamagedPicture, content_extension, decode
from components.curation.report import thumbnail_uri
from components.curation.rows import ROWS, in_batches, read_rows, write_rows
from components.curation.shards import Sample, write_shard
from components.curation.sources import Unit, read_unit
from components.curation.stopwatch import Stopwatch
from components.curation.summary import Summary
from components.files import atomic_file, read_json, write_json

REJECTED = [("key", pa.string()), ("shard", pa.string()), *VERDICT]
LISTED = [
    ("key", pa.string()),
    ("shard", pa.string()),
    ("caption", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("source", pa.string()),
    ("synthetic", pa.bool_()),
    ("sha256", pa.string()),
]


def pack(unit: Unit, job: Job) -> None:
    """Write the curated shard, and the unit's part of manifest, rejects and counts.

    Pictures keep their bytes; the extension is that of their content. A caption that was
    written anew replaces the old one, which the JSON keeps as `caption_before`.
    """
    watch, filters = Stopwatch(), ready(job, dear=False)
    notions = [Notion(*pair) for pair in read_json(job.work / "passes" / "notions.json")]
    rules = job.curation["notions"]
    tables = NotionTables(notions, rules["side_bin"], rules["aspect_bin"])
    summary = Summary(filters, job.curation)
    captions: dict[int, str] = {}
    with (
        watch("tables"),
        write_rows(job.path(unit, "manifest.parquet"), manifest_fields(job, notions)) as manifest,
        write_rows(job.path(unit, "rejects.parquet"), REJECTED) as rejects,
    ):
        for rows in in_batches(_joined(unit, job), ROWS):
            for row in rows:
                summary.add(row)
            kept = [row for row in rows if row["filter"] is None]
            captions |= {row["row"]: row["caption"] for row in kept}
            _mark_notions(kept, notions, tables)
            manifest.add(kept)
            rejects.add(row for row in rows if row["filter"] is not None)
    if captions:
        with atomic_file(job.result(f"{unit.name}.tar")) as temporary:
            numbered = enumerate(watch.over("read", read_unit(unit, job.curation)))
            write_shard(
                temporary, (_members(s, captions[row]) for row, s in numbered if row in captions)
            )
    counts = {"summary": summary.state(), "notions": tables.state()}
    write_json(job.path(unit, "pack.json"), counts | {"seconds": watch.stop("write")})


def manifest_fields(job: Job, notions: Sequence[Notion]) -> list[tuple[str, pa.DataType]]:
    """The manifest's columns: what a sample is, its scores, its notions."""
    return [
        *LISTED,
        *[(f"score_{f.name}", pa.float64()) for f in ready(job, dear=False).scored],
        *[(column(n.word), pa.bool_()) for n in notions],
        ("notion_words", pa.list_(pa.string())),
    ]


def _joined(unit: Unit, job: Job) -> Iterator[dict[str, Any]]:
    """One row a sample of the unit, with the verdict of the first filter it did not pass.

    The tables of the two passes have their rows in the same order.
    """
    repeats, beyond = repeated(unit, job), capped(unit, job)
    distance = int(job.curation["duplicates"]["distance"])
    share = read_json(job.work / "passes" / "synthetic.json")["share"]
    most = float(job.curation["synthetic"]["share"])
    judged = read_rows(job.path(unit, "judge.parquet"))
    for row in read_rows(job.path(unit, "scan.parquet")):
        row["shard"] = unit.name
        if row["filter"] is not None:
            yield row
        elif row["row"] in repeats:
            yield row | repeat_verdict(repeats[row["row"]], distance)
        else:
            row |= next(judged)
            if row["row"] in beyond:
                why = f"synthetic, of which {share:.3f} came and {most:g} may stay"
                row |= verdict(SYNTHETIC, share, most, why)
            yield row


def _mark_notions(
    rows: Sequence[dict[str, Any]], notions: Sequence[Notion], tables: NotionTables
) -> None:
    """Give kept rows their notion columns, and count them."""
    place = {notion: i for i, notion in enumerate(notions)}
    names = [column(notion.word) for notion in notions]
    present = np.zeros((len(rows), len(notions)), bool)
    for i, row in enumerate(rows):
        found = [Notion(*pair) for pair in zip(row["words"], row["kinds"], strict=True)]
        found = [notion for notion in found if notion in place]
        present[i, [place[notion] for notion in found]] = True
        row["notion_words"] = [notion.word for notion in found]
        row |= dict(zip(names, present[i].tolist(), strict=True))
    tables.add(present, [(r["source"], r["width"], r["height"]) for r in rows])


def _members(sample: Sample, caption: str) -> tuple[str, Mapping[str, bytes]]:
    """Key and members of a curated sample: picture, caption, metadata."""
    picture = sample.members[sample.extension]
    text, listed = sample.members.get("txt"), sample.members.get("json")
    meta = dict(sample.meta)
    if caption != sample.caption:
        meta |= {"caption": caption, "caption_before": sample.caption}
        text = listed = None
    return sample.key, {
        content_extension(picture) or sample.extension: picture,
        "txt": caption.encode() if text is None else text,
        "json": json.dumps(meta, ensure_ascii=False).encode() if listed is None else listed,
    }


def show(unit: Unit, job: Job) -> None:
    """Write the thumbnails that the report shows of the unit: {key: data URI}."""
    wanted = set(read_json(job.work / "passes" / "wanted.json").get(unit.name, ()))
    shown: dict[str, str] = {}
    limits, side = job.curation["limits"], int(job.curation["report"]["thumbnail"])
    for sample in read_unit(unit, job.curation):
        if sample.key not in wanted or sample.error:
            continue
        try:
            pixels = decode(sample.members[sample.extension], limits)
        except DamagedPicture:
            continue
        shown.setdefault(sample.key, thumbnail_uri(pixels, side))
        if len(shown) == len(wanted):
            break
    write_json(job.path(unit, "show.json"), shown)
