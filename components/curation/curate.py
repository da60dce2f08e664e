"""Raw shards in, curated shards out: passes, decisions, notions, tables, report."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.curation.decisions import Verdicts, drop_synthetic, find_duplicates, rows_in
from components.curation.detectors import model_filters
from components.curation.filters import cheap_filters
from components.curation.notions import (
    Notion,
    NotionFinder,
    NotionTables,
    choose,
    column,
)
from components.curation.passes import VERDICT, Job
from components.curation.pool import run_pass
from components.curation.report import write_report
from components.curation.shards import list_shards
from components.curation.summary import Summary
from components.errors import UserError
from components.files import atomic_file, hash_of, write_json
from components.tracking import Tracker

REJECTED = [("key", pa.string()), ("shard", pa.string()), *VERDICT]


def curate(
    source: Path,
    out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
    metrics_out: Path | None = None,
) -> None:
    """Filter the shards in `source` and write what is kept to the folder `out`.

    source: webdataset shards as img2dataset writes them (`NAME.tar`, `NAME.parquet`).
    out: `NAME.tar` of the kept samples, their bytes unchanged; manifest.parquet, a row a kept
    sample (key, shard, caption, width, height in px, source, synthetic, sha256, score_*,
    notion_* bool, notion_words); rejects.parquet (key, shard, filter, score, threshold,
    reason); notions.parquet, cooccurrence.parquet, distributions.parquet; summary.json;
    report.html. The same shards and params give the same bytes.
    params: the composed parameters, of which `curation` is read.
    metrics_out: the summary's figures and the CPU seconds of each filter, over all processes.

    A run that was killed goes on from the shards it had finished (a folder beside `out`,
    removed at the end). Raises UserError when there is no shard, a parameter does not fit, or
    a worker process dies.
    """
    source, out = Path(source), Path(out)
    curation = params["curation"]
    check_settings(curation)
    shards = list_shards(source)
    work = _work_folder(out, shards, curation)
    job, workers = Job(curation, work), int(curation["workers"])

    run_pass("scan", shards, job, workers)
    dropped, kept = find_duplicates(shards, job)
    print(f"curate: {len(dropped)} repeated, {sum(map(len, kept.values()))} to judge", flush=True)
    run_pass("judge", shards, job, workers, kept)
    for shard in shards:
        kept[shard.stem] = [r["key"] for r in rows_in(job.path(shard, "judge.parquet"), ["key"])]
    too_many = drop_synthetic(shards, job, kept)
    for stem, keys in kept.items():
        kept[stem] = [key for key in keys if (stem, key) not in too_many]
    run_pass("pack", shards, job, workers, kept)

    finder = NotionFinder(curation["notions"])
    notions = _choose_notions(shards, job, kept, finder)
    result = _Result(job, kept, dropped | too_many, notions, finder)
    summary = result.write(shards, work)
    figures = summary.figures()
    write_json(work / "summary.json", figures)
    write_report(work / "report.html", source, shards, job, summary)
    _publish(work, out, shards)
    metrics = figures | {"cpu_seconds": {n: round(s, 2) for n, s in summary.seconds.items()}}
    if metrics_out is not None:
        write_json(Path(metrics_out), metrics)
    tracker.log_metrics(summary.flat())
    print(summary.line(), flush=True)


def check_settings(curation: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that cannot be meant, naming it."""
    checks: list[tuple[str, Any, bool, str]] = [
        ("workers", curation["workers"], curation["workers"] >= 1, "at least 1"),
        ("limits.batch", curation["limits"]["batch"], curation["limits"]["batch"] >= 1,
         "at least 1"),
        ("aspect.ratio", curation["aspect"]["ratio"], curation["aspect"]["ratio"] >= 1,
         "at least 1"),
        ("faces.policy", curation["faces"]["policy"],
         curation["faces"]["policy"] in ("keep", "tag", "drop"), "keep, tag or drop"),
        ("synthetic.share", curation["synthetic"]["share"],
         0 <= curation["synthetic"]["share"] <= 1, "a share from 0 to 1"),
        ("duplicates.distance", curation["duplicates"]["distance"],
         0 <= curation["duplicates"]["distance"] <= 64, "0 to 64 bits of 256"),
    ]  # fmt: skip
    for kind, words in [
        *curation["notions"]["attributes"].items(),
        ("stop_words", curation["notions"]["stop_words"]),
    ]:
        for word in words:  # YAML reads a bare on, off, yes or no as true or false
            checks.append((f"notions … {kind}", word, isinstance(word, str), "a word in quotes"))
    for name, value, fits, wanted in checks:
        if not fits:
            raise UserError(f"curation.{name} is {value!r}: set it to {wanted} in params/.")


