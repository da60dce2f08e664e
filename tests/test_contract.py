"""The data contract on a curated set that is written here, without curating."""

import copy
import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.curation.contract import check
from components.curation.shards import write_shard
from components.errors import UserError
from components.tracking import Tracker
from tests.test_curation import SETTINGS as CURATION

SETTINGS: dict[str, Any] = CURATION | {
    "contract": {"rows": 4, "tail": 2, "required": ["red"], "examples": 3}
}
SCORES = {
    "caption": 9.0, "resolution": 128.0, "aspect": 1.125, "contrast": 99.0, "noise": 1.5,
    "sharpness": 0.6, "faces": 0.0, "text": 0.0, "nsfw": 0.1,
}  # fmt: skip
EVERY = 4  # each notion is in every fourth caption
Row = dict[str, Any]


def params(**changes: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        settings[name] |= value
    return {"curation": settings}


def picture(key: str) -> bytes:
    """Bytes in a picture's place: the contract decodes nothing."""
    return f"the picture {key}".encode()


def row(shard: int, number: int, notions: int) -> Row:
    key = f"{shard:05d}{number:05d}"
    words = ["red", *(f"word{i}" for i in range(1, notions))]
    return {
        "key": key, "shard": f"{shard:05d}", "caption": "a photo of two red circles",
        "width": 144, "height": 128, "source": "tests", "synthetic": number == 0,
        "sha256": hashlib.sha256(picture(key)).hexdigest(),
        **{f"score_{name}": score for name, score in SCORES.items()},
        **{f"notion_{w}": (number + i) % EVERY == 0 for i, w in enumerate(words)},
        "notion_words": ["red"],
    }  # fmt: skip


def schema(example: Row) -> pa.Schema:
    return pa.table({n: [v] for n, v in example.items()}).schema.set(
        3, pa.field("width", pa.int32())
    ).set(4, pa.field("height", pa.int32()))  # fmt: skip


def write_curated(folder: Path, shards: int, pictures: int, notions: int = 3) -> Path:
    """`shards` shards of `pictures` samples and their manifest, one shard in memory at a time."""
    folder.mkdir(parents=True)
    fields = schema(row(0, 0, notions))
    with pq.ParquetWriter(folder / "manifest.parquet", fields) as manifest:
        for shard in range(shards):
            rows = [row(shard, i, notions) for i in range(pictures)]
            manifest.write_table(pa.Table.from_pylist(rows, schema=fields))
            write_tar(folder, f"{shard:05d}", [r["key"] for r in rows])
    return folder


def write_tar(folder: Path, shard: str, keys: list[str]) -> None:
    samples = [(k, {"png": picture(k), "txt": b"a circle", "json": b"{}"}) for k in keys]
    write_shard(folder / f"{shard}.tar", samples)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curated(tmp_path_factory.mktemp("contract") / "curated", 2, 8)


@pytest.fixture
def curated(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "curated")


def change(curated: Path, place: int, **values: object) -> Row:
    """Change a row of the manifest; returns it as it was."""
    table = pq.read_table(curated / "manifest.parquet")
    rows = table.to_pylist()
    before = dict(rows[place])
    rows[place] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), curated / "manifest.parquet")
    return before


def run(curated: Path, settings: dict[str, Any] | None = None, **others: Any) -> None:
    folder = curated.parent
    tracker = others.get("tracker", Tracker())
    check(curated, folder / "metrics.json", folder / "docs", settings or params(), tracker)


def failures(curated: Path) -> dict[str, dict[str, Any]]:
    """What failed, by column; GX gives them in an order of its own."""
    figures = json.loads((curated.parent / "metrics.json").read_text())
    assert figures["success"] is False
    assert figures["held"] + len(figures["failed"]) == figures["expectations"]
    return {f["column"] or f["settings"].get("column_A") or "": f for f in figures["failed"]}


