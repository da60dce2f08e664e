"""Raw pictures in, curated shards out: passes, decisions, tables, report."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.curation.chain import chain
from components.curation.decisions import choose_notions, drop_synthetic, find_repeats
from components.curation.notions import Notion, NotionFinder, NotionTables
from components.curation.own import own_files
from components.curation.pack import REJECTED, manifest_fields
from components.curation.passes import Job
from components.curation.pool import Each, pending, run_pass
from components.curation.report import markdown, write_report
from components.curation.sources import Unit, find_units, fingerprint
from components.curation.summary import Summary
from components.errors import UserError
from components.files import atomic_file, hash_of, read_json, remove_folder, write_json
from components.tracking import Tracker

INPUTS = "inputs.txt"
GROUP = 32768  # rows of the manifest written at a time
TABLES = ("notions", "cooccurrence", "distributions")


def curate(
    source: Path,
    out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
    metrics_out: Path | None = None,
    each: Each = run_pass,
) -> None:
    """Filter the pictures in `source` and write what is kept to the folder `out`.

    source: webdataset shards as img2dataset writes them, parquet files with pictures, or
    folders of pictures with metadata (see sources.py).
    out: `NAME.tar` of the kept samples, their pictures' bytes unchanged; manifest.parquet, a row
    a kept sample (key, shard, caption, width, height in px, source, synthetic, sha256, score_*,
    notion_* bool, notion_words); rejects.parquet (key, shard, filter, score, threshold,
    reason); notions.parquet, cooccurrence.parquet, distributions.parquet; summary.json;
    report.html and report.md. The same pictures and params give the same bytes.
    params: the composed parameters, of which `curation` is read.
    metrics_out: the summary's figures and the CPU seconds of each filter, over all processes.
    each: runs a pass on many units; by default in `curation.workers` processes here.

    Memory does not grow with the number of pictures. A run that was killed goes on from the
    shards it had finished (a folder beside `out`, removed at the end). Raises UserError when
    there is nothing to read, `out` holds something else, a parameter does not fit, or a worker
    process dies.
    """
    source, out = Path(source), Path(out)
    curation = params["curation"]
    check_settings(curation)
    check_folders(source, out)
    job = Job(curation, _work_folder(source, out, curation))
    units = _begin(source, job)

    def over_all(name: str, some: Sequence[Unit] = units) -> None:
        left = pending(name, some, job)
        if len(left) < len(some):
            print(f"curate {name}: {len(some) - len(left)} of {len(some)} shards found finished")
        if left:
            each(name, left, job, int(curation["workers"]))

    over_all("scan")
    print(f"curate: {find_repeats(units, job)} repeated pictures", flush=True)
    over_all("judge")
    drop_synthetic(units, job)
    notions = choose_notions(units, job)
    over_all("pack")
    summary, tables = _add_up(units, job, notions)
    wanted: dict[str, list[str]] = {}
    for heap in summary.nearest.values():
        for _, unit, key, _ in heap:
            wanted.setdefault(unit, []).append(key)
    write_json(job.work / "passes" / "wanted.json", wanted)
    over_all("show", [unit for unit in units if unit.name in wanted])
    shown = {
        (unit.name, key): picture
        for unit in units
        if unit.name in wanted
        for key, picture in read_json(job.path(unit, "show.json")).items()
    }
    figures = summary.figures()
    _write_tables(units, job, notions, tables)
    write_json(job.result("summary.json"), figures)
    shown_settings = {k: v for k, v in curation.items() if k != "workers"}
    title = f"Curation of {source.resolve().name}"
    write_report(job.result("report.html"), title, summary, tables, shown, shown_settings)
    with atomic_file(job.result("report.md")) as temporary:
        temporary.write_text(markdown(figures))
    _publish(job.work, out)
    if metrics_out is not None:
        write_json(Path(metrics_out), figures | {"cpu_seconds": summary.cpu_seconds()})
    tracker.log_metrics(summary.flat())
    tracker.log_artifact(out / "report.html", "curation")
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
    memory = curation["limits"]["memory"]
    known = re.fullmatch(r"\d+(\.\d+)? ?[KMGT]i?B", str(memory)) is not None
    checks.append(("limits.memory", memory, known, "a number of bytes such as 512MB"))
    for name, value, fits, wanted in checks:
        if not fits:
            raise UserError(f"curation.{name} is {value!r}: set it to {wanted} in params/.")
    chain(curation)
    NotionFinder(curation["notions"])


def check_folders(source: Path, out: Path) -> None:
    """Refuse an output that would overwrite the input or somebody's own files."""
    if not source.is_dir():
        raise UserError(f"There is no folder {source}: name a folder of shards or pictures.")
    inside, outside = out.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise UserError(f"{out} and {source} lie in each other: write to a folder elsewhere.")
    ours = all((out / f"{name}.parquet").exists() for name in ("manifest", "rejects"))
    if not ours and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} holds something else than a curated set, which would be overwritten: "
            "remove it or name another folder."
        )


