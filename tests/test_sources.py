"""What curation reads: tars, parquet files, loose pictures, and each way in which they are bad."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from components.curation.pictures import DamagedPicture, content_extension, decode
from components.curation.shards import NAME, PICTURES, Sample, read_shard, safe_key, write_shard
from components.curation.sources import Unit, find_units, fingerprint, read_unit
from components.errors import UserError

LIMITS = {"picture_bytes": 1 << 16, "text_bytes": 4096, "pixels": 1 << 16, "batch": 3}
CURATION: dict[str, Any] = {
    "columns": {
        "image": ["image", "jpg", "png", "img", "bytes"],
        "caption": ["text", "caption", "TEXT", "prompt"],
        "key": ["key", "__key__", "id"],
    },
    "limits": LIMITS | {"shard": 4, "memory": "256MB"},
}


def coloured(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture of many colours, no two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 255 - x * 200 // width], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(coloured())


def samples_of(source: Path, work: Path) -> dict[str, list[Sample]]:
    """Unit name -> its samples."""
    units = find_units(source, work / "index.parquet", CURATION)
    return {unit.name: list(read_unit(unit, CURATION)) for unit in units}


def all_samples(source: Path, work: Path) -> list[Sample]:
    return [s for samples in samples_of(source, work).values() for s in samples]


def errors_of(samples: list[Sample]) -> str:
    return " | ".join(s.error for s in samples if s.error)


def good_keys(samples: list[Sample]) -> list[str]:
    return [s.key for s in samples if not s.error]


def lines(*rows: dict[str, Any] | str) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


# ---- the three kinds, side by side


def test_tars_parquet_and_loose_pictures_are_one_input(data: Path, tmp_path: Path) -> None:
    (data / "sub").mkdir()
    meta = {"caption": "from JSON", "source": "web", "synthetic": True}
    write_shard(
        data / "00000.tar",
        [("a", {"jpg": PNG, "txt": b"a cat"}), ("b", {"png": PNG, "json": lines(meta)})],
    )
    pq.write_table(
        pa.table({"key": ["a", "b", "c"], "error_message": [None, None, "HTTP Error 404"]}),
        data / "00000.parquet",
    )
    table = {
        "image": [{"bytes": PNG, "path": "x.png"}] * 2,
        "text": ["one", None],
        "id": [7, 8],
        "source": ["web", "camera"],
        "synthetic": [True, False],
    }
    pq.write_table(pa.table(table), data / "sub" / "00000.parquet")
    (data / "p.jpg").write_bytes(PNG)
    (data / "sub" / "q.png").write_bytes(PNG)
    (data / "README.md").write_text("read me")
    (data / ".hidden.png").write_bytes(b"x")
    found = samples_of(data, tmp_path)
    assert list(found) == ["00000", "folder-00000", "sub-00000"]
    a, b, c = found["00000"]
    assert (a.caption, b.caption, b.meta["source"]) == ("a cat", "from JSON", "web")
    assert c.error == "HTTP Error 404"
    one, two = found["sub-00000"]
    assert (one.key, one.caption, two.key, two.caption) == ("7", "one", "8", "")
    assert two.meta == {"id": 8, "source": "camera", "synthetic": False}
    assert set(one.members) == {"png", "txt", "json"} and one.members["png"] == PNG
    assert json.loads(one.members["json"])["caption"] == "one"
    assert good_keys(found["folder-00000"]) == ["p", "sub_q"]
    assert found["folder-00000"][0].extension == "png", "the bytes say what it is, not the name"


def test_units_are_the_same_each_time_and_small(data: Path, tmp_path: Path) -> None:
    for i in range(9):
        (data / f"{i}.png").write_bytes(PNG)
    index = tmp_path / "work" / "index.parquet"
    units = find_units(data, index, CURATION)
    assert [unit.part for unit in units] == [0, 1, 2], "four pictures a unit"
    assert [p.name for p in index.parent.iterdir()] == ["index.parquet"]
    before, mark = index.read_bytes(), fingerprint(units)
    again = find_units(data, index, CURATION)
    assert pickle.loads(pickle.dumps(units)) == again  # noqa: S301 - written here
    assert index.read_bytes() == before and fingerprint(units) == mark
    assert [s.key for u in units for s in read_unit(u, CURATION)] == [str(i) for i in range(9)]


@pytest.mark.parametrize("changed", ["tar", "list", "parquet", "picture", "caption", "new"])
def test_the_fingerprint_changes_with_any_file(data: Path, tmp_path: Path, changed: str) -> None:
    files = {
        "tar": data / "0.tar",
        "list": data / "0.parquet",
        "parquet": data / "1.parquet",
        "picture": data / "p.png",
        "caption": data / "metadata.csv",
    }
    write_shard(files["tar"], [("a", {"png": PNG})])
    pq.write_table(pa.table({"key": ["a"]}), files["list"])
    pq.write_table(pa.table({"image": [PNG]}), files["parquet"])
    files["picture"].write_bytes(PNG)
    files["caption"].write_text("file_name,text\np.png,one\n")

    def mark() -> str:
        return fingerprint(find_units(data, tmp_path / "index.parquet", CURATION))

    before = mark()
    assert mark() == before
    if changed == "new":
        (data / "q.png").write_bytes(PNG)
    elif changed == "caption":
        files["caption"].write_text("file_name,text\np.png,two\n")
    else:
        os.utime(files[changed], ns=(0, 12345))
    assert mark() != before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/x.tar", "a-x.tar"], ["a-x", "a-x-2"]),
        (["a/x.tar", "a-x.tar", "a-x-2.tar"], ["a-x", "a-x-2", "a-x-3"]),
        (["x y.tar", "x(y.tar"], ["x_y", "x_y-2"]),
        (["x.parquet", "x.tar"], ["x", "x-2"]),
    ],
)
def test_unit_names_are_plain_and_unique(
    data: Path, tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    for name in names:
        (data / name).parent.mkdir(exist_ok=True)
        if name.endswith(".tar"):
            write_shard(data / name, [("a", {"png": PNG})])
        else:
            pq.write_table(pa.table({"image": [PNG]}), data / name)
    found = samples_of(data, tmp_path)
    assert list(found) == expected
    assert all(len(good_keys(samples)) == 1 == len(samples) for samples in found.values())


def test_nothing_readable_is_said_in_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Nothing to curate in .*in: put webdataset shards"):
        find_units(data, tmp_path / "index.parquet", CURATION)
    (data / "README.md").write_text("x")
    (data / "notes.log").write_text("x")
    with pytest.raises(UserError, match="Nothing to curate"):
        find_units(data, tmp_path / "index.parquet", CURATION)
    with pytest.raises(UserError, match="No folder"):
        find_units(data / "no", tmp_path / "index.parquet", CURATION)
    assert not (tmp_path / "index.parquet").exists()


def test_too_little_memory_for_the_index_is_said(data: Path, tmp_path: Path) -> None:
    (data / "a.png").write_bytes(PNG)
    tight = CURATION | {"limits": CURATION["limits"] | {"memory": "1MB"}}
    with pytest.raises(UserError, match=r"curation\.limits\.memory"):
        find_units(data, tmp_path / "index.parquet", tight)


# ---- loose pictures


METADATA = {
    "truncated line": (lines('{"file_name": "a.png"', {"file_name": "a.png"}), "jsonl:1: no JSON"),
    "no object": (lines("[1]", {"file_name": "a.png"}), "metadata.jsonl:1: no object"),
    "no name": (lines({"text": "x"}, {"file_name": "a.png"}), "jsonl:1: no file_name"),
    "number": (lines({"file_name": 3}, {"file_name": "a.png"}), "jsonl:1: no file_name"),
    "absolute": (lines({"file_name": "/etc/a.png"}, {"file_name": "a.png"}), "leads out"),
    "parent": (lines({"file_name": "s/../../a.png"}, {"file_name": "a.png"}), "leads out"),
    "deep": (lines("[" * 4000, {"file_name": "a.png"}), "metadata.jsonl:1"),
    "long line": (lines("x" * 9000, {"file_name": "a.png"}), "more than 4096 bytes"),
    "not UTF-8": (b'{"text": "\xff"}\n' + lines({"file_name": "a.png"}), "jsonl:1: no JSON"),
    "surrogate": (lines('{"file_name":"\\ud800"}', {"file_name": "a.png"}), "surrogates"),
    "huge number": (b'{"n": ' + b"9" * 4080 + b"}\n" + lines({"file_name": "a.png"}), "no file"),
    "gone": (lines({"file_name": "gone.png"}, {"file_name": "a.png"}), "there is no file gone.png"),
    "twice": (lines({"file_name": "a.png"}, {"file_name": "./a.png"}), "jsonl:2: lists a.png once"),
    "outside link": (lines({"file_name": "a.png"}, {"file_name": "link.png"}), "link that leads"),
    "mark at the start": (b"\xef\xbb\xbf" + lines({"file_name": "a.png"}), ""),
    "blank lines": (lines("", {"file_name": "a.png"}, ""), ""),
}


@pytest.mark.parametrize("case", METADATA)
def test_each_bad_json_line_is_one_sample(data: Path, tmp_path: Path, case: str) -> None:
    content, words = METADATA[case]
    (data / "a.png").write_bytes(PNG)
    (data / "metadata.jsonl").write_bytes(content)
    if case == "outside link":
        (tmp_path / "secret.png").write_bytes(PNG)
        (data / "link.png").symlink_to(tmp_path / "secret.png")
    (samples,) = samples_of(data, tmp_path).values()
    assert good_keys(samples) == ["a"]
    assert len(samples) == 1 + bool(words) and words in errors_of(samples)
    assert all(not s.members for s in samples if s.error)


def test_single_files_as_img2dataset_writes_them(data: Path, tmp_path: Path) -> None:
    folder = data / "00000"
    folder.mkdir()
    for name in ("0", "1", "2", "3", "4"):
        (folder / f"{name}.png").write_bytes(PNG)
    (folder / "0.txt").write_text("\ufeffa red ring \n")
    (folder / "0.json").write_text('{"source": "web", "caption": "not this one"}')
    (folder / "1.json").write_text('{"caption": "of the JSON"}')
    (folder / "2.txt").write_bytes(b"\xff")
    (folder / "3.txt").write_text("x" * 5000)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "4.txt").symlink_to(tmp_path / "secret.txt")
    found = {s.key[-1]: s for unit in samples_of(data, tmp_path).values() for s in unit}
    assert (found["0"].caption, found["0"].meta["source"]) == ("a red ring", "web")
    assert found["0"].members["txt"] == b"a red ring"
    assert (found["1"].caption, found["4"].caption) == ("of the JSON", "")
    assert "does not parse" in found["2"].error and "more than" in found["3"].error


CSV = {
    "plain": ("file_name,text\na.png,one\n", "one", ""),
    "windows": ("\ufefffile_name,text\r\na.png,one\r\n", "one", ""),
    "quoted": ('file_name,text\na.png,"one, ""two"""\n', 'one, "two"', ""),
    "over lines": ('file_name,text\na.png,"one\ntwo"\n', "one\ntwo", ""),
    "inches": ('file_name,text\na.png,a 5" nail\n', 'a 5" nail', ""),
    "too many fields": ("file_name,text\nb,c,d\na.png,one\n", "one", "metadata.csv:2: 3 fields"),
    "open quote": ('file_name,text\nb.png,"oh\na.png,one\n', "one", "metadata.csv:2: no row"),
    "stray quote": ('file_name,text\n"b"x,c\na.png,one\n', "one", "metadata.csv:2: no row"),
    "not UTF-8": ("file_name,text\nb.png,\udcff\na.png,one\n", "one", "metadata.csv:2: no row"),
    "no name": ("name,text\na.png,one\n", None, "no column file_name"),
    "outside": ("file_name,text\n../b.png,x\na.png,one\n", "one", "leads out"),
}


