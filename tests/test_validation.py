"""Validation: pictures that nothing trains on, measured the same way each time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from components.errors import UserError
from components.evaluation.plots import validation_plot
from components.feedback.ledger import Ledger, coverage, never_drawn
from components.limits import check
from components.tokens.encode import encode
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.checkpoint import Training
from components.training.distribution import Team
from components.training.draw import truncated_normal
from components.training.phases import train_phase
from components.training.validation import MASKS, Split, Validation, errors, figures, hidden_shares
from tests.conftest import ROOT
from tests.kill import killed_after
from tests.test_feedback_sampler import View, make
from tests.tiny_curated import tiny_params

SETTINGS = {"pictures": 8, "most": 0.5, "points": 4, "times": 4, "seed": 0}


def params_with(**training):
    """One process, five steps, four points on pictures held out of the tiny set.

    tests/test_distribution.py measures in several processes.
    """
    params = tiny_params()
    params["training"] |= {"workers": 1, "grids": 0, "validation": SETTINGS, **training}
    params["training"]["phase1"]["images"] = 40
    return params


def as_dit(params):
    """The baseline, as ablation=dit trains it."""
    params["model"]["network"] |= {"kind": "flow_dit", "blocks": 2}
    params["training"] |= {"flow_samples": 1, "jepa_weight": 0.0}
    params["training"]["mask"] = {"mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0}
    return params


def train(encoded, out, params, name="phase1", init=None, tracker=None):
    train_phase(
        name, encoded, init, None, out / "model", out / "state", out / f"{name}.json",
        out / "resume", params, tracker or Tracker(),
    )  # fmt: skip
    return json.loads((out / f"{name}.json").read_text())


def validation_of(encoded, params, names=("24x24", "24x16")):
    data, training = EncodedSet.open(encoded), params["training"]
    split = Split.of(data, training["validation"])
    return data, split, Validation(data, split, names, training)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(40, 400), seed=st.integers(0, 99), pictures=st.integers(1, 40),
    most=st.floats(0, 0.5), packs=st.booleans(), with_critic=st.booleans(),
    sampling=st.sampled_from(["statistical", "uniform"]),
)  # fmt: skip
def test_what_is_held_out_is_never_handed_out(
    n, seed, pictures, most, packs, with_critic, sampling
):
    view = View(n=n, seed=seed)
    split = Split.of(view, SETTINGS | {"pictures": pictures, "most": most, "seed": seed})
    for rung, ids in split.rungs.items():
        assert np.isin(ids, view.rows(rung)).all() and len(np.unique(ids)) == len(ids) <= pictures
        assert len(ids) <= most * len(view.rows(rung))
    held_out = split.ids
    critic = np.linspace(0, 1, n) if with_critic else None
    try:
        sampler = make(view, critic, seed, packs=packs, sampling=sampling, held_out=held_out)
    except UserError as refused:  # 10 % of the samples reach the largest rung: all may be held out
        assert "reaches" in str(refused)
        return
    batches = [sampler.next_pack() if packs else [sampler.next_batch()] for _ in range(20)]
    drawn = np.concatenate([ids for batch in batches for _, ids in batch])
    assert not np.isin(drawn, held_out).any()
    kept = np.setdiff1d(np.arange(n), held_out)
    of_set = np.r_[view.has[kept].sum(0), np.bincount(view.source[kept], minlength=3)]
    assert (sampler.targets.counts == of_set).all()  # the statistics are those of what is left
    assert sampler.report()["held_out"] == len(held_out)


def test_what_is_left_is_drawn_evenly():
    view, held_out = View(n=200), np.r_[0:3, 50, 51, 120, 199]
    sampler = make(view, sampling="uniform", rungs=["32x32"], held_out=held_out)
    ids = np.concatenate([sampler.next_batch()[1] for _ in range(2500)])
    times = np.bincount(ids, minlength=200)
    assert (times[held_out] == 0).all()
    assert stats.chisquare(np.delete(times, held_out)).pvalue > 1e-3


def test_a_state_of_another_split_is_refused():
    state = make(View(n=300)).state_dict()
    with pytest.raises(UserError, match="another encoded set"):
        make(View(n=300), held_out=np.array([3, 7])).load_state_dict(state)


def test_a_split_of_a_billion_samples_is_a_split_of_few_numbers():
    import tracemalloc

    class Rows:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, places):
            return np.asarray(places, np.int64)

    class Billion:
        def __init__(self):
            self.rungs = {"32x32": (32, 32), "4096x4096": (4096, 4096), "64x64": (64, 64)}
            self.counts = {"32x32": 10**9, "4096x4096": 9, "64x64": 10**6}

        def rows(self, rung):
            return Rows(self.counts[rung])

    tracemalloc.start()
    split = Split.of(Billion(), SETTINGS | {"pictures": 1000, "most": 0.01})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = {rung: len(ids) for rung, ids in split.rungs.items()}
    assert sizes == {"32x32": 1000, "4096x4096": 0, "64x64": 1000}
    assert peak < 1_000_000 and split.rungs["32x32"].max() > 900_000_000


def test_the_split_is_the_encoded_sets_own_and_not_the_runs(encoded_folder, tmp_path):
    data = EncodedSet.open(encoded_folder)
    split = Split.of(data, SETTINGS)
    assert {len(ids) for ids in split.rungs.values()} <= {0, 1, 2, 3, 4}
    other = Split.of(data, SETTINGS | {"seed": 1})
    assert split.ids.tolist() != other.ids.tolist()
    one = train(encoded_folder, tmp_path / "0", params_with())
    two = train(encoded_folder, tmp_path / "1", params_with() | {"seed": 5})
    held = [
        Ledger.load(tmp_path / seed / "state" / "ledger").held_out.tolist() for seed in ("0", "1")
    ]
    assert held[0] == held[1] == split.ids.tolist()
    assert one["validation"]["flow"] != two["validation"]["flow"]  # other weights


def fresh(params, data):
    training = Training.fresh(params, data)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a fresh network says nothing: its last layers are 0
        for p in training.ema.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return training


@pytest.mark.parametrize("kind", ["djepa", "dit"])
def test_the_same_weights_give_the_same_figures_to_the_bit(encoded_folder, kind):
    params = params_with() if kind == "djepa" else as_dit(params_with())
    data, _, validation = validation_of(encoded_folder, params)
    training = fresh(params, data)
    torch.manual_seed(3)
    first = validation.measure(training.ema, training.target, Team())
    torch.manual_seed(4)
    again = validation_of(encoded_folder, params | {"seed": 9})[2]
    assert again.measure(training.ema, training.target, Team()) == first
    assert ("jepa" in first) == (kind == "djepa") == (training.target is not None)
    # Parts of it: both sizes, and the bins of t, which all have as many.
    assert np.mean(list(first["times"].values())) == pytest.approx(first["flow"], rel=1e-12)
    counts = [at.stop - at.start for at in validation.rungs.values()]
    whole = np.average(list(first["rungs"].values()), weights=counts)
    assert whole == pytest.approx(first["flow"], rel=1e-12)
    assert list(first["times"]) == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    # Another phase measures a rung that both have on the same pictures in the same way.
    alone = validation_of(encoded_folder, params, ("24x16",))[2]
    of_rung = alone.measure(training.ema, training.target, Team())["rungs"]["24x16"]
    assert of_rung == first["rungs"]["24x16"]


class Half(Team):
    """One of two processes; their parts are added up by the test."""

    def sum(self, values):
        self.parts.append(values.clone())


def test_processes_share_the_pictures_and_add_up_to_the_same_bits(encoded_folder):
    params = params_with()
    data, _, validation = validation_of(encoded_folder, params)
    training, parts = fresh(params, data), []
    for place in (Team(), Half(0, 2), Half(1, 2)):
        object.__setattr__(place, "parts", parts)
        if place.size == 1:
            object.__setattr__(place, "sum", lambda values: parts.append(values.clone()))
        validation.measure(training.ema, training.target, place)
    whole, one, other = parts
    assert torch.equal(whole, one + other)
    assert ((one != 0).any(1) ^ (other != 0).any(1)).all()


def test_times_fill_their_bins_and_masks_their_shares(encoded_folder):
    data, split, validation = validation_of(encoded_folder, params_with(most_tokens=20))
    hidden = []
    for group in validation.groups:
        tokens = data.latents(group.rung, group.ids).flatten(2).transpose(1, 2)
        draw = validation._draw(group, tokens)
        assert draw.order.shape[1] == group.tokens == min(tokens.shape[1], 20)
        assert not draw.drop.any() and draw.visible + group.hidden == group.tokens
        bins = (draw.t * 4).floor().long()
        assert (bins == torch.arange(4)).all()  # (B, 1, 4): one in each
        for row in draw.order:
            assert len(row.unique()) == len(row)
        hidden += [group.hidden / group.tokens] * len(group.ids)
    assert len(hidden) == validation.pictures == sum(len(split.rungs[r]) for r in validation.rungs)
    g = torch.Generator().manual_seed(0)
    mask = {"mean": 0.9, "std": 0.3, "low": 0.3, "high": 1.0}
    drawn = [truncated_normal(**mask, generator=g) for _ in range(4000)]
    quantiles = np.quantile(drawn, (np.arange(MASKS) + 0.5) / MASKS)
    np.testing.assert_allclose(hidden_shares(**mask), quantiles, atol=0.02)


def test_memorised_pictures_have_a_lower_loss_than_others(encoded_folder):
    """A network trained on the split itself, which no phase does, knows it and not another one."""
    params = params_with()
    data, split, validation = validation_of(encoded_folder, params, ("24x16",))
    other = Split({r: np.setdiff1d(data.rows(r), split.ids)[:4] for r in validation.rungs})
    unseen = Validation(data, other, list(validation.rungs), params["training"])
    training = Training.fresh(params, data)
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.02)

    def measured():
        return [v.measure(training.model, training.target, Team()) for v in (validation, unseen)]

    before = measured()
    batches = [validation._batch(group, training.model, "cpu") for group in validation.groups]
    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            sum(
                loss.mean() for loss in errors(training.model, training.target, batch, 2.0)
            ).backward()
            optimizer.step()
    after = measured()
    assert after[0]["flow"] < 0.5 * before[0]["flow"] and after[0]["jepa"] < before[0]["jepa"]
    assert all(after[0]["times"][bin] < value for bin, value in before[0]["times"].items())
    assert after[0]["flow"] < 0.8 * after[1]["flow"]


class Keeper(Tracker):
    def __init__(self):
        self.kept = []

    def log_metrics(self, metrics, step=None, images=None):
        self.kept.append((step, images, dict(metrics)))


@pytest.mark.parametrize("batches", ["grouped", "packed"])
def test_curves_are_kept_logged_and_the_same_after_a_kill(
    encoded_folder, tmp_path, monkeypatch, batches
):
    keeper = Keeper()
    whole = train(encoded_folder, tmp_path / "w", params_with(batches=batches), tracker=keeper)
    curve = whole["validation"]["history"]
    points = [(s, i, m) for s, i, m in keeper.kept if "validation/flow" in m]
    assert [(p["step"], p["images"]) for p in curve] == [(s, i) for s, i, _ in points]
    assert len(curve) == 4 and curve[-1]["images"] == whole["images"]
    assert points[-1][2] == figures(curve[-1])
    assert {"validation/flow/24x16", "validation/flow/t0.25-0.5", "validation/jepa"} <= set(
        points[-1][2]
    )
    assert whole["validation"]["flow"] == curve[-1]["flow"]
    params = params_with(batches=batches, snapshot_seconds=0)
    with killed_after(3, monkeypatch):
        train(encoded_folder, tmp_path / "b", params)
    broken = train(encoded_folder, tmp_path / "b", params)
    assert broken["validation"]["history"] == curve
    # Measuring changes nothing: neither the weights nor what is handed out.
    fewer = train(
        encoded_folder, tmp_path / "f", params_with(validation=SETTINGS | {"points": 1},
                                                    batches=batches),
    )  # fmt: skip
    assert fewer["sampling"] == whole["sampling"] == broken["sampling"]
    states = [load_file(tmp_path / n / "state" / "ema.safetensors") for n in ("w", "b", "f")]
    for other in states[1:]:
        assert all(torch.equal(other[key], states[0][key]) for key in states[0])


def test_the_ledger_says_the_split_apart_from_what_was_never_drawn(encoded_folder, tmp_path):
    params = params_with()
    params["training"]["phase1"]["images"] = 80
    said = train(encoded_folder, tmp_path, params)["coverage"]
    data = EncodedSet.open(encoded_folder)
    held_out = Split.of(data, SETTINGS).ids
    ledger = Ledger.load(tmp_path / "state" / "ledger")
    assert (ledger.drawn[held_out] == 0).all() and ledger.held_out.tolist() == held_out.tolist()
    left = np.delete(np.asarray(ledger.drawn), held_out)
    assert said["held_out"] == len(held_out) and said["samples"] == 36
    assert said["never"] == (left == 0).sum() and sum(said["drawn"]) == len(left)
    assert said == coverage(ledger, data)
    least = said["attributes"]["notion"]["least"]
    assert sum(n["samples"] for n in least.values()) == len(left)  # one colour each
    assert sum(n["never"] for n in least.values()) == said["never"]
    keys = data.keys_of(held_out)
    assert not set(keys) & set(never_drawn(tmp_path / "state", data))
    # The next phase may not hold out what was trained on.
    params["training"]["validation"] = SETTINGS | {"seed": 7}
    with pytest.raises(UserError, match=r"held out now .*training\.validation was changed"):
        train(encoded_folder, tmp_path, params, "phase2", tmp_path / "state")
    params["training"]["validation"] = SETTINGS | {"pictures": 0}
    second = train(encoded_folder, tmp_path, params, "phase2", tmp_path / "state")
    assert second["validation"] == {"held_out": 0, "pictures": 0}


def test_a_set_encoded_on_demand_has_the_same_split_and_figures(encoded_folder, tmp_path):
    curated, params = encoded_folder.parent / "curated", params_with()
    params["data"]["encode"] = "online"
    params["model"]["encode"]["most_cropped"] = 0.12
    encode(curated, tmp_path / "online", tmp_path / "encode.json", params, Tracker())
    cached, online = (validation_of(f, params) for f in (encoded_folder, tmp_path / "online"))
    assert cached[1].ids.tolist() == online[1].ids.tolist()
    training = fresh(params, cached[0])
    one, other = (v.measure(training.ema, training.target, Team()) for _, _, v in (cached, online))
    assert other["flow"] == pytest.approx(one["flow"], rel=1e-2)  # the cache is bfloat16


def test_too_few_samples_leave_it_out_and_say_so(encoded_folder, tmp_path, capsys):
    params = params_with(validation=SETTINGS | {"most": 0.01})
    params["training"]["phase1"]["images"] = 8
    said = train(encoded_folder, tmp_path, params)
    assert said["validation"] == {"held_out": 0, "pictures": 0}
    assert "no validation" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("pictures", -1), ("most", 1.5), ("times", 0)])
def test_settings_that_cannot_be_meant_are_refused(name, value):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["training"]["validation"][name] = value
    with pytest.raises(UserError, match=rf"training\.validation\.{name} is {value}"):
        check(params)


def test_the_plot_has_a_curve_by_size_and_by_time(tmp_path: Path):
    point = {"flow": 0.5, "rungs": {"24x24": 0.4, "24x16": 0.6}, "times": {"0-0.5": 1, "0.5-1": 0}}
    for extra, width in (({}, 880), ({"jepa": 0.1}, 1320)):
        history = [{"images": i, "step": i, **point, **extra} for i in (100, 200)]
        said = {"pictures": 8, **point, "history": history}
        validation_plot(said, "phase1", tmp_path / "plot.png")
        assert Image.open(tmp_path / "plot.png").width == width
