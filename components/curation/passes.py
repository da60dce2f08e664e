"""The passes over the input: each works on one unit, in any process, and writes its own files.

scan    decode, cheap filters, hashes               -> NAME.scan.parquet, a row a sample
judge   model filters, captions, notions            -> NAME.judge.parquet, a row a picture still in
pack    the kept samples, the tables (pack.py)      -> NAME.tar and parts of manifest and rejects
show    the report's pictures (pack.py)             -> NAME.show.json

Between them stand decisions that only all units together can tell (decisions.py). A pass ends
by writing NAME.PASS.json, so one that was killed goes on with the units that lack it.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.curation.captioner import Captioner
from components.curation.chain import CAPTION, DAMAGED, Chain, chain
from components.curation.detectors import Gated, uniform
from components.curation.duplicates import perceptual_hash, thumbnail
from components.curation.filters import Filter, Picture
from components.curation.notions import Notion, NotionFinder
from components.curation.own import checked_score, checked_setup
from components.curation.pictures import DamagedPicture, decode
from components.curation.rows import in_batches, read_rows, write_rows
from components.curation.shards import Sample
from components.curation.sources import Unit, read_unit
from components.curation.stopwatch import Stopwatch
from components.files import write_json

STYLE = "style"
VERDICT = [
    ("filter", pa.string()),
    ("score", pa.float64()),
    ("threshold", pa.float64()),
    ("reason", pa.string()),
]
SCANNED = [
    ("row", pa.int64()),  # place in the unit: samples are told apart by it, keys may repeat
    ("key", pa.string()),
    ("caption", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("source", pa.string()),
    ("style", pa.string()),
    ("synthetic", pa.bool_()),
    ("draw", pa.float64()),  # random number by which synthetic pictures are chosen
    ("sha256", pa.string()),
    ("phash", pa.binary()),
    ("thumb", pa.binary()),
    ("truth", pa.string()),  # the ground truth's defect, '' sound, null unknown: for reports only
]


@dataclass(frozen=True)
class Job:
    """What a pass needs besides the unit: the curation params, the folder of this run."""

    curation: Mapping[str, Any]
    work: Path

    def path(self, unit: Unit, ending: str) -> Path:
        """The file that a pass makes of a unit for the passes after it."""
        return self.work / "passes" / f"{unit.name}.{ending}"

    def result(self, name: str) -> Path:
        """A file of the curated set."""
        return self.work / "result" / name


def scan(unit: Unit, job: Job) -> None:
    """Write the unit's scan table: every sample with its scores or why it was rejected."""
    limits, filters, watch = job.curation["limits"], ready(job, dear=False).cheap, Stopwatch()
    scores = [(f"score_{f.name}", pa.float64()) for f in filters]
    count = 0
    with write_rows(job.path(unit, "scan.parquet"), [*SCANNED, *scores, *VERDICT]) as table:
        samples = watch.over("read", read_unit(unit, job.curation))
        for batch in in_batches(samples, limits["batch"]):
            block, pictures = [], []
            with watch("decode"):
                for number, sample in enumerate(batch, count):
                    block.append(_scanned(sample, number, int(job.curation["seed"])))
                    pictures.append(_decoded(sample, block[-1], limits))
            count += len(batch)
            for stage in filters:
                with watch(stage.name):
                    apply(stage, block, pictures)
            with watch("hashes"):
                for sample, row, picture in zip(batch, block, pictures, strict=True):
                    if picture is not None and row["filter"] is None:
                        data = sample.members[sample.extension]
                        row["sha256"] = hashlib.sha256(data).hexdigest()
                        row["phash"] = perceptual_hash(picture.pixels)
                        row["thumb"] = thumbnail(picture.pixels)
            with watch("tables"):
                table.add(block)
    write_json(job.path(unit, "scan.json"), watch.stop())


def judge(unit: Unit, job: Job) -> None:
    """Write the model filters' verdicts, captions and notions of the pictures still in."""
    limits, filters, watch = job.curation["limits"], ready(job, dear=True), Stopwatch()
    fields = [("row", pa.int64()), ("caption", pa.string())]
    for stage in filters.dear:
        fields.append((f"score_{stage.name}", pa.float64()))
        if isinstance(stage, Gated):
            fields.append((f"gate_{stage.name}", pa.float64()))
            fields.append((f"sampled_{stage.name}", pa.bool_()))
    fields += [("words", pa.list_(pa.string())), ("kinds", pa.list_(pa.string())), *VERDICT]
    before = [stage for stage in filters.dear if stage.name != CAPTION]
    finder, out = _finders[str(job.work)], repeated(unit, job)
    scanned = read_rows(job.path(unit, "scan.parquet"), ["row", "filter", "style"])
    wanted = {r["row"]: r["style"] for r in scanned if not r["filter"] and r["row"] not in out}
    with write_rows(job.path(unit, "judge.parquet"), fields) as table:
        numbered = enumerate(watch.over("read", read_unit(unit, job.curation)))
        for batch in in_batches((n for n in numbered if n[0] in wanted), limits["batch"]):
            block: list[dict[str, Any]] = [
                {"row": row, "caption": sample.caption, "filter": None} for row, sample in batch
            ]
            with watch("decode"):
                pictures = [
                    _decoded(sample, row, limits)
                    for (_, sample), row in zip(batch, block, strict=True)
                ]
            for stage in before:
                with watch(stage.name):
                    apply(stage, block, pictures)
            if filters.captioner:
                with watch("captions"):
                    _write_captions(filters.captioner, block, pictures)
            for stage in filters.dear[len(before) :]:
                with watch(stage.name):
                    apply(stage, block, pictures)
            with watch("notions"):
                found = finder.find_all([row["caption"] for row in block])
                for row, notions in zip(block, found, strict=True):
                    style = wanted[row["row"]]
                    if style is not None:
                        notions = list(dict.fromkeys([*notions, Notion(style, STYLE)]))
                    row["words"] = [n.word for n in notions]
                    row["kinds"] = [n.kind for n in notions]
            with watch("tables"):
                table.add(block)
    write_json(job.path(unit, "judge.json"), watch.stop())