@pytest.mark.parametrize("case", CSV)
def test_csv_metadata_is_read_row_by_row(data: Path, tmp_path: Path, case: str) -> None:
    content, caption, words = CSV[case]
    (data / "a.png").write_bytes(PNG)
    (data / "metadata.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    (samples,) = samples_of(data, tmp_path).values()
    assert [s.caption for s in samples if not s.error] == ([caption] if caption else [])
    assert words in errors_of(samples)
    assert len(samples) <= 2


def test_csv_truth_values_and_other_columns_reach_meta(data: Path, tmp_path: Path) -> None:
    (data / "a.png").write_bytes(PNG)
    (data / "metadata.csv").write_text("file_name,prompt,synthetic,source\na.png,x,True,web\n")
    ((sample,),) = samples_of(data, tmp_path).values()
    assert sample.caption == "x" and sample.meta["synthetic"] is True
    assert sample.meta["source"] == "web"


def test_parquet_metadata_and_metadata_of_the_folder_above(data: Path, tmp_path: Path) -> None:
    for name in ("train", "test", "free"):
        (data / name).mkdir()
        (data / name / "a.png").write_bytes(PNG)
    (data / "test" / "extra.png").write_bytes(PNG)
    rows = {"file_name": ["a.png", None], "text": ["from parquet", "x"]}
    pq.write_table(pa.table(rows), data / "train" / "metadata.parquet")
    (data / "test" / "metadata.jsonl").write_bytes(lines({"file_name": "a.png", "text": "t"}))
    samples = all_samples(data, tmp_path)
    captions = {s.key: s.caption for s in samples if not s.error}
    assert captions == {"train_a": "from parquet", "test_a": "t", "free_a": ""}
    assert "not listed in test/metadata.jsonl" in errors_of(samples)
    assert "train/metadata.parquet:2: no file_name" in errors_of(samples)
    (data / "metadata.jsonl").write_bytes(lines({"file_name": "free/a.png", "text": "above"}))
    samples = all_samples(data, tmp_path)
    assert {s.key: s.caption for s in samples if not s.error}["free_a"] == "above"


def test_keys_that_fall_together_and_names_of_other_scripts(data: Path, tmp_path: Path) -> None:
    for name in ("a b.png", "a_b.png", "猫.png", "犬.png", "x" * 120 + ".png"):
        (data / name).write_bytes(PNG)
    samples = all_samples(data, tmp_path)
    assert errors_of(samples) == "key a_b is taken by a b.png"
    keys = good_keys(samples)
    assert len(set(keys)) == 4 and all(NAME.match(f"{key}.png") and len(key) <= 90 for key in keys)
    write_shard(tmp_path / "x.tar", [(s.key, s.members) for s in samples if not s.error])
    assert good_keys(list(read_shard(tmp_path / "x.tar", LIMITS))) == keys


def test_a_broken_row_does_not_take_a_sound_pictures_key(data: Path, tmp_path: Path) -> None:
    (data / "a.png").write_bytes(PNG)
    rows = lines({"file_name": "a.jpg"}, {"file_name": "a.png", "text": "one"})
    (data / "metadata.jsonl").write_bytes(rows)
    samples = all_samples(data, tmp_path)
    assert [s.caption for s in samples if not s.error] == ["one"]


def _fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


LOOSE: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
    "tiff": ("a.tiff", lambda p, _: p.write_bytes(b"II*"), ".tiff: pictures are read as jpg"),
    "none": ("a", lambda p, _: p.write_bytes(PNG), "no extension"),
    "fifo": ("a.png", _fifo, "no regular file"),
    "fifo tar": ("a.tar", _fifo, "no regular file"),
    "dangling": ("a.png", lambda p, _: p.symlink_to("gone"), "unreadable"),
    "loop": ("a.png", lambda p, _: p.symlink_to("a.png"), "unreadable"),
    "outside": ("a.png", lambda p, o: p.symlink_to(o), "link that leads out"),
    "folder": ("a.png", lambda p, o: p.symlink_to(o.parent), "link to a folder"),
    "metadata": ("metadata.csv", lambda p, o: p.symlink_to(o), "link that leads out"),
    "not UTF-8": ("\udcff.png", lambda p, _: p.write_bytes(PNG), "file name is not UTF-8"),
    "large": ("a.png", lambda p, _: p.write_bytes(b"x" * (1 << 17)), "131072 bytes, limit 65536"),
}


