"""Losses over pictures of one shape, over packed ones, over subsets of tokens; the baseline."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import UserError
from components.model.build import build_network
from components.model.djepa import DJEPA
from components.model.sampler import SamplerConfig, chance, sample_tokens
from components.training.batch import Picture, grouped, packed
from components.training.draw import draw_for
from components.training.losses import losses

NETWORK = {
    "kind": "djepa",
    "width": 16,
    "heads": 2,
    "encoder_blocks": 2,
    "predictor_blocks": 2,
    "mlp_ratio": 2,
    "buffer_tokens": 0,
    "head_width": 16,
    "head_blocks": 2,
    "positions": "vope",
    "reference_grid": 8.0,
    "rope_base": 100.0,
}
SETTINGS = {
    "mask": {"mean": 1.0, "std": 0.25, "low": 0.5, "high": 1.0},
    "most_tokens": 4096,
    "flow_samples": 2,
    "time": {"distribution": "uniform", "mean": 0.0, "std": 1.0},
    "text_drop": 0.3,
}


def network(**changes):
    model = build_network(NETWORK | changes, channels=4, text_width=6, seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():  # away from the zeros that silence it
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def picture(size, words, seed, settings=SETTINGS):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, size[0] * size[1], 4, generator=g)
    draw = draw_for(tokens, settings, g)
    return Picture(tokens, torch.randn(1, words, 6, generator=g), size, draw)


def alone(model, each):
    mask = torch.ones(each.states.shape[:2], dtype=torch.bool)
    return grouped(model, each.tokens, each.states, mask, each.size, each.draw)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)), max_size=4),
    st.sampled_from([0, 3]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_packed_pictures_do_not_see_each_other(shapes, buffers, seed):
    model = network(buffer_tokens=buffers)
    shapes = [(3, 2, 4), *shapes]
    pictures = [picture((w, h), n, seed + i) for i, (w, h, n) in enumerate(shapes)]
    # One prompt is dropped for sure.
    pictures[0] = replace(pictures[0], draw=replace(pictures[0].draw, drop=torch.tensor([True])))
    together = losses(model, model.encoder, packed(model, pictures), 2.0)
    each = [losses(model, model.encoder, alone(model, p), 2.0) for p in pictures]
    share = torch.tensor([float(p.draw.noise.shape[1]) for p in pictures])
    share /= share.sum()
    for term in (0, 1):
        mean = (torch.stack([pair[term] for pair in each]) * share).sum()
        assert torch.allclose(together[term], mean, rtol=1e-4)


def test_packed_rows_hold_no_padding():
    model = network()
    pictures = [picture((4, 2), 5, 0), picture((2, 2), 1, 1)]
    batch = packed(model, pictures)
    assert batch.x.shape == (1, 12, 4) and batch.whole_prompt.states.shape == (1, 6, 6)
    assert (batch.layout.owner >= 0).all()


def test_a_large_picture_is_trained_on_a_random_subset_at_its_own_positions():
    model = network()
    each = picture((6, 5), 3, 0, SETTINGS | {"most_tokens": 12})
    order = each.draw.order[0].tolist()
    assert len(order) == len(set(order)) == 12 and max(order) < 30 and sorted(order) != order
    batch = alone(model, each)
    assert batch.x.shape == (1, 12, 4) and torch.equal(batch.x[0], each.tokens[0, order])
    everywhere = model.rotations(3, torch.arange(30)[None], (6, 5))
    assert torch.equal(batch.layout.rotations[0, 3:], everywhere[0, 3:][order])
    # Another picture has another subset.
    assert order != picture((6, 5), 3, 1, SETTINGS | {"most_tokens": 12}).draw.order[0].tolist()


@pytest.mark.parametrize("positions", ["vope", "rope", "ntk_rope"])
def test_each_kind_of_positions_trains(positions):
    model = network(positions=positions)
    flow, jepa = losses(model, model.encoder, alone(model, picture((4, 3), 3, 0)), 2.0)
    (flow + jepa).backward()
    assert flow.detach() > 0 and model.predictor.blocks[0].image.qkv.weight.grad.any()


def test_buffer_tokens_are_learned_and_stay_when_the_prompt_is_dropped():
    model = network(buffer_tokens=3)
    each = picture((3, 3), 4, 0)
    dropped = replace(each, draw=replace(each.draw, drop=torch.tensor([True])))
    flow, _ = losses(model, None, alone(model, dropped), 2.0)
    flow.backward()
    learned = model.encoder.text_in.learned.grad
    assert learned.shape == (4, 16) and (learned.abs().sum(1) > 0).all()
    assert not model.encoder.text_in.linear.weight.grad.any()  # nothing of the prompt


def test_without_a_target_encoder_there_is_no_jepa_loss():
    model = network()
    flow, jepa = losses(model, None, alone(model, picture((3, 3), 2, 0)), 2.0)
    assert float(jepa) == 0
    flow.backward()
    assert all(p.grad is None for p in model.projection.parameters())


def test_times_are_uniform_or_logit_normal():
    tokens, g = torch.zeros(4000, 1, 4), torch.Generator().manual_seed(0)
    uniform = draw_for(tokens, SETTINGS, g).t
    assert abs(float((uniform < 0.1).float().mean()) - 0.1) < 0.01
    normal = {"distribution": "logit_normal", "mean": 0.0, "std": 1.0}
    middle = draw_for(tokens, SETTINGS | {"time": normal}, g).t
    assert float((middle < 0.1).float().mean()) < 0.03


WHOLE = SETTINGS | {"mask": {"mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0}, "flow_samples": 1}


def test_the_baseline_sees_every_token_and_needs_whole_pictures():
    model = network(kind="flow_dit", blocks=3)
    each = picture((3, 2), 4, 0, WHOLE)
    flow, jepa = losses(model, None, alone(model, each), 2.0)
    flow.backward()
    assert float(jepa) == 0 and all(
        p.grad is not None and p.grad.any() for p in model.blocks.parameters()
    )
    with pytest.raises(UserError, match="ablation=dit"):
        losses(model, None, alone(model, picture((3, 2), 4, 0)), 2.0)
    # The order of the tokens is no input: positions say where each stands.
    turned = replace(each.draw, order=each.draw.order.flip(1), noise=each.draw.noise.flip(1))
    again, _ = losses(model, None, alone(model, replace(each, draw=turned)), 2.0)
    assert torch.allclose(flow, again, rtol=1e-4)


def test_a_network_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="kind is 'unet'"):
        network(kind="unet")
    with pytest.raises(UserError, match="blocks"):
        network(kind="flow_dit")
    with pytest.raises(UserError, match="positions is 'sine'"):
        network(positions="sine")
    assert isinstance(network(blocks=5), DJEPA)  # a size of the other kind does no harm


def test_the_baseline_draws_any_size():
    model = network(kind="flow_dit", blocks=2)
    states, mask = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)

    def draw(rows, scale):
        drawn = [chance(12, 4, torch.Generator().manual_seed(i)) for i in rows]
        order, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
        config = SamplerConfig(1, 4, scale, 1.0, 1.0, 16, 12)
        return sample_tokens(model, states[rows], mask[rows], (4, 3), config, order, noise)

    both = draw([0, 1], 2.0)
    assert both.shape == (2, 12, 4) and both.isfinite().all()
    assert torch.allclose(both[1:], draw([1], 2.0), atol=1e-4)
    assert not torch.allclose(both, draw([0, 1], 1.0), atol=1e-3)
