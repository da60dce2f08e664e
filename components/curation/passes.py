"""The passes over shards: each works on one shard, in any process, and writes one file.

scan    decode, cheap filters, hashes            -> NAME.scan.parquet, a row a key
judge   model filters, on what is still in       -> NAME.judge.parquet, a row a key still in
pack    the kept samples' bytes, as they came    -> NAME.tar

A file is whole or absent, so a pass that was killed goes on with the shards that lack it.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.curation.detectors import Gated, model_filters
from components.curation.duplicates import perceptual_hash, thumbnail
from components.curation.filters import Filter, Picture, cheap_filters
from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import Sample, read_shard, write_shard
from components.files import atomic_file, write_json

DAMAGED = "damaged"
VERDICT = [
    ("filter", pa.string()),
    ("score", pa.float64()),
    ("threshold", pa.float64()),
    ("reason", pa.string()),
]
SCANNED = [
    ("key", pa.string()),
    ("caption", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("source", pa.string()),
    ("synthetic", pa.bool_()),
    ("sha256", pa.string()),
    ("phash", pa.binary()),
    ("thumb", pa.binary()),
    ("truth", pa.string()),  # the ground truth's defect, '' sound, null unknown: for reports only
]


@dataclass
class Job:
    """What a pass needs besides the shard: the curation params, where files go.

    `keys`: the shard's keys that `judge` looks at and `pack` keeps.
    """

    curation: Mapping[str, Any]
    work: Path
    keys: Sequence[str] = field(default_factory=list)

    def path(self, shard: Path, ending: str) -> Path:
        """The file a pass makes of a shard."""
        return self.work / f"{shard.stem}.{ending}"


def scan(shard: Path, job: Job) -> None:
    """Write the shard's scan table: every key with its scores or the reason of its rejection."""
    limits, filters = job.curation["limits"], cheap_filters(job.curation)
    watch = Stopwatch()
    rows: list[dict[str, Any]] = []
    for samples in _batches(watch.over("read", read_shard(shard, limits)), limits["batch"]):
        pictures: list[Picture | None] = []
        block = [_scanned(sample) for sample in samples]
        with watch("decode"):
            for sample, row in zip(samples, block, strict=True):
                pictures.append(_decoded(sample, row, limits))
        for stage in filters:
            with watch(stage.name):
                apply(stage, block, pictures)
        with watch("hashes"):
            for row, picture in zip(block, pictures, strict=True):
                if picture is not None and row["filter"] is None:
                    row["phash"] = perceptual_hash(picture.pixels)
                    row["thumb"] = thumbnail(picture.pixels)
        rows += block
    scores = [(f"score_{f.name}", pa.float64()) for f in filters]
    _write(job.path(shard, "scan.parquet"), rows, SCANNED + scores + VERDICT)
    write_json(job.path(shard, "scan.json"), watch.seconds)


def judge(shard: Path, job: Job) -> None:
    """Write the model filters' verdicts on `job.keys` of the shard."""
    limits, filters = job.curation["limits"], _ready(job)
    watch = Stopwatch()
    wanted = set(job.keys)
    rows: list[dict[str, Any]] = []
    samples = (s for s in read_shard(shard, limits) if s.key in wanted and not s.error)
    for batch in _batches(watch.over("read", samples), limits["batch"]):
        block: list[dict[str, Any]] = [{"key": s.key, "filter": None} for s in batch]
        with watch("decode"):
            pictures: list[Picture | None] = [
                Picture(s.key, decode(s.members[s.extension], limits), s.caption, s.meta)
                for s in batch
            ]
        for stage in filters:
            with watch(stage.name):
                apply(stage, block, pictures)
        rows += block
    fields = [("key", pa.string())]
    for stage in filters:
        fields.append((f"score_{stage.name}", pa.float64()))
        if isinstance(stage, Gated):
            fields.append((f"gate_{stage.name}", pa.float64()))
            fields.append((f"sampled_{stage.name}", pa.bool_()))
    _write(job.path(shard, "judge.parquet"), rows, fields + VERDICT)
    write_json(job.path(shard, "judge.json"), watch.seconds)


def pack(shard: Path, job: Job) -> None:
    """Write the curated shard: the members of `job.keys`, byte for byte as they came."""
    wanted = set(job.keys)
    if not wanted:
        return
    kept = (
        (s.key, {e: s.members[e] for e in (s.extension, "txt", "json") if e in s.members})
        for s in read_shard(shard, job.curation["limits"])
        if s.key in wanted and not s.error
    )
    with atomic_file(job.path(shard, "tar")) as temporary:
        write_shard(temporary, kept)


PASSES: dict[str, tuple[Callable[[Path, Job], None], str]] = {
    "scan": (scan, "scan.json"),
    "judge": (judge, "judge.json"),
    "pack": (pack, "tar"),
}


def apply(
    stage: Filter, rows: Sequence[dict[str, Any]], pictures: Sequence[Picture | None]
) -> None:
    """Score the pictures that are still in and write score and verdict into their rows."""
    at = [i for i, r in enumerate(rows) if r["filter"] is None and pictures[i] is not None]
    batch = [picture for i in at if (picture := pictures[i]) is not None]
    if not batch:
        return
    scores = stage.score(batch)
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


def _scanned(sample: Sample) -> dict[str, Any]:
    """A scan row before any filter looked at it."""
    scene, source = sample.meta.get("scene"), sample.meta.get("source")
    row: dict[str, Any] = {
        "key": sample.key,
        "caption": sample.caption,
        "source": source if isinstance(source, str) else "unknown",
        "synthetic": sample.meta.get("synthetic") is True,
        "truth": str(scene.get("defect") or "") if isinstance(scene, dict) else None,
        "filter": None,
    }
    if sample.error:
        row |= verdict(DAMAGED, None, None, sample.error)
    return row


def _decoded(sample: Sample, row: dict[str, Any], limits: Mapping[str, int]) -> Picture | None:
    """Decode the sample's picture and note its size and hash, or reject it."""
    if sample.error:
        return None
    data = sample.members[sample.extension]
    try:
        pixels = decode(data, limits)
    except DamagedPicture as problem:
        row |= verdict(DAMAGED, None, None, str(problem))
        return None
    row["height"], row["width"] = pixels.shape[:2]
    row["sha256"] = hashlib.sha256(data).hexdigest()
    return Picture(sample.key, pixels, sample.caption, sample.meta)


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(path: Path, rows: list[dict[str, Any]], fields: list[tuple[str, pa.DataType]]) -> None:
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


_loaded: dict[str, list[Filter]] = {}


def _ready(job: Job) -> list[Filter]:
    """The model filters, loaded once a process."""
    name = f"{job.work}"
    if name not in _loaded:
        _loaded.clear()
        filters = model_filters(job.curation)
        for stage in filters:
            stage.setup()
        _loaded[name] = filters
    return _loaded[name]


def use_one_thread(pixels: int) -> None:
    """Set the libraries of this process: OpenCV on one thread, Pillow's own pixel limit."""
    cv2.setNumThreads(1)
    Image.MAX_IMAGE_PIXELS = pixels


class Stopwatch:
    """CPU seconds by name: `with watch("decode"): …`; other programs do not make them more."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "Stopwatch":
        """Choose the name that the next `with` block's seconds go to."""
        self.name = name
        return self

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, *_: object) -> None:
        spent = time.process_time() - self.started
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent

    def over(self, name: str, items: Iterator[Sample]) -> Iterator[Sample]:
        """Pass items on and time how long they take to come."""
        while True:
            started = time.process_time()
            item = next(items, None)
            spent = time.process_time() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            if item is None:
                return
            yield item