@pytest.mark.parametrize("case", LOOSE)
def test_files_that_are_no_pictures_are_listed(data: Path, tmp_path: Path, case: str) -> None:
    name, make, words = LOOSE[case]
    (data / "good.png").write_bytes(PNG)
    outside = tmp_path / "outside" / "secret.png"
    outside.parent.mkdir()
    outside.write_bytes(PNG)
    make(data / name, outside)
    samples = all_samples(data, tmp_path)
    assert good_keys(samples) == ["good"]
    assert len(samples) == 2 and words in errors_of(samples)


def test_a_link_inside_is_followed_and_one_made_later_to_the_outside_is_not(
    data: Path, tmp_path: Path
) -> None:
    (data / "a.png").write_bytes(PNG)
    (data / "b.png").symlink_to("a.png")
    (unit,) = find_units(data, tmp_path / "index.parquet", CURATION)
    assert good_keys(list(read_unit(unit, CURATION))) == ["a", "b"]
    (tmp_path / "secret.png").write_bytes(PNG)
    (data / "a.png").unlink()
    (data / "b.png").unlink()
    (data / "b.png").symlink_to(tmp_path / "secret.png")
    gone, link = read_unit(unit, CURATION)
    assert "unreadable" in gone.error and "leads out" in link.error


# ---- parquet files