def _work_folder(out: Path, shards: Sequence[Path], curation: Mapping[str, Any]) -> Path:
    """The folder of this input and these settings, beside `out`; older ones are removed."""
    inputs = [*shards, *(p for s in shards if (p := s.with_suffix(".parquet")).exists())]
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in inputs]
    # The number of processes changes no byte, and the contract comes later.
    settings = {k: v for k, v in curation.items() if k not in ("workers", "contract")}
    code = [p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))]
    work = out.with_name(f"{out.name}.tmp-{hash_of([files, settings, code])}")
    for other in out.parent.glob(f"{out.name}.tmp-{'[0-9a-f]' * 16}"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _choose_notions(
    shards: Sequence[Path], job: Job, kept: Mapping[str, list[str]], finder: NotionFinder
) -> list[Notion]:
    counts: Counter[Notion] = Counter()
    for shard in shards:
        inside = set(kept[shard.stem])
        for row in rows_in(job.path(shard, "scan.parquet"), ["key", "caption"]):
            if row["key"] in inside:
                counts.update(finder.find(row["caption"]))
    rules = job.curation["notions"]
    return choose(counts, rules["least"], rules["entities"])


class _Result:
    """Writes the tables of a finished run, one shard at a time."""

    def __init__(
        self,
        job: Job,
        kept: Mapping[str, list[str]],
        dropped: Verdicts,
        notions: Sequence[Notion],
        finder: NotionFinder,
    ) -> None:
        self.job, self.kept, self.dropped = job, kept, dropped
        self.notions, self.finder = list(notions), finder
        self.filters = [*cheap_filters(job.curation), *model_filters(job.curation)]
        self.scores = [f"score_{f.name}" for f in self.filters]
        self.manifest = pa.schema(
            [
                ("key", pa.string()), ("shard", pa.string()), ("caption", pa.string()),
                ("width", pa.int32()), ("height", pa.int32()), ("source", pa.string()),
                ("synthetic", pa.bool_()), ("sha256", pa.string()),
                *[(name, pa.float64()) for name in self.scores],
                *[(column(n.word), pa.bool_()) for n in self.notions],
                ("notion_words", pa.list_(pa.string())),
            ]
        )  # fmt: skip

    def write(self, shards: Sequence[Path], work: Path) -> Summary:
        """Write manifest, rejects and notion tables into `work`; return the counts."""
        tables, summary = NotionTables(self.notions), Summary(self.filters, self.job.curation)
        rejected = pa.schema(REJECTED)
        with (
            atomic_file(work / "manifest.parquet") as manifest_path,
            atomic_file(work / "rejects.parquet") as rejects_path,
            pq.ParquetWriter(manifest_path, self.manifest) as manifest,
            pq.ParquetWriter(rejects_path, rejected) as rejects,
        ):
            for shard in shards:
                rows = list(self._rows(shard))
                summary.add(shard, rows, self.job)
                good = [row for row in rows if row["filter"] is None]
                self._notions(good, tables)
                bad = [row for row in rows if row["filter"] is not None]
                manifest.write_table(pa.Table.from_pylist(good, schema=self.manifest))
                rejects.write_table(pa.Table.from_pylist(bad, schema=rejected))
        rules = self.job.curation["notions"]
        for name, frame in (
            ("notions", tables.frequencies()),
            ("cooccurrence", tables.cooccurrence()),
            ("distributions", tables.distributions(rules["side_bin"], rules["aspect_bin"])),
        ):
            with atomic_file(work / f"{name}.parquet") as path:
                frame.to_parquet(path, index=False)
        summary.frequencies = tables.frequencies()
        return summary

    def _rows(self, shard: Path) -> Iterator[dict[str, Any]]:
        """Join scan, judge and decisions: one row a key of the shard."""
        judged = {
            row["key"]: row
            for row in pq.read_table(self.job.path(shard, "judge.parquet")).to_pylist()
        }
        for row in pq.read_table(self.job.path(shard, "scan.parquet")).to_pylist():
            row["shard"] = shard.stem
            if row["filter"] is None:
                row |= judged.get(row["key"], {})
                row |= self.dropped.get((shard.stem, row["key"]), {})
            yield row

    def _notions(self, rows: Sequence[dict[str, Any]], tables: NotionTables) -> None:
        """Add notion columns to the kept rows and count them."""
        place = {notion: i for i, notion in enumerate(self.notions)}
        names = [column(notion.word) for notion in self.notions]
        present = np.zeros((len(rows), len(names)), bool)
        for i, row in enumerate(rows):
            found = [n for n in self.finder.find(row["caption"]) if n in place]
            present[i, [place[n] for n in found]] = True
            row["notion_words"] = [n.word for n in found]
            row |= {name: bool(v) for name, v in zip(names, present[i], strict=True)}
        tables.add(present, ((r["source"], r["width"], r["height"]) for r in rows))


def _publish(work: Path, out: Path, shards: Sequence[Path]) -> None:
    """Drop the passes' own files and give the folder its name."""
    for shard in shards:
        for ending in ("scan.parquet", "scan.json", "judge.parquet", "judge.json"):
            (work / f"{shard.stem}.{ending}").unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