def _work_folder(source: Path, out: Path, curation: Mapping[str, Any]) -> Path:
    """The folder of this input and these settings, beside `out`; older ones are removed."""
    # The number of processes changes no byte, and the contract comes later.
    settings = {k: v for k, v in curation.items() if k not in ("workers", "contract")}
    files = [*sorted(Path(__file__).parent.glob("*.py")), *own_files(curation["own"])]
    code = [path.read_text() for path in files]
    work = out.with_name(f"{out.name}.tmp-{hash_of([str(source.resolve()), settings, code])}")
    for other in out.parent.glob(f"{out.name}.tmp-{'[0-9a-f]' * 16}"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    for part in ("passes", "result"):
        (work / part).mkdir(parents=True, exist_ok=True)
        for file in (work / part).glob("*.tmp-*"):  # of a process that was killed
            file.unlink()
    return work


def _begin(source: Path, job: Job) -> list[Unit]:
    """List the input. Where it changed since a killed run, that run's work is forgotten."""
    units = find_units(source, job.work / "index.parquet", job.curation)
    found, note = fingerprint(units), job.work / INPUTS
    if not note.exists() or note.read_text() != found:
        for part in ("passes", "result"):
            shutil.rmtree(job.work / part)
            (job.work / part).mkdir()
        with atomic_file(note) as temporary:
            temporary.write_text(found)
    return units


def _add_up(
    units: Sequence[Unit], job: Job, notions: Sequence[Notion]
) -> tuple[Summary, NotionTables]:
    rules = job.curation["notions"]
    tables = NotionTables(notions, rules["side_bin"], rules["aspect_bin"])
    summary = Summary(chain(job.curation), job.curation)
    for unit in units:
        counts = read_json(job.path(unit, "pack.json"))
        summary.merge(counts["summary"])
        tables.merge(counts["notions"])
        summary.seconds.update(counts["seconds"])
        for name in ("scan", "judge"):
            summary.seconds.update(read_json(job.path(unit, f"{name}.json")))
    summary.frequencies = tables.frequencies()
    return summary, tables


def _write_tables(
    units: Sequence[Unit], job: Job, notions: Sequence[Notion], tables: NotionTables
) -> None:
    for name, fields in (("manifest", manifest_fields(job, notions)), ("rejects", REJECTED)):
        parts = (job.path(unit, f"{name}.parquet") for unit in units)
        _join(parts, job.result(f"{name}.parquet"), pa.schema(fields))
    for name in TABLES:
        with atomic_file(job.result(f"{name}.parquet")) as path:
            getattr(tables, "frequencies" if name == "notions" else name)().to_parquet(
                path, index=False
            )


def _join(parts: Iterable[Path], path: Path, schema: pa.Schema) -> None:
    """Write the parts one after the other as one table."""
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        held: list[pa.Table] = []
        for part in parts:
            held.append(pq.read_table(part))
            if sum(table.num_rows for table in held) >= GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))


def _publish(work: Path, out: Path) -> None:
    """Give the result its name; the passes' own files go."""
    remove_folder(out)
    (work / INPUTS).unlink()  # a run killed from here on is no longer one to go on with
    os.replace(work / "result", out)
    shutil.rmtree(work, ignore_errors=True)
