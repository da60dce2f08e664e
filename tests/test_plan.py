"""`djepa plan` against exact counts and a measured small run."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from components.compose import composed
from components.errors import UserError
from components.feedback.sizes import TargetRungs
from components.model import flops
from components.model.build import build_network
from components.model.sampler import SamplerConfig, chance, sample_tokens
from components.plan import (
    activation_bytes,
    check_memory,
    hidden_share,
    parameters,
    peak_bytes,
    plan,
    rung_shares,
    text,
)
from components.training.batch import grouped
from components.training.draw import draw_for, truncated_normal
from components.training.losses import losses
from components.training.optim import optimizers
from tests.conftest import ROOT

PRESETS = {  # trained parameters with SD3's tokens and T5-XXL's states
    "xxs": 14_631_744,
    "xs": 48_585_792,
    "b": 376_519_744,
    "l": 1_280_218_688,
    "h": 2_666_145_856,
    "h64": 2_637_402_176,
}
NETWORK = {
    "kind": "djepa",
    "width": 64,
    "heads": 4,
    "encoder_blocks": 3,
    "predictor_blocks": 4,
    "blocks": 5,
    "mlp_ratio": 4,
    "buffer_tokens": 4,
    "head_width": 96,
    "head_blocks": 3,
    "positions": "vope",
    "reference_grid": 16,
    "rope_base": 100.0,
}
CHANNELS, TEXT_WIDTH, SIDE, WORDS = 16, 48, (8, 6), 10


def meta(settings, channels, text_width):
    with torch.device("meta"):
        return build_network(settings, channels, text_width, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_papers_sizes_and_the_baseline_as_many(name):
    params = composed([f"model={name}", "tokenizer=sd3", "text=t5"], ROOT)
    settings = params["model"]["network"]
    counts = parameters(meta(settings, 64, 4096))
    assert counts["total"] == PRESETS[name]
    parts = ("encoder", "predictor", "projection", "head")
    assert sum(counts[part] for part in parts) == counts["total"]
    baseline = meta(settings | {"kind": "flow_dit"}, 64, 4096)
    assert sum(p.numel() for p in baseline.parameters()) == pytest.approx(counts["total"], rel=0.05)


def test_the_demos_network_is_nano():
    assert parameters(meta(composed([], ROOT)["model"]["network"], 12, 128))["total"] == 1_401_708


def settings_for(kind, hidden):
    baseline = kind == "flow_dit"
    return {
        "mask": {"mean": 1.0 if baseline else hidden, "std": 0.0, "low": 0.0, "high": 1.0},
        "most_tokens": 4096,
        "flow_samples": 1 if baseline else 2,
        "time": {"distribution": "uniform", "mean": 0.0, "std": 1.0},
        "text_drop": 0.0,
    }


def step(model, target, settings, images=1):
    """Both losses of so many pictures."""
    tokens = torch.randn(images, math.prod(SIDE), CHANNELS)
    draw = draw_for(tokens, settings, torch.Generator())
    states = torch.randn(images, WORDS, TEXT_WIDTH)
    mask = torch.ones(images, WORDS, dtype=torch.bool)
    flow, jepa = losses(model, target, grouped(model, tokens, states, mask, SIDE, draw), 2.0)
    return flow + jepa, draw.noise.shape[1]


@pytest.mark.parametrize("kind", ["djepa", "flow_dit"])
def test_operations_are_those_that_a_counter_sees(kind):
    model = build_network(NETWORK | {"kind": kind}, CHANNELS, TEXT_WIDTH, 0)
    target = copy.deepcopy(model.encoder).requires_grad_(False) if kind == "djepa" else None
    settings = settings_for(kind, 0.75)
    with FlopCounterMode(display=False) as counter:
        loss, hidden = step(model, target, settings)
        loss.backward()
    expected = flops.train_image(
        model, WORDS, math.prod(SIDE), hidden, settings["flow_samples"], kind == "djepa"
    )
    # The counter adds what attention computes again in its backward pass.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)
    fewer = {"solver": "midpoint", "annealing": 0.4, "guided_share": 0.5, "order": "spread"}
    sampler = SamplerConfig(6, 5, 2.0, 1.0, 1.0, 32, 24, **fewer)
    states, mask = torch.randn(1, WORDS, TEXT_WIDTH), torch.ones(1, WORDS, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        order, noise = chance(math.prod(SIDE), CHANNELS, torch.Generator())
        sample_tokens(model, states, mask, SIDE, sampler, order[None], noise[None])
    expected = flops.drawn_picture(model, WORDS, math.prod(SIDE), sampler)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def tree(network, **training):
    """The demo's parameters with a small network on one rung."""
    params = composed([], ROOT)
    params["model"]["network"] = network
    params["model"]["tokenizer"] |= {"channels": CHANNELS, "patch": 4}
    params["model"]["text"] |= {"width": TEXT_WIDTH}
    params["plan"] |= {"caption_tokens": WORDS}
    params["training"] |= settings_for(network["kind"], 0.75) | training
    for phase in ("phase1", "phase2"):
        params["training"][phase] |= {"rungs": ["32x24"], "batch": 4}
        params["training"][phase]["size"] = {"mean": 32, "std": 0, "low": 32, "high": 32}
    return params


