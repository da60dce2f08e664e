import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.feedback.sampler import StatisticalSampler
from components.files import write_json
from components.model import DJEPAPipeline
from components.tokens.encoded import EncodedSet
from components.tracking import Tracker
from components.training.batch import grouped
from components.training.batches import Batches
from components.training.checkpoint import Training
from components.training.distribution import Team, team
from components.training.draw import draw_for, truncated_normal
from components.training.losses import flow_error, losses
from components.training.optim import Muon, orthogonalise, rate_at
from components.training.phases import train_phase
from tests.kill import killed_after
from tests.tiny_curated import tiny_params


@pytest.fixture(scope="module")
def encoded(encoded_folder):
    return encoded_folder


def train(encoded, out, name="phase1", params=None, init=None, critic=None, tracker=None):
    train_phase(
        name,
        encoded,
        init,
        critic,
        out / "models" / name,
        out / "states" / name,
        out / f"{name}.json",
        out / "resume" / name,
        params or tiny_params(),
        tracker or Tracker(),
    )
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The sample ids of every batch that this process draws, in order."""
    batches, draw = [], StatisticalSampler.next_batch

    def noted(self):
        rung, ids = draw(self)
        batches.append(ids.tolist())
        return rung, ids

    monkeypatch.setattr(StatisticalSampler, "next_batch", noted)
    return batches


def test_the_number_of_processes_changes_rounding_only(encoded, tmp_path):
    """With Muon, whose work is shared; tests/test_distribution.py has AdamW and FSDP."""
    said = []
    for workers in (1, 2):
        params = tiny_params()
        params["training"] |= {"workers": workers, "lines": 1000, "grids": 0}
        params["training"]["phase1"]["images"] = 24
        lines = train(encoded, tmp_path / str(workers), params=params)["history"]
        said.append([[line[k] for k in ("flow", "jepa", "gradient_norm")] for line in lines])
    assert len(said[0]) == 3
    np.testing.assert_allclose(said[1], said[0], rtol=1e-4)


def test_phases_train_save_and_draw(encoded, tmp_path, drawn):
    kept = []

    class Keeper(Tracker):
        def log_metrics(self, metrics, step=None, images=None):
            kept.append((step, images, metrics))

        def log_artifact(self, path, folder=None):
            assert path.stat().st_size > 1000
            kept.append((path.name, folder))

    first = train(encoded, tmp_path, tracker=Keeper())
    assert first["images"] >= 96 and first["final"]["loss"] > 0
    assert sum(first["sampling"]["rungs"].values()) == first["images"]
    assert set(first["sampling"]["kinds"]) == {"notion", "style", "source"}
    assert sum(first["coverage"]["drawn"]) == 36
    assert first["coverage"]["attributes"]["notion"]["attributes"] == 3
    assert len([k for k in kept if k[0] and "train/flow" in k[-1]]) == 4
    assert any(k[0] and str(k[0]).startswith("phase1-step-") and k[1] == "samples" for k in kept)
    assert not (tmp_path / "resume").joinpath("phase1").exists()

    opened, critic = EncodedSet.open(encoded), tmp_path / "critic"
    critic.mkdir()
    np.save(critic / "scores.npy", np.tile(np.float32([0.1, 0.9]), len(opened) // 2))
    write_json(critic / "config.json", {"drops": True, "keys": opened.keys})
    second = train(encoded, tmp_path, "phase2", init=tmp_path / "states" / "phase1", critic=critic)
    assert second["images_total"] == first["images"] + second["images"]
    assert second["dropped_by_critic"] > 0.2
    # The ledger of both phases counts every sample as often as it was drawn.
    counts = np.bincount(np.concatenate(drawn), minlength=len(opened))
    ledger = Ledger.load(tmp_path / "states" / "phase2" / "ledger")
    assert counts.sum() == second["images_total"] and (ledger.drawn == counts).all()
    pipe = DJEPAPipeline.from_pretrained(tmp_path / "models" / "phase2")
    for size in ((24, 24), (32, 24)):
        image = pipe(["a photo of a red circle"], width=size[0], height=size[1]).images[0]
        assert image.size == size


@pytest.mark.parametrize(("saves", "parts"), [(1, 1), (5, 3)])
def test_kill_and_resume_give_the_same_weights_and_samples(
    encoded, tmp_path, monkeypatch, saves, parts, drawn
):
    params = tiny_params()
    params["training"]["accumulate"] = parts
    train(encoded, tmp_path / "whole", params=params)
    whole_ids, drawn[:] = list(drawn), []
    params["training"]["snapshot_seconds"] = 0
    with killed_after(saves, monkeypatch):
        train(encoded, tmp_path / "broken", params=params)
    train(encoded, tmp_path / "broken", params=params)
    assert drawn == whole_ids  # none repeated, none lost
    for name in ("model", "ema", "target", "optimizer"):
        whole, broken = (
            load_file(tmp_path / which / "states" / "phase1" / f"{name}.safetensors")
            for which in ("whole", "broken")
        )
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole), name


def _orthogonalise_beside(place, out, gradients):
    out.write_text(json.dumps(_muon_step(place, gradients).tolist()))
    place.sum(torch.zeros(1))  # only now may rank 0 go


def _muon_step(place, gradients):
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    muon = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.0)
    muon.team = place
    muon.step()
    return torch.cat([w.detach().flatten() for w in weights])


def test_a_team_shares_muons_work_and_all_get_the_same_weights(tmp_path):
    g = torch.Generator().manual_seed(0)
    gradients = [torch.randn(*s, generator=g) for s in ((8, 8), (24, 8), (8, 32), (8, 8), (8, 8))]
    alone = _muon_step(Team(), gradients)
    with team(2, _orthogonalise_beside, tmp_path / "peer", gradients) as place:
        together = _muon_step(place, gradients)
        place.sum(torch.zeros(1))
    peer = torch.tensor(json.loads((tmp_path / "peer").read_text()))
    assert torch.equal(together, peer)
    assert torch.allclose(together, alone, atol=1e-5)


def _die(place):
    os._exit(3)


def test_a_dead_process_is_said_in_a_sentence():
    with pytest.raises(UserError, match="training process ended"), team(2, _die) as place:
        place.sum(torch.zeros(1))


def test_losses_reach_the_model_and_not_the_target_encoder(encoded):
    params, data = tiny_params(), EncodedSet.open(encoded)
    training = Training.fresh(params, data)
    training.target.requires_grad_(True)
    ids = data.rows("24x16")[:4]
    latents, (states, mask) = data.latents("24x16", ids), data.text(ids)
    tokens = latents.flatten(2).transpose(1, 2)
    draw = draw_for(tokens, params["training"], torch.Generator().manual_seed(0))
    batch = grouped(training.model, tokens, states, mask, (6, 4), draw)
    flow, jepa = losses(training.model, training.target, batch, 2.0)
    (flow + jepa).backward()
    assert all(p.grad is None for p in training.target.parameters())
    assert any(p.grad is not None and p.grad.any() for p in training.model.parameters())
    error = flow_error(training.model, latents, states, mask, draw)
    assert error.shape == (4,)
    if not draw.drop.any():
        assert float(error.mean()) == pytest.approx(float(flow), rel=1e-4)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_batch_is_dealt_out_whole_in_parts_that_are_as_small_as_asked(
    encoded, images, size, accumulate, packs
):
    params, data = tiny_params(), EncodedSet.open(encoded)
    params["training"] |= {"accumulate": accumulate, "batches": "packed" if packs else "grouped"}
    network, ids = Training.fresh(params, data).model, data.rows("24x16")[:images]
    sampler = SimpleNamespace(next_batch=lambda: ("24x16", ids), next_pack=lambda: [("24x16", ids)])
    rows, shares = [], []
    for rank in range(size):
        place = Team(rank, size)
        step = Batches(data, sampler, network, params["training"], 7, place).next(3)
        parts = list(step.parts)
        assert step.ids.tolist() == ids.tolist()
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert all(part.share > 0 for part in parts[:-1])  # only the last may be for nothing
        shares.append([part.share for part in parts])
        for part in parts:
            batch = part.batch
            pictures = batch.t.shape[0] * batch.t.shape[1]
            assert pictures <= math.ceil(images / (size * accumulate))
            rows += [] if part.share == 0 else batch.t.flatten(0, 1)[:, 0].tolist()
    assert len({len(each) for each in shares}) == 1  # all meet as often
    assert sum(map(sum, shares)) == pytest.approx(1)
    (whole,) = (
        Batches(data, sampler, network, params["training"] | {"accumulate": 1}, 7, Team())
        .next(3)
        .parts
    )
    assert sorted(rows) == sorted(whole.batch.t.flatten(0, 1)[:, 0].tolist())  # none twice or lost


def test_orthogonalise_flattens_the_singular_values():
    for shape in ((24, 24), (24, 96), (96, 24)):
        matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert values.max() < 1.4 and values.median() > 0.6


def test_rate_goes_up_stays_and_goes_down_to_zero():
    rates = [rate_at(i / 100, "linear", 0.1, 0.3, 0.0) for i in range(101)]
    assert rates[0] < 0.05 and rates[20] == rates[60] == 1 and rates[100] == 0
    assert sorted(rates[:11]) == rates[:11] and sorted(rates[70:], reverse=True) == rates[70:]
    # The paper's: cosine from 1e-5 to 1e-6 after the warm-up.
    cosine = [rate_at(i / 100, "cosine", 0.1, 0.9, 0.1) for i in range(101)]
    assert cosine[100] == pytest.approx(0.1) and cosine[55] == pytest.approx(0.55)
    assert cosine[10] == 1 and sorted(cosine[10:], reverse=True) == cosine[10:]


def test_mask_ratio_is_cut_to_its_bounds():
    g = torch.Generator().manual_seed(0)
    ratios = [truncated_normal(1.0, 0.25, 0.5, 1.0, g) for _ in range(500)]
    assert min(ratios) >= 0.5 and max(ratios) <= 1 and sum(r > 0.75 for r in ratios) > 300


def test_bad_input_is_said_in_a_sentence(encoded, tmp_path):
    params = tiny_params()
    params["training"]["optimizer"]["muon_rate"] = 1e20
    params["training"]["optimizer"]["adam_rate"] = 1e20
    with pytest.raises(UserError, match="diverged"):
        train(encoded, tmp_path / "a", params=params)
    params = tiny_params()
    params["model"]["network"]["width"] = 18
    with pytest.raises(UserError, match="width 18"):
        train(encoded, tmp_path / "b", params=params)
    with pytest.raises(UserError, match="states"):
        train(encoded, tmp_path / "c", init=tmp_path / "states")


def test_each_round_is_handed_samples_of_its_own(encoded, tmp_path, drawn):
    train(encoded, tmp_path)
    before, handed = tmp_path / "states" / "phase1", []
    for name in ("r1", "r2"):
        drawn.clear()
        train(encoded, tmp_path / name, "phase2", init=before)
        handed.append(drawn.copy())
        before = tmp_path / name / "states" / "phase2"
    assert handed[0][0] != handed[1][0]