def table_of(**columns: Any) -> pa.Table:
    return pa.table(columns)


TABLES: dict[str, tuple[pa.Table, int, str]] = {
    "plain bytes": (table_of(image=[PNG]), 1, ""),
    "large": (table_of(image=pa.array([PNG], pa.large_binary())), 1, ""),
    "struct": (table_of(image=[{"bytes": PNG, "path": None}]), 1, ""),
    "second name": (table_of(image=["http://x"], jpg=[PNG]), 1, ""),
    "path alone": (table_of(image=[
        {"bytes": None, "path": "/etc/passwd"}, {"bytes": PNG, "path": "x"}]),
        1, "a path alone is not followed"),
    "null": (table_of(image=[None, PNG]), 1, "no bytes"),
    "text": (table_of(image=[b"hello", PNG]), 1, "5 bytes that are no picture"),
    "empty": (table_of(image=[b"", PNG]), 1, "0 bytes that are no picture"),
    "too large": (table_of(image=[b"x" * 70000, PNG]), 1, "70000 bytes, limit 65536"),
    "long text": (table_of(image=[PNG, PNG], text=["x" * 5000, "y"]), 1, "5000 letters"),
    "not UTF-8": (table_of(image=[PNG, PNG], text=pa.array([b"\xff", b"y"]).view(pa.string())), 1,
                  "row unreadable"),
    "key twice": (table_of(image=[PNG, PNG], key=["a", "a"]), 1, "key a repeats"),
    "no pictures": (table_of(url=["x"], text=["y"]), 0,
                    "has url (string), text (string); wanted is one of image, jpg"),
    "no rows": (table_of(image=pa.array([], pa.binary())), 0, ""),
    "captions in a list": (table_of(image=[PNG], caption=[["one", "two"]]), 1, ""),
    "nested": (table_of(image=[PNG], extra=[{"a": [1]}]), 1, ""),
    "dictionary": (table_of(image=[PNG], text=pa.array(["x"]).dictionary_encode()), 1, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_parquet_rows_become_samples(data: Path, tmp_path: Path, case: str) -> None:
    table, good, words = TABLES[case]
    pq.write_table(table, data / "x.parquet")
    (samples,) = samples_of(data, tmp_path).values()
    assert len(good_keys(samples)) == good
    assert words in errors_of(samples) and bool(errors_of(samples)) == bool(words)
    assert all((decode(s.members["png"], LIMITS)).any() for s in samples if not s.error)


def test_a_damaged_row_group_costs_its_own_rows(data: Path, tmp_path: Path) -> None:
    pictures = [encoded(coloured(20 + i)) for i in range(12)]
    with pq.ParquetWriter(data / "x.parquet", pa.schema([("image", pa.binary())])) as writer:
        for i in range(0, 12, 4):
            writer.write_table(pa.table({"image": pictures[i : i + 4]}))
    content = bytearray((data / "x.parquet").read_bytes())
    at = content.index(pictures[4])
    content[at - 16 : at] = b"\xff" * 16  # the second group's page header
    (data / "x.parquet").write_bytes(content)
    (samples,) = samples_of(data, tmp_path).values()
    assert good_keys(samples) == [f"x-{i:08d}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert "rows 4 to 7 cannot be read" in errors_of(samples)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello", b"PAR1" + b"\xff" * 60 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_one_sample(
    data: Path, tmp_path: Path, content: bytes
) -> None:
    (data / "x.parquet").write_bytes(content)
    ((sample,),) = samples_of(data, tmp_path).values()
    assert sample.error.startswith("parquet file unreadable")


def test_a_parquet_with_pictures_beside_a_tar_is_no_list_of_it(data: Path, tmp_path: Path) -> None:
    write_shard(data / "0.tar", [("a", {"png": PNG})])
    pq.write_table(pa.table({"key": ["z"], "image": [PNG]}), data / "0.parquet")
    found = samples_of(data, tmp_path)
    assert sorted(good_keys(samples) for samples in found.values()) == [["a"], ["z"]]
    assert not any(errors_of(samples) for samples in found.values())


# ---- pictures


def grey_16(kind: str) -> Image.Image:
    values = (np.arange(24 * 16).reshape(16, 24) * 170).astype(np.uint16)
    return Image.frombytes("I;16B", (24, 16), values.astype(">u2").tobytes()) if kind == "I;16B" \
        else Image.fromarray(values)  # fmt: skip


def test_grey_of_16_bits_is_scaled(data: Path) -> None:
    image = grey_16("I;16")
    pixels = decode(encoded(image), LIMITS)
    assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[..., 0] - np.asarray(image) / 257).max() <= 0.5


def test_grey_of_16_bits_with_a_transparent_value_is_on_white() -> None:
    values = np.full((4, 4), 300, np.uint16)
    values[0, 0] = 1000
    data = encoded(Image.fromarray(values))
    body = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    pixels = decode(data[:at] + chunk + data[at:], LIMITS)
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[1, 1]) == (1, 1, 1)


def transparent(mode: str) -> Image.Image:
    """Red (or dark), its upper half see-through."""
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 200, 0, 0])
        palette.paste(0, (0, 0, 8, 4))
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [  # Pillow writes a GIF of LA without its transparency.
        (mode, kind)
        for mode in ("RGBA", "LA", "P")
        for kind in ("PNG", "WEBP", "GIF")
        if (mode, kind) != ("LA", "GIF")
    ],
)
def test_transparency_is_on_white(mode: str, kind: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    pixels = decode(encoded(transparent(mode), kind, **options), LIMITS)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:, :, 1] < 80).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [  # all that Pillow writes
        (mode, kind)
        for mode in ("1", "L", "P", "CMYK", "RGB")
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")
        if (kind, mode) not in {("JPEG", "P"), ("PNG", "CMYK"), ("GIF", "CMYK"), ("BMP", "CMYK")}
    ],
)
def test_every_mode_and_format_is_read(mode: str, kind: str) -> None:
    image = coloured().convert(mode)
    data = encoded(image, kind, quality=100, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(image.convert("RGB")).astype(int)
    pixels = decode(data, LIMITS)
    assert np.abs(pixels - expected).mean() < 8
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}[kind]
    assert content_extension(data) == suffix and suffix in PICTURES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(coloured(), kind, exif=exif, quality=90)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode(data, LIMITS)
    assert pixels.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert (pixels == expected).all()


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(coloured(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\xff\xff" + b"\xff" * 40)
    assert decode(data, LIMITS).shape == (16, 24, 3)


def still(kind: str, count: int) -> bytes:
    frames = [coloured().rotate(10 * i) for i in range(count)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused_and_stills_read(kind: str) -> None:
    with pytest.raises(DamagedPicture, match="animated, 3 frames"):
        decode(still(kind, 3), LIMITS)
    assert decode(still(kind, 1), LIMITS).shape == (16, 24, 3)


def test_a_jpeg_with_previews_is_no_animation() -> None:
    assert decode(still("MPO", 2), LIMITS).shape == (16, 24, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (16000, 1), (1, 16000)])
def test_sides_alone_are_no_reason(kind: str, size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("RGB", size, "red"), kind), LIMITS).shape[1::-1] == size


def test_a_side_of_30000_pixels_is_read() -> None:
    assert decode(encoded(Image.new("L", (30000, 1))), LIMITS).shape == (1, 30000, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "JPEG"])