@pytest.mark.parametrize("kind", ["djepa", "flow_dit"])
def test_memory_is_that_of_a_measured_run(kind):
    """Bytes of a real step on a CPU: what autograd keeps, and every tensor that stays."""
    network = NETWORK | {"kind": kind}
    params = tree(network)
    model = build_network(network, CHANNELS, TEXT_WIDTH, 0)
    target = copy.deepcopy(model.encoder).requires_grad_(False) if kind == "djepa" else None
    modules = [model] if target is None else [model, target]
    own = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = step(model, target, params["training"], images=4)
    loss.backward()
    measured = sum(size for size, _ in kept.values())
    each = activation_bytes(params, params["training"]["phase1"])
    assert 4 * each == pytest.approx(measured, rel=0.01)

    memory = plan(params, 1)["memory"]["per_gpu"]
    chosen = optimizers(model, params["training"]["optimizer"])
    for optimizer in chosen:
        optimizer.step()
    moments = sum(
        value.nbytes
        for optimizer in chosen
        for state in optimizer.state.values()
        for value in state.values()
    )
    weights = sum(p.nbytes for p in model.parameters())
    assert memory["weights"] == memory["gradients"] == memory["ema"] == weights
    assert memory["optimizer"] == pytest.approx(moments, rel=0.01)
    assert memory["target_encoder"] == sum(p.nbytes for m in modules[1:] for p in m.parameters())
    assert memory["activations"] == 4 * each


def test_gradients_come_as_activations_go_unless_they_stay():
    fixed = {"weights": 10, "gradients": 10, "optimizer": 20, "gathered": 5}
    assert peak_bytes(fixed, 2, gradients_stay=False) == 30 + 10
    assert peak_bytes(fixed, 8, gradients_stay=False) == 30 + 5 + 8
    assert peak_bytes(fixed, 8, gradients_stay=True) == 30 + 10 + 5 + 8


def test_copies_of_the_weights_are_not_counted_for_each_picture():
    """Under autocast; by a GPU's rules its norms keep float32, so less than half is not saved."""
    whole, half = (
        activation_bytes(params, params["training"]["phase1"])
        for params in (tree(NETWORK), tree(NETWORK, precision="bfloat16"))
    )
    assert 0.4 * whole < half < whole


def test_recomputing_blocks_keeps_less_and_sharding_divides():
    plain = plan(tree(NETWORK), 4)["memory"]
    recomputed = plan(tree(NETWORK, checkpointing="blocks"), 4)["memory"]
    assert recomputed["per_gpu"]["activations"] < 0.6 * plain["per_gpu"]["activations"]
    optimizer = composed([], ROOT)["training"]["optimizer"] | {"kind": "adamw"}
    sharded = plan(tree(NETWORK, sharding="shard", optimizer=optimizer), 4)["memory"]["per_gpu"]
    assert sharded["weights"] == pytest.approx(plain["per_gpu"]["weights"] / 4, abs=4)