def test_contract_holds(curated: Path) -> None:
    kept: list[tuple[Path, str | None]] = []

    class Keeps(Tracker):
        def log_artifact(self, path: Path, folder: str | None = None) -> None:
            kept.append((path, folder))

    run(curated, tracker=Keeps())
    figures = json.loads((curated.parent / "metrics.json").read_text())
    assert figures["success"] is True and figures["rows"] == 16 and figures["failed"] == []
    docs = curated.parent / "docs"
    assert (docs / "index.html").is_file() and kept == [(docs, "contract")]
    assert not [p for p in docs.rglob("*") if "2026" in p.name]
    assert {p.name for p in curated.parent.iterdir()} == {"curated", "docs", "metrics.json"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"score_noise": 99.0}, r"to_be_between\(score_noise, max_value=12.*1 of 16.*{key}: 99.0"),
        ({"score_contrast": 3.0}, r"to_be_between\(score_contrast, min_value=24.*{key}: 3.0"),
        ({"width": 90}, r"to_be_between\(shorter_side, min_value=96.*{key}: 90"),
        ({"width": 800}, r"to_be_between\(aspect_ratio.*max_value=3.*{key}: 6.25"),
        ({"sha256": "no hash"}, r"to_match_regex\(sha256.*1 of 16 .*{key}: no hash"),
        ({"caption": None}, r"to_not_be_null\(caption\).*1 of 16 rows, as {key}"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(curated: Path, values: Row, words: str) -> None:
    key = change(curated, 3)["key"]
    change(curated, 3, **values)
    with pytest.raises(UserError, match=words.replace("{key}", key)):
        run(curated)
    assert len(failures(curated)) == 1


def test_examples_are_few_and_the_count_is_whole(curated: Path) -> None:
    for place in range(6):
        change(curated, place, score_noise=99.0)
    with pytest.raises(UserError, match=r"\(score_noise.*6 of 16"):
        run(curated)
    assert len(failures(curated)["score_noise"]["examples"]) == 3


@pytest.mark.parametrize("name", ["key", "sha256"])
def test_what_repeats_is_named(curated: Path, name: str) -> None:
    first = change(curated, 0)
    change(curated, 9, **{name: first[name]})
    with pytest.raises(UserError):
        run(curated)
    figures = json.loads((curated.parent / "metrics.json").read_text())
    (found,) = [f for f in figures["failed"] if f["expectation"].endswith("to_be_unique")]
    assert found["column"] == name and found["count"] == 2
    assert any(first["key"] in example for example in found["examples"])


def test_shares_rows_tail_and_required_notions(curated: Path) -> None:
    strict = params(synthetic={"share": 0.1}, contract={"rows": 99, "tail": 5})
    with pytest.raises(UserError, match=r"\(3 expectations failed\)"):
        run(curated, strict)
    found = failures(curated)
    share, tail = found["synthetic"], found["captions"]
    assert share["expectation"] == "expect_column_mean_to_be_between"
    assert share["observed"] == 0.125 and found[""]["observed"] == 16
    assert (tail["table"], tail["count"], tail["of"]) == ("notions", 3, 3)
    assert tail["examples"][0] == "notion_red: 4"
    with pytest.raises(UserError, match=r"expect_column_to_exist\(notion_violet"):
        run(curated, params(contract={"tail": 9, "required": ["red", "violet"]}))


def test_types_and_columns(curated: Path) -> None:
    path = curated / "manifest.parquet"
    table = pq.read_table(path)
    other = {"width": pa.int64(), "notion_red": pa.int8()}
    fields = [f.with_type(other.get(f.name, f.type)) for f in table.schema]
    pq.write_table(table.cast(pa.schema(fields)), path)
    with pytest.raises(UserError, match=r"expect_column_values_to_be_of_type\(width"):
        run(curated)
    assert failures(curated)["type"]["examples"] == ["notion_red: int8"]
    for name in ("key", "width"):
        pq.write_table(table.drop_columns([name]), path)
        with pytest.raises(UserError, match=rf"expect_column_to_exist\({name}\)"):
            run(curated)
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"manifest\.parquet cannot be read.*stage curate"):
        run(curated)


def test_manifest_and_shards_disagree(curated: Path) -> None:
    keys = [f"00001{i:05d}" for i in range(8)]
    write_tar(curated, "00001", [*keys[1:], keys[2], "more"])
    change(curated, 9, sha256="0" * 64)
    with pytest.raises(UserError, match=r"\(4 expectations failed\)"):
        run(curated)
    found = failures(curated)
    assert found["shard_sha256"]["examples"] == [f"{keys[0]}: None"]
    changed, repeated, unlisted = (found[n] for n in ("sha256", "error", "manifest_sha256"))
    assert changed["expectation"] == "expect_column_pair_values_to_be_equal"
    assert (
        changed["examples"][0].startswith(f"{keys[1]}: ['{'0' * 64}', '") and changed["count"] == 1
    )
    assert repeated["table"] == unlisted["table"] == "pictures"
    assert repeated["examples"] == [f"{keys[2]}: key {keys[2]} repeats in the shard"]
    assert unlisted["examples"] == ["more: None"]
    (curated / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"null\(shard_sha256\).*8 of 16"):
        run(curated)


class Fetched(HTMLParser):
    """What a browser fetches of a page by itself, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = [v for name, v in attrs if v and name in ("href", "src", "srcset", "data")]
        (self.linked if tag == "a" else self.fetched).extend(addresses)


def test_data_docs_open_without_a_network(curated: Path) -> None:
    run(curated)
    docs = curated.parent / "docs"
    for page in docs.rglob("*.html"):
        text = page.read_text()
        assert not [a for a in Fetched(page).fetched if "//" in a], page
        assert not re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)]*""", text), page
        assert str(curated.parent) not in text, page
    linked = [docs / a for a in Fetched(docs / "index.html").linked if a.endswith(".html")]
    assert linked and all(page.is_file() for page in linked)
    results = {p.name: p.read_text() for p in linked if "validations" in p.parts}
    assert len(results) == 3
    for words in ("score_noise", "aspect_ratio", '.fa-check-circle::before { content: "✓"'):
        assert words in results["curated-manifest.html"]
    assert "manifest_sha256" in results["curated-pictures.html"]
    before = {p.relative_to(docs) for p in docs.rglob("*")}
    run(curated)
    assert {p.relative_to(docs) for p in docs.rglob("*")} == before


PEAK = """
import sys
from pathlib import Path
from tests.test_contract import peak
print(peak(Path(sys.argv[1])))
"""


def peak(curated: Path) -> int:
    """KiB that a check adds at most to a process that has done another."""
    small = write_curated(curated.parent / f"{curated.name}-first" / "curated", 1, 8)
    run(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(curated, params(contract={"tail": 1}))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    added = []
    for shards in (2, 20):
        folder = write_curated(tmp_path / f"{shards}", shards, 2000, notions=50)
        answer = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True
        )
        added.append(int(answer.stdout.splitlines()[-1]))
    assert added[1] < added[0] + 16 * 1024, added  # the columns of 36,000 rows are 60 MiB


def test_an_empty_set_is_said_before_what_follows_from_it(tmp_path: Path) -> None:
    curated = write_curated(tmp_path / "curated", 1, 0)
    with pytest.raises(UserError, match=r"expect_table_row_count_to_be_between\(min_value=4\)"):
        run(curated)
