"""Preference optimisation: its loss, its stops, its snapshots, its pairs."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.compare import verdict
from components.feedback.pair_set import PairSet
from components.feedback.pairs import Answered, draw_pairs, make_pairs, split
from components.feedback.pictures import cover
from components.model.djepa import DJEPA
from components.model.lora import LoraMixin
from components.tracking import Tracker
from components.training.policy import Adapter, WholeModel
from components.training.preference_plot import preference_plot
from components.training.tuning import Tuning, dpo_loss
from tests.tiny_curated import tiny_config

KINDS = pytest.mark.parametrize("kind", ["whole", "lora"])
ERRORS = st.lists(st.floats(0, 4), min_size=4, max_size=4)


@given(ERRORS, st.floats(0.1, 1000))
def test_identical_policies_give_log_2(errors, beta):
    winner, loser = torch.tensor(errors[:2]), torch.tensor(errors[2:])
    loss, inside = dpo_loss(winner, loser, winner, loser, beta)
    assert loss == pytest.approx(np.log(2)) and (inside == 0).all()


@given(ERRORS, ERRORS, st.floats(0.1, 100))
def test_winner_and_loser_swapped_change_the_sign(mine, reference, beta):
    mine, reference = torch.tensor(mine), torch.tensor(reference)
    _, inside = dpo_loss(mine[:2], mine[2:], reference[:2], reference[2:], beta)
    _, other = dpo_loss(mine[2:], mine[:2], reference[2:], reference[:2], beta)
    assert torch.allclose(inside, -other, atol=1e-4)


def test_a_smaller_error_on_the_winner_lowers_the_loss():
    one = torch.ones(1)
    better, inside = dpo_loss(one - 0.1, one, one, one, 100.0)
    assert inside > 0 and better < np.log(2)
    assert inside.item() == pytest.approx(100 / 2 * 0.1)


MARGIN, EACH = 0.02, 3


def judged(prompt, answers, seed=0, tag="colors"):
    metadata = {"prompt": f"a photo of {prompt}", "tag": tag, "include": []}
    image = Image.fromarray(np.full((16, 16, 3), 40 * seed % 255, np.uint8))
    return Answered(metadata, seed, image, answers, "" if answers[0] else "why")


RIGHT, WRONG = (1.0, 1.0, 0.0, 0.9), (0.0, 0.5, 0.0, 0.9)
SAID = st.tuples(
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([-1.0, 0.0]),
    st.floats(0, 1),
)


@given(st.lists(st.tuples(st.integers(0, 4), SAID)))
def test_winners_are_better_and_each_picture_is_used_once(drawn):
    pictures = [judged(p, said, i) for i, (p, said) in enumerate(drawn)]
    pairs = make_pairs(pictures, MARGIN, EACH)
    by_image = {id(picture.image): picture for picture in pictures}
    for pair in pairs:
        winner, loser = (by_image[id(image)] for image in (pair.winner, pair.loser))
        assert winner.metadata["prompt"] == loser.metadata["prompt"] == pair.prompt
        assert verdict(winner.answers, loser.answers, MARGIN) == 1
        assert pair.facts["winner_correct"] == winner.answers[0]
    used = [id(p) for pair in pairs for p in (pair.winner, pair.loser)]
    assert len(used) == len(set(used))
    for prompt in {p for p, _ in drawn}:
        assert sum(p.prompt == f"a photo of {prompt}" for p in pairs) <= EACH
        said = sorted(answers for q, answers in drawn if q == prompt)
        apart = verdict(said[-1], said[0], MARGIN) == 1
        assert any(p.prompt == f"a photo of {prompt}" for p in pairs) >= apart


@pytest.mark.parametrize(
    ("winner", "loser", "why"),
    [
        ((1.0, 1.0, -2.0, 0.1), (0.0, 0.5, 0.0, 0.9), "why"),
        ((1.0, 1.0, 0.0, 0.1), (1.0, 1.0, -1.0, 0.9), "less coherent"),
        ((1.0, 1.0, 0.0, 0.93), (1.0, 1.0, 0.0, 0.9), "less real"),
    ],
)
def test_the_first_question_that_differs_decides(winner, loser, why):
    (pair,) = make_pairs([judged("x", loser, 1), judged("x", winner, 2)], MARGIN, EACH)
    assert (pair.facts["seed_winner"], pair.why) == (2, why)


def test_pictures_that_are_the_same_to_the_judge_are_no_pair():
    nearly = (1.0, 1.0, 0.0, 0.91)
    assert not make_pairs([judged("x", RIGHT), judged("x", nearly, 1)], MARGIN, EACH)


@given(st.integers(2, 20), st.floats(0.05, 0.9))
def test_no_prompt_has_pairs_on_both_sides(prompts, share):
    pairs = make_pairs(
        [judged(p, WRONG if k % 2 else RIGHT) for p in range(prompts) for k in range(4)],
        MARGIN,
        EACH,
    )
    split(pairs, share, 0)
    sides = pd.DataFrame([(p.prompt, p.held_out) for p in pairs]).groupby(0)[1].nunique()
    assert (sides == 1).all()
    assert 0 < sum(p.held_out for p in pairs) < len(pairs)


def test_picture_of_pairs(tmp_path):
    pairs = make_pairs(
        [judged(p, WRONG if k else RIGHT, k) for p in range(10) for k in range(2)], MARGIN, EACH
    )
    for number in (0, 1, 10):
        draw_pairs(tmp_path / "pairs.png", pairs[:number])
        assert (tmp_path / "pairs.png").read_bytes()[:4] == b"\x89PNG"


def test_prompts_cover_tasks_and_notions():
    words = ["red", "blue", "circle", "square"]
    prompts = [
        judged(f"a {c} {s}", RIGHT, tag=t).metadata
        for c in words[:2]
        for s in words[2:]
        for t in ("colors", "counting")
    ]
    prompts += [judged("a red circle", RIGHT).metadata] * 50
    chosen = cover(prompts, words, 4, 0)
    assert sorted(m["tag"] for m in chosen) == ["colors", "colors", "counting", "counting"]
    text = " ".join(m["prompt"] for m in chosen)
    assert all(text.count(word) >= 1 for word in words)
    assert cover(prompts, words, 4, 0) == chosen
    assert len(cover(prompts[:3], words, 10, 0)) == 3


PARAMS = {
    "seed": 3,
    "dpo": {
        "beta": 200.0,
        "lr": 1e-3,
        "warmup": 2,
        "steps": 12,
        "batch": 4,
        "check_every": 3,
        "check_draws": 2,
        "bootstrap": 100,
        "patience": 100,
        "enough": 2.0,
        "winner_rise": 1.0,
    },
    "training": {
        "mask": {"mean": 0.9, "std": 0.2, "low": 0.5, "high": 1.0},
        "most_tokens": 4096,
        "flow_samples": 2,
        "time": {"distribution": "logit_normal", "mean": 0.0, "std": 1.0},
        "text_drop": 0.1,
    },
}


def tiny():
    torch.manual_seed(0)
    model = DJEPA(tiny_config(4, 6))
    # The head starts at zero; give it something to be wrong about.
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def pair_set(count=20):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 4, 3, 3)
    return PairSet(
        torch.randn(shape, generator=generator) * 0.3 + 1,
        torch.randn(shape, generator=generator) * 0.3 - 1,
        torch.randn(count, 5, 6, generator=generator),
        torch.ones(count, 5, dtype=torch.bool),
        np.arange(count) % 4 == 0,
        [f"prompt {i % 8}" for i in range(count)],
    )


class Loaded(LoraMixin):
    """What of a pipeline a policy needs."""

    def __init__(self):
        self.transformer = tiny()


def policy_of(kind, pipe=None):
    pipe = pipe or Loaded()
    return Adapter(pipe, 2, 4, seed=0) if kind == "lora" else WholeModel(pipe)


def tuning(folder, tracker=None, kind="whole", pipe=None, **dpo):
    params = copy.deepcopy(PARAMS)
    # An adapter has few weights, which take larger steps.
    params["dpo"] |= ({"lr": 0.02} if kind == "lora" else {}) | dpo
    return Tuning(policy_of(kind, pipe), pair_set(), params, folder, tracker or Tracker())


def test_the_rate_rises_to_lr_and_falls_to_nothing_at_the_last_step(tmp_path):
    run, rates = tuning(tmp_path / "s", steps=8, warmup=2), []
    for run.step in range(8):
        run._train_step()
        rates.append(run.optimizer.param_groups[0]["lr"] / 1e-3)
    assert rates == pytest.approx([1 / 2, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def errors_of(run, pairs, rows, draw):
    """All four errors: the winners' and losers' of the model and of its reference."""
    with torch.no_grad(), run.policy.reference() as reference:
        theirs = pairs.errors(reference, rows, draw)
    with torch.no_grad():
        return [*pairs.errors(run.policy.network, rows, draw), *theirs]


@KINDS
def test_winner_loser_model_and_reference_share_their_draw(tmp_path, kind):
    run = tuning(tmp_path / "s", kind=kind)
    rows = np.arange(4)
    draw = run.pairs.draw(rows, run.training, 1, 2)
    mine, theirs = np.split(np.stack(errors_of(run, run.pairs, rows, draw)), 2)
    assert np.allclose(mine, theirs, atol=1e-6)
    swapped = replace(run.pairs, winner=run.pairs.loser, loser=run.pairs.winner)
    assert np.allclose(errors_of(run, swapped, rows, draw)[:2], mine[::-1], atol=1e-6)
    # With the same picture on both sides nothing is left that could differ: all four are one.
    same = replace(run.pairs, loser=run.pairs.winner)
    assert np.allclose(errors_of(run, same, rows, draw), mine[0], atol=1e-6)
    # A pair's draw is its own: nothing of another pair's mask, order, t and noise.
    assert len({tuple(order.tolist()) for order in draw.order}) > 1


def test_without_its_adapter_the_network_is_the_reference_to_the_bit(tmp_path):
    before, pipe = tiny(), Loaded()
    run = tuning(tmp_path / "s", kind="lora", pipe=pipe)
    rows = np.arange(4)
    draw = run.pairs.draw(rows, run.training, 1, 2)
    run.run()
    with torch.no_grad():
        expected = run.pairs.errors(before, rows, draw)
    mine = errors_of(run, run.pairs, rows, draw)
    assert all(torch.equal(a, b) for a, b in zip(mine[2:], expected, strict=True))
    assert not torch.equal(mine[0], expected[0])
    with run.policy.reference() as network:
        assert network is run.policy.network, "no second copy"
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.state_dict().items())


def test_only_the_adapter_has_a_gradient(tmp_path):
    run = tuning(tmp_path / "s", kind="lora")
    run._train_step()
    with_gradient = [n for n, p in run.policy.network.named_parameters() if p.grad is not None]
    assert with_gradient and all(".lora_" in name for name in with_gradient)
    assert len(with_gradient) == len(run.policy.parameters)
    assert all(".lora_" in name for name in run.policy.weights())


def test_the_adapters_first_matrices_follow_from_the_seed():
    torch.manual_seed(1)
    one = policy_of("lora").weights()
    torch.manual_seed(2)
    two = policy_of("lora").weights()
    other = Adapter(Loaded(), 2, 4, seed=1).weights()
    assert all(torch.equal(one[k], v) for k, v in two.items())
    assert any(not torch.equal(one[k], v) for k, v in other.items())


@KINDS
def test_what_is_kept_reaches_the_pipeline(tmp_path, kind):
    pipe = Loaded()
    run = tuning(tmp_path / "s", kind=kind, pipe=pipe)
    assert run.run()["changed"]
    rows = np.arange(4)
    draw = run.pairs.draw(rows, run.training, 1, 2)
    run.policy.load(run.kept)
    mine = errors_of(run, run.pairs, rows, draw)[:2]
    run.policy.finish(run.kept, tmp_path / "lora")
    with torch.no_grad():
        fused = run.pairs.errors(pipe.transformer, rows, draw)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, fused, strict=True))
    assert pipe.transformer.state_dict().keys() == tiny().state_dict().keys()
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert files <= {f.name for f in (tmp_path / "lora").glob("*")} or kind == "whole"
    if kind == "lora":
        again = Loaded()
        again.load_lora_weights(tmp_path / "lora")
        with torch.no_grad():
            loaded = run.pairs.errors(again.transformer, rows, draw)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, loaded, strict=True))


@KINDS
def test_tuning_prefers_winners_of_pairs_it_did_not_learn(tmp_path, kind):
    run = tuning(tmp_path / "s", kind=kind)
    figures = run.run()
    for check in figures["history"]:
        assert check["accuracy_low"] <= check["accuracy"] <= check["accuracy_high"]
    preference_plot(run.history, run.kept_step, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
    assert figures["history"][0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert figures["changed"] and figures["accuracy"] > 0.9
    assert figures["loss"] < np.log(2) and figures["steps"] == 12


class Killer(Tracker):
    """Stops the run when it logs step `at`, as a kill after the check would."""

    def __init__(self, at):
        self.at = at

    def log_metrics(self, metrics, step=None, images=None):
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("kind", "at"), [("whole", 6), ("whole", 12), ("lora", 3), ("lora", 9)])
def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path, kind, at):
    whole = tuning(tmp_path / "whole", kind=kind)
    figures = whole.run()
    with pytest.raises(KeyboardInterrupt):
        tuning(tmp_path / "cut", Killer(at), kind).run()
    torch.manual_seed(at)  # another process: nothing may hang on torch's own generator
    again = tuning(tmp_path / "cut", kind=kind)
    assert again.run() == figures
    assert all((again.kept[k] == v).all() for k, v in whole.kept.items())


def test_it_stops_when_held_out_pairs_are_told_apart_well_enough(tmp_path):
    figures = tuning(tmp_path / "s", enough=0.8, steps=60).run()
    assert figures["steps"] < 60 and "accuracy" in figures["stopped"]


def test_it_stops_when_accuracy_rises_no_more_and_keeps_the_best_step(tmp_path):
    figures = tuning(tmp_path / "s", patience=2, steps=60, check_every=1).run()
    reached = [check["accuracy"] for check in figures["history"]]
    assert "did not rise" in figures["stopped"] and figures["steps"] < 60
    assert len(reached) - 1 - int(np.argmax(reached)) == 2
    losses = {check["step"]: check["loss"] for check in figures["history"]}
    assert figures["kept_step"] == min(losses, key=losses.get)


def test_a_snapshot_of_other_weights_is_refused(tmp_path):
    tuning(tmp_path / "s", kind="lora", steps=3).run()
    for kind in ("whole", "lora"):
        run = tuning(tmp_path / "s", kind=kind)
        if kind == "lora":
            run.policy = Adapter(Loaded(), 3, 4, seed=0)
        with pytest.raises(UserError, match="of another model"):
            run.run()


def test_it_goes_back_when_winners_get_worse(tmp_path):
    run = tuning(tmp_path / "s", lr=1.0, winner_rise=0.01, warmup=1)
    figures = run.run()
    assert "rose" in figures["stopped"] and not figures["changed"]
    reference = tiny().state_dict()
    assert all((run.kept[k] == v).all() for k, v in reference.items())