def test_bombs_are_refused_before_their_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (2000, 2000)), kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels decoded"))
    with pytest.raises(DamagedPicture, match="2000x2000 pixels, limit 65536"):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_pictures_cut_off_are_refused(kind: str) -> None:
    data = encoded(coloured(40, 30), kind)
    for size in (0, 1, 10, 20, len(data) // 2, len(data) - 20):
        with pytest.raises(DamagedPicture, match=r".+"):
            decode(data[:size], LIMITS)


@pytest.mark.parametrize("data", [b"", b"x" * 600, b"BM no bitmap", b"RIFF....WAVE", b"II*\0"])
def test_bytes_that_are_no_picture(data: bytes) -> None:
    assert content_extension(data) == ""
    with pytest.raises(DamagedPicture, match=f"{len(data)} bytes that are no picture of JPEG"):
        decode(data, LIMITS)


# ---- captions in tars


@pytest.mark.parametrize(
    ("members", "caption", "words"),
    [
        ({"txt": b"one"}, "one", ""),
        ({"txt": "\ufeffone".encode()}, "one", ""),
        ({}, "", ""),
        ({"txt": b" \n"}, "", ""),
        ({"txt": b"", "json": b'{"caption": "two"}'}, "two", ""),
        ({"json": b'{"caption": "two"}'}, "two", ""),
        ({"txt": b"one", "json": b'{"caption": "two"}'}, "one", ""),
        ({"json": b'{"caption": 3}'}, "", ""),
        ({"txt": b"\xff\xfe"}, "", "caption or JSON does not parse"),
        ({"json": b"{"}, "", "caption or JSON does not parse"),
        ({"json": b"[" * 4000}, "", "caption or JSON does not parse"),
        ({"json": b'{"caption": "\\ud800"}'}, "", "surrogates"),
        ({"json": b'{"source": "\\udfff"}'}, "", "surrogates"),
        ({"json": b"[]"}, "", "JSON member is not an object"),
    ],
)
def test_captions(data: Path, members: dict[str, bytes], caption: str, words: str) -> None:
    write_shard(data / "0.tar", [("a", {"png": PNG} | members), ("b", {"png": PNG})])
    first, second = read_shard(data / "0.tar", LIMITS)
    assert (first.caption, second.error) == (caption, "")
    assert words in first.error and bool(first.error) == bool(words)


# ---- hostile and damaged tars


def entry(name: str, data: bytes = b"", size: bytes | None = None, **fields: Any) -> bytes:
    """A member's blocks; `size` as raw bytes of the size field, the checksum made to fit."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        at = len(header) - 512
        header[at + 124 : at + 136] = size
        header[at + 148 : at + 156] = b" " * 8
        header[at + 148 : at + 156] = b"%06o\0 " % sum(header[at : at + 512])
    return bytes(header) + data + b"\0" * (-len(data) % 512)


def sample_entries(key: str, form: int = tarfile.USTAR_FORMAT) -> bytes:
    members = {"png": PNG, "txt": key.encode(), "json": b"{}"}
    parts = []
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        parts.append(info.tobuf(form) + data + b"\0" * (-len(data) % 512))
    return b"".join(parts)


LONG = "k" * 120
BETWEEN: dict[str, tuple[bytes, str]] = {
    "absolute": (entry("/etc/x.png", PNG), "'/etc/x.png' refused"),
    "parent": (entry("../x.png", PNG), "'../x.png' refused"),
    "inner": (entry("a/../../x.png", PNG), "refused"),
    "folder": (entry("a/", type=tarfile.DIRTYPE), ""),
    "folder with bytes": (entry("a/", PNG, type=tarfile.DIRTYPE), "damaged bytes"),
    "link": (entry("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link or a special"),
    "hard link": (entry("x.png", type=tarfile.LNKTYPE, linkname="a.png"), "link or a special"),
    "long link": (entry("x.png", type=tarfile.SYMTYPE, linkname="l" * 150), "link or a special"),
    "device": (entry("x.png", type=tarfile.CHRTYPE), "link or a special"),
    "disk": (entry("x.png", type=tarfile.BLKTYPE), "link or a special"),
    "fifo": (entry("x.png", type=tarfile.FIFOTYPE), "link or a special"),
    "sparse": (entry("x.png", b"", type=tarfile.GNUTYPE_SPARSE), "link or a special"),
    "unknown kind": (entry("x.png", PNG, type=b"Z"), "link or a special"),
    "negative": (entry("x.png", PNG, size=b"\xff" * 12), "damaged bytes"),
    "negative octal": (entry("x.png", PNG, size=b"-0000000017\0"), "damaged bytes"),
    "base 256": (entry("x.png", PNG, size=b"\x80" + len(PNG).to_bytes(11, "big")),
                 ""),
    "base 256 huge": (entry("x.png", PNG, size=b"\x80" + b"\xff" * 11), "runs into the next"),
    "beyond the end": (entry("x.png", PNG, size=b"77777777777\0"), "runs into the next"),
    "over the next": (entry("x.png", PNG, size=b"%011o\0" % (len(PNG) + 512)), "runs into"),
    "too short": (entry("x.png", PNG + b"\1" * 600, size=b"%011o\0" % 20), "damaged bytes"),
    "size of letters": (entry("x.png", PNG, size=b"hello world\0"), "damaged bytes"),
    "too large": (entry("x.png", b"x" * 70000), "70000 bytes, limit 65536"),
    "garbage": (b"\xa5" * 1234, "1234 damaged bytes"),
    "one byte": (b"\xa5", "1 damaged bytes"),
    "end in the middle": (b"\0" * 1024, ""),
    "no name": (entry("", PNG), "refused"),
    "no extension": (entry("x", PNG), "refused"),
    "control letters": (entry("x\n\t.png", PNG), "refused"),
    "same member": (entry("a.json", b"{}"), "key a repeats"),
    "same key": (sample_entries("a"), "key a repeats"),
    "long name alone": (entry("././@LongLink", b"n" * 99, type=b"L"), ""),
    "kind of a long name": (entry("x.png", b"../evil.png", type=b"L"), ""),
    "nested tar": (entry("x.tar", sample_entries("n")), "runs into"),
    "pax of another kind": (entry("x.png", b"30 path=/etc/passwd\n", type=tarfile.XHDTYPE), ""),
}  # fmt: skip
NAMES_THE_NEXT = ("pax of another kind",)


@pytest.mark.parametrize("case", BETWEEN)
def test_what_lies_between_samples_costs_none_of_them(data: Path, case: str) -> None:
    middle, words = BETWEEN[case]
    content = sample_entries("a") + middle + sample_entries("b") + b"\0" * 1024
    (data / "0.tar").write_bytes(content)
    samples = list(read_shard(data / "0.tar", LIMITS))
    whole = {s.key: s for s in samples if not s.error}
    assert whole["a"].members == {"png": PNG, "txt": b"a", "json": b"{}"}
    if case not in NAMES_THE_NEXT:
        assert whole["b"].members == {"png": PNG, "txt": b"b", "json": b"{}"}
    assert words in errors_of(samples)
    assert sorted(p.name for p in data.iterdir()) == ["0.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_dotted_names(data: Path, form: int) -> None:
    keys = ["a", "b.c", "d"] if form == tarfile.USTAR_FORMAT else ["a", LONG, "b.c", "d"]
    content = b"".join(sample_entries(key, form) for key in keys)
    (data / "0.tar").write_bytes(content)
    samples = list(read_shard(data / "0.tar", LIMITS))
    assert not errors_of(samples)
    assert [s.key for s in samples] == [safe_key(key) for key in keys]
    assert [s.caption for s in samples] == keys
    write_shard(data / "1.tar", [(s.key, s.members) for s in samples])
    assert [s.key for s in read_shard(data / "1.tar", LIMITS)] == [s.key for s in samples]


def test_a_long_name_whose_member_is_lost_does_not_name_the_next(data: Path) -> None:
    for instead in (b"\xff" * 512, b"\0" * 512, b""):
        lost = sample_entries(LONG, tarfile.GNU_FORMAT)[:1024] + instead
        (data / "0.tar").write_bytes(bytes(lost) + sample_entries("b"))
        samples = list(read_shard(data / "0.tar", LIMITS))
        assert good_keys(samples) == ["b"]


def test_a_long_name_whose_member_is_taken_for_another_does_not_name_the_next(data: Path) -> None:
    for kind in (b"L", b"x", b"K", b"g"):
        lost = bytearray(sample_entries(LONG, tarfile.GNU_FORMAT)[:2048])
        header = tarfile.TarInfo("long" * 24)  # of the member itself, after its name's two blocks
        header.size, header.type = len(PNG), kind
        lost[1024:1536] = header.tobuf(tarfile.USTAR_FORMAT)
        (data / "0.tar").write_bytes(bytes(lost) + sample_entries("b"))
        assert good_keys(list(read_shard(data / "0.tar", LIMITS))) == ["b"]


def test_names_from_the_current_folder(data: Path) -> None:
    (data / "0.tar").write_bytes(entry("./", type=tarfile.DIRTYPE) + entry("./a.png", PNG))
    assert good_keys(list(read_shard(data / "0.tar", LIMITS))) == ["a"]


def test_a_tar_cut_anywhere_loses_only_its_end(data: Path) -> None:
    parts = [sample_entries(key) for key in "abcd"]
    content, chance = b"".join(parts), random.Random(0)
    for cut in sorted(chance.sample(range(1, len(content)), 60)):
        (data / "0.tar").write_bytes(content[:cut])
        samples = list(read_shard(data / "0.tar", LIMITS))
        whole = cut // len(parts[0])
        assert good_keys(samples)[:whole] == list("abcd")[:whole]
        assert all(s.error or s.members["png"] == PNG for s in samples)


@pytest.mark.parametrize(
    ("table", "keys", "words"),
    [
        ({"key": ["a", "b"]}, ["a", "b"], ""),
        ({"key": ["a"]}, ["a", "b"], ""),
        ({"key": ["a", "b", "c"]}, ["a", "b"], "absent from the tar"),
        ({"key": [None]}, ["a", "b"], "absent from the tar"),
        ({"key": [["x"]]}, ["a", "b"], "absent from the tar"),
        ({"url": ["x"]}, ["a", "b"], ""),
        (b"no parquet", ["a", "b"], "parquet beside the shard unreadable"),
    ],
)
def test_the_list_beside_a_tar(
    data: Path, tmp_path: Path, table: Any, keys: list[str], words: str
) -> None:
    write_shard(data / "0.tar", [("a", {"png": PNG}), ("b", {"png": PNG})])
    if isinstance(table, bytes):
        (data / "0.parquet").write_bytes(table)
    else:
        pq.write_table(pa.table(table), data / "0.parquet")
    (samples,) = samples_of(data, tmp_path).values()
    assert good_keys(samples) == keys
    assert words in errors_of(samples) and bool(errors_of(samples)) == bool(words)


def test_a_unit_that_vanished_is_a_sample_with_an_error(data: Path) -> None:
    for kind in ("tar", "parquet"):
        ((sample),) = read_unit(Unit("x", kind, data / f"gone.{kind}"), CURATION)
        assert "unreadable" in sample.error
