"""CUDA graphs of a function: the same results as calling it."""

import pytest
import torch

from components.model.flow_head import FlowHead
from components.model.graphed import Graphed
from components.model.precision import as_stored, halved

CHANNELS, WIDTH, DEEP = 8, 32, 16
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU here, and CUDA graphs are what is tested"
)


def awake_head(device="cpu"):
    torch.manual_seed(0)
    head = FlowHead(CHANNELS, DEEP, WIDTH, 2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.to(device)


def euler(head, z, x, moments, scale):
    """Steps of the flow head as the sampler takes them."""
    conditions = head.conditions(z)
    for moment in zip(*moments, strict=True):
        x = x + scale * head.velocity(x, moment, conditions)
    return x


def arguments(head, count, device="cpu"):
    z, x = (
        torch.randn(2, count, DEEP, device=device),
        torch.randn(2, count, 1, CHANNELS, device=device),
    )
    times = torch.linspace(0, 0.9, 5, device=device).view(-1, 1, 1, 1)
    with torch.no_grad():
        return head, z, x, head.moments(times), 0.2


def test_on_a_cpu_it_is_a_plain_call():
    head, graphed = awake_head(), Graphed(euler)
    for count in (3, 5, 3):
        given = arguments(head, count)
        with torch.no_grad():
            wanted = euler(*given)
        assert torch.equal(graphed(*given), wanted)
    assert not graphed(*arguments(head, 3)).requires_grad


@on_gpu
@pytest.mark.parametrize("low", [False, True])
def test_a_graph_gives_what_the_function_gives(low):
    head = awake_head("cuda")
    if low:
        halved(head)
    graphed, results = Graphed(euler), []
    with torch.no_grad(), as_stored(head):
        for count in (3, 5, 3, 5, 3):  # fresh inputs each time; replays in any order
            given = arguments(head, count, "cuda")
            wanted = euler(*given)
            results.append((graphed(*given), wanted))
        for parameter in head.parameters():  # in place: the next replay reads the new ones
            parameter.mul_(1.1)
        given = arguments(head, 5, "cuda")
        results.append((graphed(*given), euler(*given)))
    for found, wanted in results:  # none was overwritten by a later replay
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert len(graphed._captured) == 2


@on_gpu
def test_an_autocast_that_keeps_weights_is_refused():
    head = awake_head("cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), pytest.raises(RuntimeError):
        Graphed(euler)(*arguments(head, 3, "cuda"))
