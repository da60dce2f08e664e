"""Preference pairs from Pick-a-Pic's parquet files, of which not a byte is trusted."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.curation.pictures import DamagedPicture
from components.curation.shards import BROKEN
from components.curation.tables import READ_BYTES, rows_of
from components.errors import UserError
from components.feedback.pair_sources import DOCS, held_out_words, picture_of
from components.feedback.pairs import Pair, Tally

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label")
UIDS = ("best_image_uid", "image_0_uid", "image_1_uid")


def pickapic(path: Path, model: Path, params: Mapping[str, Any], tally: Tally) -> Iterator[Pair]:
    """Pairs of Pick-a-Pic's parquet files, `path` or all below it, streamed in their order.

    label_0 and label_1 are 1 and 0, 0 and 1, or 0.5 each for a tie. Ties and rows without a label
    are counted; what else cannot be used is listed. It ends with `dpo.pairs.most` pairs.

    Raises:
        UserError: no parquet file, or one without Pick-a-Pic's columns.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"There is no parquet file of Pick-a-Pic in {path}; {DOCS}.")
    most, named = int(params["dpo"]["pairs"]["most"]), held_out_words(params)
    found = 0
    for file in files:
        for place, row in _rows(file, int(params["curation"]["limits"]["batch"]), tally):
            if (pair := _picked(place, row, params, named, tally)) is not None:
                yield pair
                found += 1
                if found == most:
                    return


def _rows(path: Path, batch: int, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row; a damaged row group costs its own rows."""
    try:
        file = pq.ParquetFile(path, buffer_size=READ_BYTES)
        names = file.schema_arrow.names
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except BROKEN as problem:
        tally.reject(path.name, f"parquet file unreadable: {str(problem)[:160]}")
        return
    with file:
        if missing := [name for name in COLUMNS if name not in names]:
            raise UserError(
                f"{path} lacks the columns {', '.join(missing)}, which Pick-a-Pic has; it has "
                f"{', '.join(names)[:400]}. Set dpo.pairs.path to Pick-a-Pic's parquet files."
            )
        columns, first = [*COLUMNS, *(name for name in UIDS if name in names)], 0
        for group, count in enumerate(counts):
            row = first
            try:
                for part in file.iter_batches(batch, [group], columns):
                    for values, error in rows_of(part):
                        place = f"{path.name}:{row}"
                        row += 1
                        if error:
                            tally.reject(place, error)
                        else:
                            yield place, values
            except BROKEN as problem:
                what = f"{path.name}:{row} to {first + count - 1}"
                tally.reject(what, f"cannot be read: {str(problem)[:160]}")
            first += count


def _picked(
    place: str,
    row: Mapping[str, Any],
    params: Mapping[str, Any],
    named: Callable[[str], str],
    tally: Tally,
) -> Pair | None:
    """The pair that a row is, or None, counted or listed."""
    if not row["has_label"]:
        tally.count("unlabelled")
        return None
    labels = (row["label_0"], row["label_1"])
    if labels == (0.5, 0.5):
        tally.count("ties")
        return None
    if labels not in ((1, 0), (0, 1)):
        tally.reject(place, f"label_0 {labels[0]!r:.20}, label_1 {labels[1]!r:.20}")
        return None
    best = 0 if labels == (1, 0) else 1
    uids = [row.get(name) for name in UIDS]
    if None not in uids and uids[0] != uids[1 + best]:
        tally.reject(place, "best_image_uid is not the picture that the labels prefer")
        return None
    caption = " ".join(row["caption"].split()) if isinstance(row["caption"], str) else ""
    longest = int(params["curation"]["limits"]["text_bytes"])
    if not 0 < len(caption) <= longest:
        tally.reject(place, f"a caption of {len(caption)} letters, limit {longest}")
        return None
    # Nobody put this set together for the embedded world, so such a row is left out, not refused.
    if combination := named(caption):
        tally.reject(place, f"held-out combination: {combination}")
        return None
    try:
        both = []
        for name in ("jpg_0", "jpg_1"):
            data = row[name]["bytes"] if isinstance(row[name], dict) else row[name]
            if not isinstance(data, bytes):
                raise DamagedPicture(f"{name} holds no bytes")
            both.append(picture_of(data, params))
    except (DamagedPicture, KeyError) as problem:
        tally.reject(place, str(problem))
        return None
    return Pair(caption, both[best], both[1 - best], {"place": place}, "not preferred")
