"""Statistical-analysis sampling, the ledger and the scores, by properties."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.feedback.sampler import StatisticalSampler, target_shares, trunc_norm
from components.feedback.scores import read_scores
from components.files import write_json


class View:
    """n samples, k notions of falling frequency, four rungs; 48x48 is reached by a tenth."""

    def __init__(self, n=2000, k=12, seed=0):
        rng = np.random.default_rng(seed)
        self.notions = rng.random((n, k)) < 0.6 / np.arange(1, k + 1)
        self.notion_names = [f"n{i}" for i in range(k)]
        self.rungs = {"32x32": (32, 32), "48x32": (48, 32), "32x48": (32, 48), "48x48": (48, 48)}
        aspect = rng.integers(3, size=n)
        self._rows = {
            "32x32": np.arange(n),
            "48x32": np.flatnonzero(aspect == 1),
            "32x48": np.flatnonzero(aspect == 2),
            "48x48": np.flatnonzero(aspect == 0)[: n // 10],
        }

    def rows(self, rung):
        return self._rows[rung]


def make(view, critic=None, seed=0, size=None, rungs=None, packs=False, **feedback):
    params = {
        "training": {
            "phase1": {
                "rungs": rungs or list(view.rungs),
                "size": size or {"mean": 38, "std": 8, "low": 24, "high": 48},
                "batch": 16,
            }
        },
        "feedback": {
            "sampling": "statistical",
            "coin": "sample",
            "discard": 0.5,
            "tempering": 0.0,
            "most_dropped": 0.9,
        }
        | feedback,
    }
    return StatisticalSampler(view, params, "phase1", seed, critic, packs)


def draw(sampler, samples):
    ids = []
    while len(ids) < samples:
        ids.extend(sampler.next_batch()[1].tolist())
    return np.array(ids)


@given(
    st.floats(-50, 50), st.floats(0, 30), st.floats(-60, 60), st.floats(0, 40), st.integers(0, 9)
)
def test_trunc_norm_stays_within_absolute_bounds(mean, std, low, width, seed):
    x = trunc_norm(np.random.default_rng(seed), mean, std, low, low + width, 50)
    assert ((x >= low) & (x <= low + width)).all()


@pytest.mark.parametrize(
    "mean, std, low, high",
    [(512, 120, 256, 1024), (1024, 1000, 256, 4096), (0, 1, 3, 5), (0, 1, -6, -4), (0, 1, 9, 10)],
)
def test_trunc_norm_is_scipys(mean, std, low, high):
    x = trunc_norm(np.random.default_rng(0), mean, std, low, high, 4000)
    exact = stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    assert stats.kstest(x, exact.cdf).pvalue > 1e-3


def test_trunc_norm_refuses_crossed_bounds():
    with pytest.raises(UserError, match="low"):
        trunc_norm(np.random.default_rng(0), 0, 1, 2, 1, 3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_target_shares_sum_to_one_and_keep_the_order(counts, tempering):
    counts = np.array(counts)
    shares = target_shares(counts, tempering)
    assert np.isclose(shares.sum(), 1.0 if counts.any() else 0.0)
    assert (shares[counts == 0] == 0).all()
    by_count = shares[np.argsort(counts, kind="stable")]
    assert (np.diff(by_count[np.sort(counts) > 0]) >= -1e-12).all()
    if counts.any():
        assert np.allclose(target_shares(counts, 1.0), counts / counts.sum())


def test_batches_have_one_rung_that_their_samples_reach_and_a_constant_number_of_tokens():
    view = View()
    sampler = make(view)
    areas = set()
    for _ in range(200):
        rung, ids = sampler.next_batch()
        assert np.isin(ids, view.rows(rung)).all()
        areas.add((rung, len(ids)))
    assert areas == {("32x32", 16), ("48x32", 11), ("32x48", 11), ("48x48", 7)}


@pytest.mark.parametrize("sampling", ["statistical", "uniform"])
def test_sizes_follow_trunc_norm_whatever_is_discarded(sampling):
    size = {"mean": 38.0, "std": 8.0, "low": 24.0, "high": 48.0}
    sampler = make(View(), critic=np.linspace(0, 1, 2000), size=size, sampling=sampling)
    draw(sampler, 20_000)
    trained = sampler.report()["rungs"]
    a, b = (24 - 38) / 8, (48 - 38) / 8
    # Nearest rung: the border lies half way between 32 and 48 px.
    expected = stats.truncnorm.cdf((40 - 38) / 8, a, b)
    assert abs(trained["32x32"] / sum(trained.values()) - expected) < 0.02


def test_uniform_sampling_is_unbiased():
    view = View(n=200)
    sampler = make(view, sampling="uniform", rungs=["32x32"])
    times = np.bincount(draw(sampler, 40_000), minlength=200)
    assert stats.chisquare(times).pvalue > 1e-3
    report = sampler.report()
    assert report["discarded"] == {"size": 0, "notion": 0, "critic": 0}


@pytest.mark.parametrize("coin", ["sample", "notion"])
def test_notions_move_towards_their_target(coin):
    sampler = make(View(), coin=coin)
    draw(sampler, 20_000)
    distance = sampler.report()["distance"]
    assert distance["trained"] < 0.93 * distance["set"]


def test_notions_at_their_target_are_left_alone_within_the_coins_reach():
    # Two notions, 60 : 40 and never together: a 50 % discard is more than enough.
    view = View(n=1000, k=2)
    view.notions = np.zeros((1000, 2), bool)
    view.notions[:600, 0] = view.notions[600:, 1] = True
    sampler = make(view, rungs=["32x32"])
    draw(sampler, 20_000)
    assert abs(sampler.report()["notions"]["n0"]["trained"] - 0.5) < 0.01


def test_one_coin_a_sample_does_not_push_down_captions_of_many_notions():
    sampler = make(View())
    sampler.counts = np.full(12, 10)
    sampler.counts[:4] = 100  # four above their target
    sampler.notions = np.zeros((2, 12), bool)
    sampler.notions[0, 0] = sampler.notions[1, :4] = True
    assert np.allclose(sampler.discard_probability(np.array([0, 1])), [0.5, 0.5])
    sampler.coin = "notion"
    assert np.allclose(sampler.discard_probability(np.array([0, 1])), [0.5, 1 - 0.5**4])


def test_the_critic_drops_with_its_probability_and_never_for_good():
    view = View(n=400)
    scores = np.repeat([0.0, 0.5, 1.0], [100, 200, 100])
    sampler = make(view, critic=scores, sampling="uniform", rungs=["32x32"])
    times = np.bincount(draw(sampler, 40_000), minlength=400)
    kept = [times[:100].mean(), times[100:300].mean(), times[300:].mean()]
    assert abs(kept[1] / kept[0] - 0.5) < 0.05
    assert abs(kept[2] / kept[0] - 0.1) < 0.03
    assert abs(sampler.report()["dropped_by_critic"] - (0.25 * 0 + 0.5 * 0.5 + 0.25 * 0.9)) < 0.02


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 60), st.sampled_from(["sample", "notion"]), st.booleans())
def test_state_round_trip_gives_the_same_draws(batches, coin, with_critic):
    view = View(n=300)
    critic = np.linspace(0, 1, 300) if with_critic else None
    one = make(view, critic, coin=coin)
    for _ in range(batches):
        one.next_batch()
    other = make(view, critic, seed=99, coin=coin)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(20):
        (rung, ids), (rung_2, ids_2) = one.next_batch(), other.next_batch()
        assert rung == rung_2 and (ids == ids_2).all()
    assert one.report() == other.report()


def test_state_has_a_bounded_size():
    sampler = make(View())
    sizes = []
    for _ in range(6):
        draw(sampler, 3000)
        state = sampler.state_dict()
        sizes.append(len(state["pending"]) + sum(map(len, state["queues"])))
    assert max(sizes) < 2000


def test_a_pack_holds_the_tokens_of_a_batch_in_all_sizes_and_goes_on_exactly():
    view = View()
    sampler, shares, areas = make(view, packs=True), dict.fromkeys(view.rungs, 0), []
    for _ in range(150):
        pack = sampler.next_pack()
        area = sum(np.prod(view.rungs[rung]) * len(ids) for rung, ids in pack)
        assert 0 < area <= 16 * 32 * 32
        areas.append(area)
        for rung, ids in pack:
            assert np.isin(ids, view.rows(rung)).all()
            shares[rung] += len(ids)
    # Nothing is padded: less than one largest picture of the budget is left over.
    assert min(areas) > 16 * 32 * 32 - 48 * 48
    # Sizes follow trunc_norm as they do in batches of one rung.
    other = make(view, seed=1)
    draw(other, sum(shares.values()))
    square = other.report()["rungs"]["32x32"] / sum(other.report()["rungs"].values())
    assert shares["32x32"] / sum(shares.values()) == pytest.approx(square, abs=0.03)
    again = make(view, seed=99, packs=True)
    again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for _ in range(5):
        for (rung, ids), (rung_2, ids_2) in zip(
            sampler.next_pack(), again.next_pack(), strict=True
        ):
            assert rung == rung_2 and (ids == ids_2).all()
    assert len(sampler.order) == sum(map(len, sampler.queues)) < 2000


def test_state_of_another_set_is_refused():
    state = make(View(n=300)).state_dict()
    with pytest.raises(UserError, match="another encoded set"):
        make(View(n=301)).load_state_dict(state)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"sampling": "random"}, "feedback.sampling"),
        ({"coin": "gold"}, "feedback.coin"),
        ({"rungs": ["64x64"]}, "64x64"),
        ({"critic": np.ones(3)}, "critic"),
        ({"discard": 1.0, "coin": "notion"}, "turned away"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(arguments, words, monkeypatch):
    monkeypatch.setattr("components.feedback.sampler.HOPELESS", 20_000)
    view = View(n=50)
    view.notions[:] = False
    view.notions[:49, 0] = view.notions[:, 1] = True
    with pytest.raises(UserError, match=words):
        draw(make(view, **arguments), 5000)


def test_a_rung_that_nothing_reaches_is_refused():
    view = View(n=30)
    view.rungs["96x96"] = (96, 96)
    view._rows["96x96"] = np.zeros(0, np.int64)
    with pytest.raises(UserError, match="96"):
        make(view)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 11), max_size=600))
def test_ledger_counts_saturate_and_survive_the_disk(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ledger") / "ledger"
    ledger = Ledger.of(["a"] * 5 + ["b"] * 7)
    for start in range(0, len(ids), 50):
        ledger.add(np.array(ids[start : start + 50], np.int64))
    exact = np.bincount(ids, minlength=12) if ids else np.zeros(12, int)
    assert (ledger.drawn == np.minimum(exact, 255)).all()
    ledger.save(folder)
    again = Ledger.load(folder)
    assert again.shards == {"a": 5, "b": 7} and (again.drawn == ledger.drawn).all()
    assert again.report()["never"] == int((exact == 0).sum())


def test_ledger_saturates_at_255_and_takes_one_byte_a_sample():
    ledger = Ledger({"a": 1000})
    ledger.add(np.zeros(300, np.int64))
    ledger.add(np.zeros(300, np.int64))
    assert ledger.drawn[0] == 255 and ledger.drawn.nbytes == 1000
    assert ledger.report()["never"] == 999 and ledger.report()["saturated"] == 1


def test_damaged_ledger_is_refused(tmp_path):
    Ledger({"a": 4, "b": 2}).save(tmp_path / "ledger")
    np.save(tmp_path / "ledger" / "b.npy", np.zeros(3, np.uint8))
    with pytest.raises(UserError, match=r"b\.npy"):
        Ledger.load(tmp_path / "ledger")


def test_scores_are_read_in_the_samples_order(tmp_path):
    keys = pd.Series(["b", "a"])
    assert read_scores(None, keys) is None
    with pytest.raises(UserError, match="critic stage"):
        read_scores(tmp_path, keys)
    table = pd.DataFrame({"key": ["a", "b", "c"], "score": [0.1, 0.2, 0.3]})
    table.to_parquet(tmp_path / "scores.parquet")
    write_json(tmp_path / "config.json", {"drops": True})
    assert np.allclose(read_scores(tmp_path, keys), [0.2, 0.1])
    with pytest.raises(UserError, match="no score"):
        read_scores(tmp_path, pd.Series(["a", "z"]))
    write_json(tmp_path / "config.json", {"drops": False})
    assert read_scores(tmp_path, keys) is None
