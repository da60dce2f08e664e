"""What the blocks compute where they are compiled."""

import copy

import pytest
import torch

from components.model.build import build_network
from components.model.vope import _plainly, image_positions, image_rotations, normalise_and_rotate
from components.training.batch import grouped
from components.training.draw import draw_for
from components.training.engine import _blocks
from components.training.losses import losses
from tests.test_plan import CHANNELS, NETWORK, SIDE, TEXT_WIDTH, settings_for


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rotation_in_plain_operations_gives_the_same_values_and_gradients(kind):
    torch.manual_seed(0)
    rotations = image_rotations(image_positions(3, 2, 8.0), 8, 100.0)[None]
    results = []
    for way in (normalise_and_rotate, lambda *x: _plainly(*x[:2], x[2][:, :, None, None])):
        torch.manual_seed(1)
        heads = torch.randn(2, 6, 2, 3, 8, dtype=kind).requires_grad_()
        scale = torch.randn(2, 1, 8).requires_grad_()
        out = way(heads, scale, rotations)
        (out.float() * torch.randn(out.shape)).sum().backward()
        results.append((out, heads.grad, scale.grad))
    near = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **near)


@pytest.mark.slow
def test_compiled_blocks_are_few_whole_graphs_and_compute_the_same():
    """Traced but not translated: that takes minutes on a CPU."""
    from torch._dynamo.utils import counters

    plain = build_network(NETWORK | {"kind": "djepa"}, CHANNELS, TEXT_WIDTH, 0)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pairs = [(plain, copy.deepcopy(plain.encoder).requires_grad_(False))]
    pairs.append(copy.deepcopy(pairs[0]))
    torch.compiler.reset()
    counters.clear()
    for block in [*_blocks(pairs[1][0]), *_blocks(pairs[1][1])]:
        block.compile(dynamic=True, backend="eager")
    for n, hidden in enumerate((0.75, 0.9, 0.5, 0.7)):
        settings = settings_for("djepa", hidden)
        tokens, states = torch.randn(3, 48, CHANNELS), torch.randn(3, 5 + n, TEXT_WIDTH)
        draw = draw_for(tokens, settings, torch.Generator().manual_seed(n))
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        for model, target in pairs:
            model.zero_grad()
            batch = grouped(model, tokens, states, mask, SIDE, draw)
            sum(losses(model, target, batch, 2.0)).backward()
        for one, other in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)
    # Encoder, target encoder, predictor, its last block; none anew for other sizes.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