def test_too_little_memory_is_said_before_training_with_what_would_fit():
    params = tree(NETWORK)
    check_memory(params, "phase1", processes=1, available=2**30)
    phase = plan(params, 1)["memory"]["phases"]["phase1"]
    free = int(phase["total"] - 1.5 * phase["activations_per_image"])  # two of four pictures
    with pytest.raises(UserError, match=r"training.phase1.batch=2 fits"):
        check_memory(params, "phase1", processes=1, available=free)
    with pytest.raises(UserError, match="smaller model"):
        check_memory(params, "phase1", processes=1, available=10_000)


def test_a_batch_in_parts_holds_one_part_and_its_gradients():
    whole, parts = (
        plan(tree(NETWORK, accumulate=n), 1)["memory"]["phases"]["phase1"] for n in (1, 4)
    )
    assert (whole["images_at_once"], parts["images_at_once"]) == (4, 1)
    assert parts["activations"] == whole["activations"] / 4 and parts["total"] < whole["total"]
    assert parts["images_that_fit"] <= whole["images_that_fit"]  # the gradients stay
    tight = tree(NETWORK)
    free = int(parts["total"] + 1.5 * parts["activations_per_image"])  # two of four at once
    with pytest.raises(
        UserError, match=r"training.accumulate=(\d) or training.phase1.batch="
    ) as no:
        check_memory(tight, "phase1", processes=1, available=free)
    assert "training.accumulate=2 " in str(no.value)
    tight["plan"]["memory"] = (free + 1) / 2**30
    assert "training.accumulate=2 fits" in text(plan(tight, 1))
    tight["training"]["accumulate"] = 2
    check_memory(tight, "phase1", processes=1, available=free)


def test_means_of_what_is_drawn():
    law = {"mean": 1.0, "std": 0.25, "low": 0.7, "high": 1.0}
    g = torch.Generator().manual_seed(0)
    drawn = [truncated_normal(**law, generator=g) for _ in range(4000)]
    assert hidden_share(law) == pytest.approx(sum(drawn) / len(drawn), abs=0.005)
    phase = {
        "rungs": ["32x32", "32x24", "40x40", "64x64"],
        "size": {"mean": 32, "std": 4, "low": 28, "high": 40},
        "aspect": {"mean": 0.2, "std": 0.1, "low": 0, "high": 0.4},
    }
    shares = rung_shares(phase)
    assert sum(shares.values()) == pytest.approx(1) and shares["64x64"] == 0
    assert shares["40x40"] > 0
    # Their aspects are 0 and 0.415: the border lies at 0.2075, just above the mean.
    rung = TargetRungs([(32, 32), (32, 24), (40, 40), (64, 64)], phase["size"], phase["aspect"])
    drawn = np.bincount(rung.draw(np.random.default_rng(0), 40_000), minlength=4) / 40_000
    assert np.allclose(drawn, list(shares.values()), atol=0.01)


def test_the_papers_scale_is_planned():
    found = plan(composed(["scale=paper"], ROOT), 128)
    assert found["parameters"]["total"] == PRESETS["h"]
    assert json.loads(json.dumps(found)) == found
    assert found["days"] == pytest.approx(sum(phase["days"] for phase in found["train"].values()))
    assert list(found["train"]) == ["phase1", "r1", "r2"]
    # Each picture costs more as pictures grow.
    costs = [phase["flops_per_image"] for phase in found["train"].values()]
    assert costs == sorted(costs)
    assert found["memory"]["per_gpu"]["total"] < 80 * 2**30
    # A billion cached text states of 4096 numbers: petabytes with the latents.
    assert found["cache"]["total"] > 1e15
    words = text(found)
    assert "2666.15" in words and "128 GPU(s)" in words
    # Who reads that no disk holds it reads beside it that nothing need be done, or what to do.
    assert words.endswith("; not kept: data.encode is online")
    cached = found | {"cache": found["cache"] | {"encode": "cached"}}
    assert text(cached).endswith("; data.encode=online keeps none")
