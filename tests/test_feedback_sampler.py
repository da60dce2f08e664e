"""Statistical-analysis sampling, by properties."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.errors import UserError
from components.feedback.sampler import StatisticalSampler
from components.feedback.sizes import TargetRungs, trunc_norm
from components.feedback.targets import Targets, check_targets, evenness, tempered_shares

SIZE = {"mean": 38.0, "std": 8.0, "low": 24.0, "high": 48.0}
ASPECT = {"mean": 0.1, "std": 0.5, "low": -1.0, "high": 1.0}


class View:
    """n samples with notions by a mask (n, k) and a source each; 48x48 is reached by a tenth."""

    def __init__(self, n=2000, k=12, seed=0, has=None):
        rng = np.random.default_rng(seed)
        self.has = rng.random((n, k)) < 0.6 / np.arange(1, k + 1) if has is None else np.array(has)
        self.source = rng.choice(3, n, p=[0.7, 0.25, 0.05])
        n, k = self.has.shape
        self.attribute_names = {
            "notion": [f"n{i}" for i in range(k)],
            "style": [],
            "source": ["studio", "street", "drawn"],
        }
        self.attribute_counts = np.r_[self.has.sum(0), np.bincount(self.source, minlength=3)]
        self.rungs = {"32x32": (32, 32), "48x32": (48, 32), "32x48": (32, 48), "48x48": (48, 48)}
        aspect = rng.integers(3, size=n)
        self._rows = {
            "32x32": np.arange(n),
            "48x32": np.flatnonzero(aspect == 1),
            "32x48": np.flatnonzero(aspect == 2),
            "48x48": np.flatnonzero(aspect == 0)[: n // 10],
        }

    def __len__(self):
        return len(self.has)

    def rows(self, rung):
        return self._rows[rung]

    def attributes(self, ids):
        has, k = self.has[ids], self.has.shape[1]
        values = [
            [*np.flatnonzero(row), k + s] for row, s in zip(has, self.source[ids], strict=True)
        ]
        return (
            np.concatenate(values or [np.zeros(0, int)]).astype(np.uint16),
            np.cumsum([0, *map(len, values)]),
        )


def make(
    view, critic=None, seed=0, size=None, rungs=None, packs=False, aspect=None, held_out=None,
    **feedback,
):  # fmt: skip
    params = {
        "training": {
            "phase1": {
                "rungs": rungs or list(view.rungs),
                "size": size or SIZE,
                "aspect": aspect or ASPECT,
                "batch": 16,
            }
        },
        "feedback": {
            "sampling": "statistical",
            "coin": "sample",
            "discard": 0.5,
            "targets": {"notion": 0.0},
            "tolerance": 0.1,
            "most_dropped": 0.9,
        }
        | feedback,
    }
    return StatisticalSampler(view, params, "phase1", seed, critic, packs, held_out=held_out)


def draw(sampler, samples):
    ids = []
    while len(ids) < samples:
        ids.extend(sampler.next_batch()[1].tolist())
    return np.array(ids)


def trained(sampler, kind="notion"):
    values = sampler.report()["kinds"][kind]["values"]
    return {name: shares["trained"] for name, shares in values.items()}


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


def test_crossed_bounds_are_refused():
    with pytest.raises(UserError, match="low"):
        trunc_norm(np.random.default_rng(0), 0, 1, 2, 1, 3)
    with pytest.raises(UserError, match="aspect"):
        make(View(), aspect=ASPECT | {"low": 2})


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_tempered_shares_sum_to_one_and_keep_the_order(counts, tempering):
    counts = np.array(counts)
    shares = tempered_shares(counts, tempering)
    assert np.isclose(shares.sum(), 1.0 if counts.any() else 0.0)
    assert (shares[counts == 0] == 0).all()
    by_count = shares[np.argsort(counts, kind="stable")]
    assert (np.diff(by_count[np.sort(counts) > 0]) >= -1e-12).all()
    if counts.any():
        assert np.allclose(tempered_shares(counts, 1.0), counts / counts.sum())


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=8),
    st.dictionaries(st.sampled_from("abcdefghz"), st.floats(0, 0.11), max_size=9),
)
def test_named_shares_are_kept_and_the_others_divide_the_rest(counts, wanted):
    names = {"notion": list("abcdefgh")[: len(counts)]}
    targets = Targets(names, np.array(counts), {"notion": wanted})
    for name, share in wanted.items():
        if name in names["notion"]:
            assert targets.share[names["notion"].index(name)] == share
    absent = {value for _, value, _ in targets.absent}
    assert absent == {
        w for w in wanted if not dict(zip(names["notion"], counts, strict=True)).get(w)
    }
    others = [i for i, name in enumerate(names["notion"]) if name not in wanted and counts[i]]
    if others:
        rest = targets.share[others]
        assert np.isclose(rest.sum(), 1 - sum(wanted.values()))
        assert np.allclose(
            rest / rest.sum(), np.array(counts)[others] / np.sum(np.array(counts)[others])
        )
        # What is held against shares of what can be trained on adds up to 1.
        assert np.isclose(targets.bar[np.array(counts) > 0].sum(), 1)


@pytest.mark.parametrize(
    "targets, words",
    [
        ({"colour": 0.5}, "colour"),
        ({"notion": 1.5}, "1.5"),
        ({"source": {"studio": 0.7, "street": 0.4}}, r"1\.1"),
        ({"source": {"studio": "half"}}, "half"),
        ({"notion": True}, "True"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(targets, words):
    with pytest.raises(UserError, match=words):
        check_targets(targets, ("notion", "style", "source"))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.sampled_from([(24, 24), (32, 24), (24, 32), (32, 32), (48, 32), (48, 24), (64, 64)]),
        min_size=1, max_size=7, unique=True,
    ),
    st.floats(20, 70), st.sampled_from([0.0, 5.0, 20.0]),
    st.floats(-1, 1), st.sampled_from([0.0, 0.2, 1.0]),
)  # fmt: skip
def test_target_rungs_have_the_nearest_side_then_the_nearest_aspect(sizes, mean, std, middle, wide):
    size = {"mean": mean, "std": std, "low": 20, "high": 70}
    aspect = {"mean": middle, "std": wide, "low": -1.5, "high": 1.5}
    law, rng = TargetRungs(sizes, size, aspect), np.random.default_rng(0)
    drawn = law.draw(rng, 400)
    rng = np.random.default_rng(0)  # the same draws, matched the plain way
    sides = trunc_norm(rng, **size, count=400)
    aspects = trunc_norm(rng, **aspect, count=400)
    for j, side, a in zip(drawn, sides, aspects, strict=True):
        off = [abs(max(s) - side) for s in sizes]
        assert off[j] <= min(off) + 1e-9
        same = [s for s in sizes if max(s) == max(sizes[j])]
        away = min(abs(np.log2(w / h) - a) for w, h in same)
        assert abs(np.log2(sizes[j][0] / sizes[j][1]) - a) <= away + 1e-9
    assert np.isclose(law.shares().sum(), 1)


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
def test_sizes_and_aspects_follow_trunc_norm_whatever_is_discarded(sampling):
    sampler = make(View(), critic=np.linspace(0, 1, 2000), sampling=sampling)
    draw(sampler, 20_000)
    report = sampler.report()
    total = report["trained"]
    side = stats.truncnorm((24 - 38) / 8, (48 - 38) / 8, loc=38, scale=8)
    # Nearest rung: the border lies half way between 32 and 48 px.
    small = side.cdf(40)
    assert abs(report["longer_sides"]["32"] / total - small) < 0.02
    aspect = stats.truncnorm(-1.1 / 0.5, 0.9 / 0.5, loc=0.1, scale=0.5)
    border = np.log2(1.5) / 2  # 32 px has squares only; 48 px has 2:3, 1:1 and 3:2
    for name, share in (("3:2", aspect.sf(border)), ("2:3", aspect.cdf(-border))):
        assert abs(report["aspects"][name] / total - (1 - small) * share) < 0.02
    assert sum(report["rungs"].values()) == total
    assert report["accepted_share"] == report["accepted"] / report["drawn"] < 1


def test_uniform_sampling_is_unbiased_within_a_rung():
    sampler = make(View(n=200), sampling="uniform", rungs=["32x32"])
    times = np.bincount(draw(sampler, 40_000), minlength=200)
    assert stats.chisquare(times).pvalue > 1e-3
    assert sampler.report()["discarded"] == {"attributes": 0, "critic": 0}


@pytest.mark.parametrize("coin", ["sample", "notion"])
def test_notions_move_towards_their_target(coin):
    sampler = make(View(), coin=coin)
    draw(sampler, 20_000)
    report = sampler.report()["kinds"]["notion"]
    assert report["distance"]["trained"] < 0.93 * report["distance"]["set"]
    assert report["evenness"]["trained"] > report["evenness"]["set"]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(2, 10), min_size=2, max_size=5),
    st.sampled_from(["sample", "notion"]),
    st.integers(0, 3),
)
def test_targets_within_the_coins_reach_are_met(weights, coin, seed):
    """One notion a sample: a 50 % discard reaches any shares within a factor of two."""
    has = np.repeat(np.eye(len(weights), dtype=bool), np.array(weights) * 20, axis=0)
    view = View(has=has, seed=seed)
    shares = np.array(weights) / sum(weights)
    wanted = shares * np.where(np.arange(len(weights)) % 2, 1.0, 1.25)
    wanted = {f"n{i}": float(w) for i, w in enumerate(wanted / wanted.sum())}
    sampler = make(view, rungs=["32x32"], coin=coin, seed=seed, targets={"notion": wanted})
    draw(sampler, 15_000)
    reached = trained(sampler)
    assert all(abs(reached[name] - share) < 0.015 for name, share in wanted.items())
    assert sampler.report()["unmet"] == []


def test_a_source_is_steered_by_explicit_shares_beside_notions_that_are_only_counted():
    view = View(n=4000)
    sampler = make(view, rungs=["32x32"], targets={"source": {"studio": 0.6}})
    draw(sampler, 20_000)
    reached, report = trained(sampler, "source"), sampler.report()
    assert abs(reached["studio"] - 0.6) < 0.015
    # The others divide the rest as they do in the set: 25 to 5.
    assert abs(reached["street"] - 0.4 * 25 / 30) < 0.03
    assert not report["kinds"]["notion"]["steered"] and "distance" not in report["kinds"]["notion"]
    # Unsteered notions do not dilute the coin: every sample has just one steered attribute.
    sampler.counts[-3:] = 10, 0, 0
    sampler.totals[-1] = 10
    studio = np.flatnonzero(view.source == 0)[:5]
    assert np.allclose(sampler.discard_probability(studio), 0.5)


@pytest.mark.parametrize("coin", ["sample", "notion"])
def test_targets_that_cannot_be_met_are_reported_and_sampling_goes_on(coin):
    targets = {"source": {"drawn": 0.9, "painted": 0.05}, "style": {"oil": 1.0}}
    sampler = make(View(), coin=coin, targets=targets)
    draw(sampler, 8000)
    report = sampler.report()
    unmet = {(u["kind"], u["value"]): u for u in report["unmet"]}
    painted, oil, drawn = (
        unmet[key] for key in (("source", "painted"), ("style", "oil"), ("source", "drawn"))
    )
    assert painted["reached"] == oil["reached"] == 0 and painted["target"] == 0.05
    assert 0.05 < drawn["reached"] < 0.5 and drawn["samples"] == report["trained"] >= 8000
    assert report["unmet_count"] == len(report["unmet"])
    # All that can be done is done: what is above its target is discarded half the time.
    assert report["accepted_share"] > 0.5 - 0.02
    assert drawn["reached"] > 1.5 * report["kinds"]["source"]["values"]["drawn"]["set"]


def test_chance_alone_is_not_called_unmet():
    """A target that the coin would hold is not reported after few samples."""
    has = np.repeat(np.eye(2, dtype=bool), [60, 40], axis=0)
    for seed in range(20):
        sampler = make(View(has=has), rungs=["32x32"], seed=seed)
        assert sampler.report()["unmet"] == []  # nothing trained on, nothing to say
        draw(sampler, 32)
        assert sampler.report()["unmet"] == []


def test_one_coin_a_sample_does_not_push_down_captions_of_many_notions():
    has = np.zeros((4, 12), bool)
    has[0, 0] = has[1, :4] = has[2, 3:5] = True
    sampler = make(View(has=has), rungs=["32x32"], targets={"notion": 0.5})
    sampler.targets.bar[:12] = 1 / 12
    sampler.counts[:12] = 10
    sampler.counts[:4] = 100  # four above their target
    sampler.totals[0] = sampler.counts[:12].sum()
    ids = np.array([0, 1, 2, 3])  # the last one has no notion and is never discarded
    assert np.allclose(sampler.discard_probability(ids), [0.5, 0.5, 0.25, 0])
    sampler.coin = "notion"
    assert np.allclose(sampler.discard_probability(ids), [0.5, 1 - 0.5**4, 0.5, 0])


@pytest.mark.parametrize("coin", ["sample", "notion"])
def test_samples_without_any_notion_are_trained_on_and_never_discarded(coin):
    has = np.zeros((300, 3), bool)
    has[:100, 0] = has[:150, 1] = True
    sampler = make(View(has=has), rungs=["32x32"], coin=coin)
    times = np.bincount(draw(sampler, 30_000), minlength=300)
    without = times[150:]
    assert stats.chisquare(without).pvalue > 1e-3 and without.mean() >= times.mean()
    assert (sampler.discard_probability(np.arange(150, 300)) == 0).all()
    none = make(View(has=np.zeros((50, 3), bool)), rungs=["32x32"], coin=coin)
    draw(none, 500)
    assert none.report()["accepted_share"] == 1 and none.report()["unmet"] == []


def test_the_critic_drops_with_its_probability_and_never_for_good():
    view = View(n=400)
    scores = np.repeat([0.0, 0.5, 1.0], [100, 200, 100])
    sampler = make(view, critic=scores, sampling="uniform", rungs=["32x32"])
    times = np.bincount(draw(sampler, 40_000), minlength=400)
    kept = [times[:100].mean(), times[100:300].mean(), times[300:].mean()]
    assert abs(kept[1] / kept[0] - 0.5) < 0.05
    assert abs(kept[2] / kept[0] - 0.1) < 0.03
    assert abs(sampler.report()["dropped_by_critic"] - (0.25 * 0 + 0.5 * 0.5 + 0.25 * 0.9)) < 0.02


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 60), st.sampled_from(["sample", "notion"]), st.booleans(), st.booleans(),
    st.sampled_from([{"notion": 0.0}, {"notion": 0.5, "source": {"drawn": 0.3, "no": 0.1}}]),
)  # fmt: skip
def test_state_round_trip_gives_the_same_draws(batches, coin, with_critic, packs, targets):
    view = View(n=300)
    critic = np.linspace(0, 1, 300) if with_critic else None
    one = make(view, critic, coin=coin, packs=packs, targets=targets)

    def take(sampler):
        got = sampler.next_pack() if packs else [sampler.next_batch()]
        return [(rung, ids.tolist()) for rung, ids in got]

    for _ in range(batches):
        take(one)
    other = make(view, critic, seed=99, coin=coin, packs=packs, targets=targets)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(20):
        assert take(one) == take(other)
    assert one.report() == other.report()


def test_counts_are_those_of_the_batches_handed_out():
    view = View()
    sampler = make(view)
    ids = draw(sampler, 3000)
    expected = np.r_[view.has[ids].sum(0), np.bincount(view.source[ids], minlength=3)]
    assert (sampler.counts == expected).all()
    assert sampler.totals.tolist() == [expected[:12].sum(), 0, len(ids)]


def test_state_has_a_bounded_size():
    sampler = make(View())
    sizes = []
    for _ in range(6):
        draw(sampler, 3000)
        state = sampler.state_dict()
        sizes.append(len(state["pending"]) + len(state["waiting"]))
    assert max(sizes) < 2000


def test_a_pack_holds_the_tokens_of_a_batch_in_all_sizes():
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
    assert len(sampler.waiting) == len(sampler.waiting_rung) < 2000


class Billion:
    """10⁹ samples of which nothing is stored: attributes and rows follow from the id."""

    def __init__(self):
        self.rungs = {"32x32": (32, 32), "48x32": (48, 32)}
        self.attribute_names = {"notion": [f"n{i}" for i in range(1000)], "style": [], "source": []}
        self.attribute_counts = np.full(1000, 2_000_000)

    class Rows:
        def __len__(self):
            return 500_000_000

        def __getitem__(self, places):
            return 2 * places + 1

    def __len__(self):
        return 1_000_000_000

    def rows(self, rung):
        return self.Rows()

    def attributes(self, ids):
        values = (ids[:, None] * np.array([48271, 69621])) % 2147483647 % 1000
        return values.ravel(), 2 * np.arange(len(ids) + 1)


def test_memory_does_not_grow_with_the_number_of_samples():
    import tracemalloc

    tracemalloc.start()
    sampler = make(Billion(), critic=np.broadcast_to(np.float32(0.5), 1_000_000_000))
    ids = draw(sampler, 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 and ids.max() > 900_000_000 and (ids % 2 == 1).all()


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
        ({"critic": np.full(50, np.nan)}, "no number"),
        ({"discard": 1.0, "coin": "notion"}, "turned away"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(arguments, words, monkeypatch):
    monkeypatch.setattr("components.feedback.sampler.HOPELESS", 20_000)
    has = np.zeros((50, 12), bool)
    has[:49, 0] = has[:, 1] = True
    with pytest.raises(UserError, match=words):
        draw(make(View(has=has), **arguments), 5000)


def test_a_rung_that_nothing_reaches_is_refused():
    view = View(n=30)
    view.rungs["96x96"] = (96, 96)
    view._rows["96x96"] = np.zeros(0, np.int64)
    with pytest.raises(UserError, match="96"):
        make(view)


@given(st.lists(st.integers(0, 50), max_size=12))
def test_evenness_is_one_where_all_are_as_frequent(counts):
    value = evenness(np.array(counts, np.int64))
    assert 0 <= value <= 1 + 1e-12
    assert evenness(np.full(5, 3)) == pytest.approx(1)