def apply(
    stage: Filter, rows: Sequence[dict[str, Any]], pictures: Sequence[Picture | None]
) -> None:
    """Score the pictures that are still in and write score and verdict into their rows."""
    at = [i for i, r in enumerate(rows) if r["filter"] is None and pictures[i] is not None]
    batch = [picture for i in at if (picture := pictures[i]) is not None]
    if not batch:
        return
    scores = checked_score(stage, batch)
    for place, (i, score, keep) in enumerate(zip(at, scores, stage.keeps(scores), strict=True)):
        row, known = rows[i], not math.isnan(score)
        row[f"score_{stage.name}"] = float(score) if known else None
        if isinstance(stage, Gated):
            row[f"gate_{stage.name}"] = stage.suspected[place]
            row[f"sampled_{stage.name}"] = stage.sampled[place]
        if not keep:
            row |= verdict(stage.name, float(score), stage.threshold, stage.reason)


def verdict(name: str, score: float | None, threshold: float | None, reason: str) -> dict[str, Any]:
    """The four columns of a rejection; `reason` may use {score} and {threshold}."""
    text = reason if score is None else reason.format(score=score, threshold=threshold)
    return {"filter": name, "score": score, "threshold": threshold, "reason": text}


def repeated(unit: Unit, job: Job) -> dict[int, dict[str, Any]]:
    """The unit's repeats, row -> kind, first, bits, as `decisions.find_repeats` wrote them."""
    path = job.work / "passes" / "repeats.parquet"
    rows = pq.read_table(path, filters=[("unit", "=", unit.name)]).to_pylist()
    return {row["row"]: row for row in rows}


def _write_captions(
    captioner: Captioner, rows: Sequence[dict[str, Any]], pictures: Sequence[Picture | None]
) -> None:
    """Have the captioner write what is wanted of the pictures still in."""
    at = [i for i, r in enumerate(rows) if not r["filter"] and captioner.wants(r["caption"])]
    chosen = [picture for i in at if (picture := pictures[i]) is not None]
    for i, picture, text in zip(at, chosen, captioner.write(chosen) if at else (), strict=True):
        rows[i]["caption"] = picture.caption = text


def _scanned(sample: Sample, number: int, seed: int) -> dict[str, Any]:
    """A scan row before any filter looked at it."""
    meta = sample.meta
    scene, source, style = (meta.get(name) for name in ("scene", "source", STYLE))
    return {
        "row": number,
        "key": sample.key,
        "caption": sample.caption,
        "source": source if isinstance(source, str) else "unknown",
        "style": style if isinstance(style, str) and style else None,
        "synthetic": meta.get("synthetic") is True,
        "draw": uniform(seed, "synthetic", sample.key),
        "truth": str(scene.get("defect") or "") if isinstance(scene, dict) else None,
        "filter": None,
    }


def _decoded(sample: Sample, row: dict[str, Any], limits: Mapping[str, int]) -> Picture | None:
    """Decode the sample's picture and note its size, or reject it."""
    if sample.error:
        row |= verdict(DAMAGED, None, None, sample.error)
        return None
    try:
        pixels = decode(sample.members[sample.extension], limits)
    except DamagedPicture as problem:
        row |= verdict(DAMAGED, None, None, str(problem))
        return None
    row["height"], row["width"] = pixels.shape[:2]
    return Picture(sample.key, pixels, sample.caption, sample.meta)


_chains: dict[str, Chain] = {}
_set_up: set[str] = set()
_finders: dict[str, NotionFinder] = {}


def ready(job: Job, dear: bool) -> Chain:
    """The run's filters, the cheap or the dear ones set up, once a process.

    The libraries of this process are set to one thread: the processes of a pass are the
    parallelism.
    """
    name = str(job.work)
    if name not in _chains:
        for held in (_chains, _set_up, _finders):
            held.clear()
        cv2.setNumThreads(1)
        # Pillow's own guard is behind ours, and must not be in front of it.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, job.curation["limits"]["pixels"])
        _chains[name] = chain(job.curation)
    filters = _chains[name]
    for stage in filters.dear if dear else filters.cheap:
        if stage.name not in _set_up:
            checked_setup(stage)
            _set_up.add(stage.name)
    if dear and name not in _finders:
        _finders[name] = NotionFinder(job.curation["notions"])
    if dear and filters.captioner and "captioner" not in _set_up:
        filters.captioner.setup()
        _set_up.add("captioner")
    if "torch" in sys.modules:  # imported by those filters alone that run on it
        sys.modules["torch"].set_num_threads(1)
    return filters
