"""The coverage ledger: exact counts on the disk, and what was never trained on."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import UserError
from components.feedback.ledger import Ledger, coverage, never_drawn
from components.tokens.encoded import EncodedSet


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 11), max_size=600), st.integers(0, 12))
def test_counts_saturate_and_survive_the_disk(tmp_path_factory, ids, broken_at):
    folder = tmp_path_factory.mktemp("ledger") / "ledger"
    ledger = Ledger({"a": 5, "b": 7})
    for number, start in enumerate(range(0, len(ids), 50)):
        if number == broken_at:  # a resume
            ledger.save(folder)
            ledger = Ledger.load(folder, folder.parent)
        ledger.add(np.array(ids[start : start + 50], np.int64))
    exact = np.bincount(ids, minlength=12) if ids else np.zeros(12, int)
    assert (ledger.drawn == np.minimum(exact, 255)).all()
    ledger.save(folder)
    again = Ledger.load(folder)
    assert again.shards == {"a": 5, "b": 7} and (again.drawn == ledger.drawn).all()
    report = again.report()
    assert report["never"] == int((exact == 0).sum())
    assert report["drawn"] == np.bincount(np.minimum(exact, 255)).tolist()
    assert report["worst_shards"]["b"] == np.mean(exact[5:] == 0)


def test_saturates_at_255():
    ledger = Ledger({"a": 1000})
    ledger.add(np.zeros(300, np.int64))
    ledger.add(np.zeros(300, np.int64))
    assert ledger.drawn[0] == 255
    assert ledger.report()["never"] == 999 and ledger.report()["saturated"] == 1


def test_a_ledger_of_many_samples_is_no_heap(tmp_path):
    """A file without a name, and nothing left of it."""
    tracemalloc.start()
    shards = {f"{i:05d}": 10_000_000 for i in range(20)}
    ledger = Ledger(shards, tmp_path / "scratch")
    ledger.add(np.arange(0, 200_000_000, 1_000_003))
    assert ledger.report()["never"] == 200_000_000 - 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000 and not list((tmp_path / "scratch").iterdir())


def test_damaged_ledger_is_refused(tmp_path):
    Ledger({"a": 4, "b": 2}).save(tmp_path / "ledger")
    for spoil in (
        lambda path: np.save(path, np.zeros(3, np.uint8)),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.unlink(),
    ):
        spoil(tmp_path / "ledger" / "b.npy")
        with pytest.raises(UserError, match=r"b\.npy"):
            Ledger.load(tmp_path / "ledger")


def test_the_tail_is_named_by_shard_attribute_and_key(encoded_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("components.feedback.ledger.CHUNK", 5)
    encoded = EncodedSet.open(encoded_folder)
    keys = encoded.index["key"].to_numpy()
    ledger = Ledger(encoded.shards)
    blue = [i for i in range(36) if "blue" in encoded.index["notion_words"][i]]
    drawn = np.setdiff1d(np.arange(30), blue)
    ledger.add(drawn)
    ledger.add(drawn[:3])
    found = coverage(ledger, encoded)
    never = np.setdiff1d(np.arange(36), drawn)
    assert found["never"] == len(never) and found["never_keys"] == keys[never][:20].tolist()
    assert found["drawn"] == [len(never), len(drawn) - 3, 3]
    notions = found["attributes"]["notion"]
    assert notions["attributes"] == 3 and notions["never"] == 1
    assert next(iter(notions["least"])) == "blue"
    assert notions["least"]["blue"] == {"samples": 12, "never": 12, "draws_a_sample": 0.0}
    reds = np.setdiff1d(np.arange(0, 36), blue)
    reds = [i for i in reds if "red" in encoded.index["notion_words"][i]]
    assert notions["least"]["red"]["draws_a_sample"] == ledger.drawn[reds].mean()
    assert found["attributes"]["style"] == {"attributes": 0, "never": 0, "least": {}}
    ledger.save(tmp_path / "state" / "ledger")
    assert list(never_drawn(tmp_path / "state", encoded)) == keys[never].tolist()
    with pytest.raises(UserError, match="no training state"):
        list(never_drawn(tmp_path, encoded))
    Ledger({"other": 36}).save(tmp_path / "state" / "ledger")
    with pytest.raises(UserError, match="other samples"):
        list(never_drawn(tmp_path / "state", encoded))
