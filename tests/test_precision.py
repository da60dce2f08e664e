"""Drawing with weights in bfloat16."""

import copy

import torch

from components.model.build import build_network
from components.model.precision import as_stored, halved
from components.model.sampler import SamplerConfig, chance, sample_tokens
from tests.test_plan import CHANNELS, NETWORK, SIDE, TEXT_WIDTH, WORDS


def drawn(model, states, mask, order, noise):
    config = SamplerConfig(4, 3, 3.0, 1.0, 1.0, 32, 24)
    return sample_tokens(model, states, mask, SIDE, config, order[None], noise[None])


def test_halved_weights_draw_exactly_what_autocast_draws():
    model = build_network(NETWORK | {"kind": "djepa"}, CHANNELS, TEXT_WIDTH, 0).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    states, mask = torch.randn(1, WORDS, TEXT_WIDTH), torch.ones(1, WORDS, dtype=torch.bool)
    chosen = chance(SIDE[0] * SIDE[1], CHANNELS, torch.Generator().manual_seed(0))
    whole = drawn(model, states, mask, *chosen)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = drawn(model, states, mask, *chosen)
    with as_stored(model):  # whole weights: nothing changes
        assert torch.equal(drawn(model, states, mask, *chosen), whole)
    low = halved(copy.deepcopy(model))
    with as_stored(low):
        found = drawn(low, states, mask, *chosen)
    assert torch.equal(found, wanted) and not torch.equal(found, whole)
    # Most of the memory is halved.
    assert sum(p.nbytes for p in low.parameters()) < 0.6 * sum(p.nbytes for p in model.parameters())
