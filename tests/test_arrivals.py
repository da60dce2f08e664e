"""Which shards are new: taken once, whole, and again only when they changed."""

import json
import os
import time
from pathlib import Path

import pandas as pd
import pytest

from components.arrivals import Found, at_work, begin, finish, repeats
from components.errors import Busy, UserError

QUIET = 300  # seconds


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


def arrive(folder: Path, name: str, content: str, ago: float = 3600) -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    os.utime(file, (time.time() - ago,) * 2)
    return file


def taken(places: tuple[Path, Path]) -> Found:
    """A whole run, its curation left out."""
    found = begin(*places, QUIET)
    if found.batch:
        finish(found.batch, {"kept": 1})
    return found


def names(found: Found) -> list[str]:
    return sorted(found.batch.shards) if found.batch else []


def test_each_shard_is_taken_once_and_only_when_it_is_whole(places: tuple[Path, Path]) -> None:
    source, out = places
    arrive(source, "00000.tar", "a")
    arrive(source, "00000.parquet", "list of a")
    arrive(source, "more/00000.tar", "b")
    for name in (".hidden.tar", "00003.tar.tmp-12", "00004.tmp.tar", "notes.txt"):
        arrive(source, name, "no shard")
    arrive(source, "growing.tar", "c", ago=QUIET - 60)
    arrive(source, "listed.tar", "d")
    arrive(source, "listed.parquet", "still written", ago=1)
    found = begin(source, out, QUIET)
    assert names(found) == ["00000.tar", "more/00000.tar"]
    assert found.batch is not None and found.batch.name.endswith("-1")
    links = [p.relative_to(found.batch.links).as_posix() for p in found.batch.links.rglob("*.*")]
    assert sorted(links) == ["00000.parquet", "00000.tar", "more/00000.tar"]
    assert [words.split()[0] for words in found.left] == ["growing.tar", "listed.tar"]
    finish(found.batch, {"kept": 2})
    assert not (out / "links").exists()

    assert names(taken(places)) == []
    arrive(source, "growing.tar", "c, whole")
    arrive(source, "listed.parquet", "whole")
    second = taken(places)
    assert names(second) == ["growing.tar", "listed.tar"]
    assert second.batch is not None and second.batch.name.endswith("-2")
    ledger = json.loads((out / "ledger.json").read_text())
    assert {s["batch"] for s in ledger["shards"].values()} == set(ledger["batches"])


def test_changed_copied_and_touched_shards_are_told_apart(places: tuple[Path, Path]) -> None:
    source, _ = places
    arrive(source, "a.tar", "a")
    arrive(source, "b.tar", "b")
    taken(places)
    arrive(source, "a.tar", "a", ago=4000)  # touched
    arrive(source, "b.tar", "other")
    arrive(source, "copy.tar", "a")
    found = taken(places)
    assert names(found) == ["b.tar"]
    assert len(found.left) == 1 and found.left[0].startswith("copy.tar has the bytes of a.tar")
    again = taken(places)
    assert (again.batch, again.left) == (None, [])


def test_a_killed_run_goes_on_with_its_batch(places: tuple[Path, Path]) -> None:
    source, out = places
    arrive(source, "a.tar", "a")
    first = begin(source, out, QUIET).batch
    assert first is not None
    arrive(source, "later.tar", "later")
    second = begin(source, out, QUIET).batch
    assert second == first, "the same shards under the same name"
    finish(second, {})
    # Killed between ledger and note: the batch is done all the same.
    (out / "batch.json").write_text(json.dumps({"name": first.name, "shards": first.shards}))
    third = begin(source, out, QUIET)
    assert names(third) == ["later.tar"]
    # A shard that was changed meanwhile makes another batch.
    arrive(source, "later.tar", "later, changed")
    fourth = begin(source, out, QUIET).batch
    assert fourth is not None and fourth.shards != third.batch.shards  # type: ignore[union-attr]


def test_two_runs_at_once_and_folders_that_cannot_be_meant_are_refused(
    places: tuple[Path, Path],
) -> None:
    source, out = places
    busy = pytest.raises(Busy, match=r"curation into .*out is being run by process")
    with at_work(source, out), busy:
        at_work(source, out).__enter__()
    with pytest.raises(UserError, match="lie in each other"):
        at_work(source, source / "out").__enter__()
    with pytest.raises(UserError, match="There is no folder"):
        at_work(source / "nothing", out).__enter__()
    assert not (source / "out").exists()


def test_pictures_of_earlier_batches_are_listed(places: tuple[Path, Path]) -> None:
    source, out = places
    batches = []
    for number, shas in enumerate((["1", "2"], ["2", "3"], ["3", "1", "4"])):
        arrive(source, f"{number}.tar", str(number))
        batch = begin(source, out, QUIET).batch
        assert batch is not None
        batch.out.mkdir()
        keys = [f"{number}-{sha}" for sha in shas]
        table = pd.DataFrame({"key": keys, "shard": str(number), "sha256": shas})
        table.to_parquet(batch.out / "manifest.parquet")
        batches.append((batch, repeats(batch)))
        finish(batch, {})
    assert [count for _, count in batches] == [0, 1, 2]
    listed = pd.read_parquet(batches[2][0].out / "repeats.parquet")
    assert list(listed["first"]) == ["0-1", "1-3"]
    assert list(listed["batch"]) == [batches[0][0].name, batches[1][0].name]
