"""Parquet files that hold pictures, as Hugging Face datasets come."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from components.curation.pictures import READ, content_extension
from components.curation.shards import BROKEN, Sample, safe_key

READ_BYTES = 1 << 16


def has_pictures(path: Path, names: Sequence[str]) -> bool:
    """Whether the parquet file has a column of pictures; False for one that cannot be read."""
    try:
        return bool(image_column(pq.read_schema(path), names))
    except BROKEN:
        return False


def image_column(schema: pa.Schema, names: Sequence[str]) -> str:
    """The first of `names` whose column holds bytes, plain or as struct{bytes, path}; or ''."""
    for name in names:
        if schema.get_field_index(name) >= 0:
            kind = schema.field(name).type
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if types.is_binary(kind) or types.is_large_binary(kind):
                return name
    return ""


def is_scalar(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, numbers or true and false."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string)
    return types.is_large_string(kind) or any(test(kind) for test in tests)


def rows_of(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (values by column, '') a row, ({}, why) for one that holds no UTF-8, say."""
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0], ""
        except BROKEN as problem:
            yield {}, f"row unreadable: {str(problem)[:160]}"


def caption_column(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of `names` that the row has, or ''."""
    return next((name for name in names if name in values), "")


def text_of(value: Any) -> str:
    """The caption that a value is: a text, of a list its first text, else ''."""
    if isinstance(value, list):
        value = next((text for text in value if isinstance(text, str)), "")
    return value.strip() if isinstance(value, str) else ""


def make_sample(
    key: str, data: bytes, caption: str, meta: Mapping[str, Any], extension: str = ""
) -> Sample:
    """A sample with the members that a shard would have; `extension` where the bytes say none."""
    extension = content_extension(data) or extension
    if not extension:
        error = f"{len(data)} bytes that are no picture of {READ}"
        return Sample(key, error=error, caption=caption, meta=dict(meta))
    text = json.dumps({"caption": caption} | dict(meta), ensure_ascii=False)
    members = {extension: data, "txt": caption.encode(), "json": text.encode()}
    return Sample(key, members, caption=caption, meta=dict(meta))


def read_table(path: Path, name: str, curation: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield a sample a row, those without a picture with `error` set.

    name: what keys are made of where the file has no key column (`NAME-00000012`).
    curation: `columns` and `limits`, of which `batch` rows are held at once. A damaged row
    group costs its own rows, a key that repeats its later row.
    """
    columns, limits = curation["columns"], curation["limits"]
    try:
        file = pq.ParquetFile(path, buffer_size=READ_BYTES)
        schema = file.schema_arrow
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        image = image_column(schema, columns["image"])
    except BROKEN as problem:
        yield Sample(path.name, error=f"parquet file unreadable: {str(problem)[:160]}")
        return
    with file:
        if not image:
            found = ", ".join(f"{f.name} ({f.type})" for f in schema)[:400]
            wanted = ", ".join(columns["image"])
            yield Sample(
                path.name,
                error=f"no column of pictures: {path.name} has {found}; wanted is one of {wanted}, "
                "of bytes or struct{bytes, path} (curation.columns.image)",
            )
            return
        kept = [f.name for f in schema if f.name in columns["caption"] or is_scalar(f.type)]
        seen: set[str] = set()
        first = 0
        for group, count in enumerate(counts):
            row = first
            try:
                for batch in file.iter_batches(limits["batch"], [group], [image, *kept]):
                    for values, error in rows_of(batch):
                        place = f"{name}-{row:08d}"
                        row += 1
                        if error:
                            yield Sample(safe_key(place), error=error)
                            continue
                        sample = _sample(values, image, place, curation)
                        if sample.key in seen:
                            sample = Sample(sample.key, error=f"key {sample.key} repeats")
                        seen.add(sample.key)
                        yield sample
            except BROKEN as problem:
                words = f"rows {row} to {first + count - 1} cannot be read: {str(problem)[:160]}"
                yield Sample(safe_key(f"{name}-{row:08d}"), error=words)
            first += count


def _sample(values: dict[str, Any], image: str, place: str, curation: Mapping[str, Any]) -> Sample:
    """The sample of a row; `place` is its key where the row has none."""
    columns, limits = curation["columns"], curation["limits"]
    data = values.pop(image)
    given = next((values[n] for n in columns["key"] if values.get(n) not in (None, "")), place)
    key = safe_key(given)
    caption = text_of(values.pop(caption_column(values, columns["caption"]), ""))
    meta = {k: v for k, v in values.items() if v is not None and not isinstance(v, list | dict)}
    if isinstance(data, dict):
        data = data["bytes"]
    if data is None:
        return Sample(
            key, error="no bytes in the column of pictures (a path alone is not followed)"
        )
    if len(data) > limits["picture_bytes"]:
        return Sample(key, error=f"picture of {len(data)} bytes, limit {limits['picture_bytes']}")
    texts = sum(len(v) for v in meta.values() if isinstance(v, str)) + len(caption)
    if texts > limits["text_bytes"]:
        return Sample(key, error=f"texts of {texts} letters, limit {limits['text_bytes']}")
    return make_sample(key, data, caption, meta)
