import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.model.djepa import DJEPA, DJEPAConfig, target_features
from components.model.network import gather
from components.model.sampler import cosine_step
from components.model.solvers import shifted_times
from components.model.vope import (
    image_positions,
    image_rotations,
    normalise_and_rotate,
    rotary_grid,
    text_rotations,
)
from components.tokens.text import WordEncoder
from components.training.losses import flow_path

CONFIG = DJEPAConfig(
    channels=12,
    text_width=24,
    width=16,
    heads=2,
    encoder_blocks=1,
    predictor_blocks=2,
    mlp_ratio=2,
    buffer_tokens=0,
    positions="vope",
    head_width=16,
    head_blocks=2,
    reference_grid=8,
    rope_base=100.0,
)


def make_model() -> DJEPA:
    torch.manual_seed(0)
    model = DJEPA(CONFIG)
    # Away from the zero initialisation, where most of the network is silent.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_inputs(batch: int = 3, size: tuple[int, int] = (4, 3)):
    g = torch.Generator().manual_seed(1)
    count = size[0] * size[1]
    states, mask = WordEncoder(16, 24).encode(["a red circle", "two squares", "x"][:batch])
    tokens = torch.randn(batch, count, 12, generator=g)
    order = torch.rand(batch, count, generator=g).argsort(1)
    return states, mask, tokens, order


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Heads (N, d), as they leave Q's norm and rotation, (N, d)."""
    both = heads[None, :, None, None].expand(-1, -1, 2, -1, -1).contiguous()
    return normalise_and_rotate(both, torch.ones(2, 1, heads.shape[-1]), rotations[None])[
        0, :, 0, 0
    ]


sizes = st.integers(1, 12)


@given(sizes, sizes, st.sampled_from([4.0, 12.0]))
@settings(max_examples=40, deadline=None)
def test_vope_is_centred_on_the_reference_grid(width, height, grid):
    positions = image_positions(width, height, grid)
    ratio = max(width, height) / grid
    center = (positions.amax(0) + positions.amin(0)) / 2
    # The tokens' centres span [0, (g − 1/ρ)], the middle is that of a square.
    middle = (max(width, height) - 1) / 2 / ratio
    assert torch.allclose(center, torch.full((2,), middle), atol=1e-5)
    assert positions.min() >= 0 and positions.max() < grid


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_vope_inner_product_depends_on_the_difference_over_rho(a, b):
    g = torch.Generator().manual_seed(a * 31 + b)
    q, k = torch.randn(2, 16, generator=g)

    def product(m, n):
        rotations = image_rotations(torch.tensor([m, n]), 16, 100.0)
        turned = rotate(torch.stack([q, k]), rotations)
        return float(turned[0] @ turned[1])

    m, n, shift = (a / 3, b / 4), (b / 5, a / 7), (2.5, -1.25)
    moved = [(x[0] + shift[0], x[1] + shift[1]) for x in (m, n)]
    assert product(m, n) == pytest.approx(product(*moved), abs=1e-3)
    # Twice the tokens on the same field: neighbours two apart stand where one apart stood.
    small, large = image_positions(4, 4, 8), image_positions(8, 8, 8)
    assert torch.equal(small[1] - small[0], large[2] - large[0])


def test_rope_and_ntk_rope_are_what_vope_is_compared_with():
    small, large = (4, 4), (16, 12)
    # RoPE: a token's angles are its own column and row, at every size.
    a, b = (rotary_grid("rope", size, 8, 16, 100.0) for size in (small, large))
    assert torch.allclose(a.view(4, 4, 8), b.view(12, 16, 8)[:4, :4])
    # NTK: the slowest wave is stretched by the ratio of lengths, the fastest stays.
    ntk = rotary_grid("ntk_rope", large, 8, 16, 100.0).view(12, 16, 2, 4).angle()
    rope = b.view(12, 16, 2, 4).angle()
    assert torch.allclose(ntk[0, 1, 0, 0], rope[0, 1, 0, 0])
    assert float(rope[0, 1, 0, 3] / ntk[0, 1, 0, 3]) == pytest.approx(2, rel=1e-4)
    assert torch.equal(rotary_grid("ntk_rope", small, 8, 16, 100.0), a)  # no longer than trained


def test_text_rope_depends_on_the_distance():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    heads = torch.stack([q] * 6 + [k] * 6)
    turned = rotate(heads, text_rotations(6, 16, 100.0).repeat(2, 1))
    products = turned[:6] @ turned[6:].T
    assert torch.allclose(products.diagonal(1), products[0, 1].expand(5), atol=1e-4)


def test_norm_and_rotation_have_the_gradient_of_their_parts():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 2, 3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 1, 8, generator=g, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 5, 4, generator=g, dtype=torch.float64)
    rotations = torch.polar(torch.ones_like(angles), angles)
    inputs = (x, scale, rotations)
    assert torch.autograd.gradcheck(normalise_and_rotate, inputs)
    lengths = normalise_and_rotate(x, torch.ones_like(scale), rotations).square().mean(-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3)


@given(st.integers(1, 80), st.integers(1, 400))
@settings(deadline=None)
def test_cosine_schedule_adds_up(steps, tokens):
    counts = cosine_step(steps, tokens)
    assert sum(counts) == tokens and min(counts) >= 1
    assert len(counts) == min(steps, tokens)


def test_cosine_schedule_is_slow_first():
    counts = cosine_step(16, 256)
    assert counts[0] <= 2 and counts[-1] > 20


def test_flow_path_goes_from_noise_to_data():
    x, noise = torch.randn(2, 5, 4)
    start, velocity = flow_path(x, noise, torch.zeros(5, 1))
    end, _ = flow_path(x, noise, torch.ones(5, 1))
    assert torch.equal(start, noise) and torch.equal(end, x)
    assert torch.allclose(start + velocity, x, atol=1e-6)
    times = shifted_times(10, 4.5)
    assert times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all() and times[5] < 0.25


def test_hidden_tokens_reach_neither_z_nor_a_gradient():
    model, (states, mask, tokens, order) = make_model(), make_inputs()
    tokens.requires_grad_()
    z = model.condition(states, mask, tokens, order, 5, (4, 3))
    first = model.condition(states, mask, tokens, order, 5, (4, 3), count=2)
    assert torch.allclose(first, z[:, :2], atol=1e-6)
    assert z.shape == (3, 7, 16)
    (gradient,) = torch.autograd.grad(z.square().sum(), tokens)
    hidden = torch.zeros(3, 12, dtype=torch.bool).scatter(1, order[:, 5:], True)
    assert not gradient[hidden].any() and (gradient[~hidden].abs().sum(-1) > 0).all()
    changed = torch.where(hidden[..., None], torch.randn_like(tokens), tokens)
    assert torch.equal(model.condition(states, mask, changed, order, 5, (4, 3)), z)


def test_padding_and_dropped_prompts_do_not_matter():
    model, (states, mask, tokens, order) = make_model(), make_inputs()
    z = model.condition(states, mask, tokens, order, 5, (4, 3))
    longer = torch.cat([states, torch.randn(3, 2, 24)], 1)
    padded = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    again = model.condition(longer, padded, tokens, order, 5, (4, 3))
    assert torch.allclose(z, again, atol=1e-5)
    drop = torch.tensor([True, False, True])
    mixed = model.condition(states, mask, tokens, order, 5, (4, 3), drop)
    other = model.condition(torch.randn_like(states), mask, tokens, order, 5, (4, 3), drop)
    assert torch.allclose(mixed[1], z[1], atol=1e-5)
    assert torch.allclose(mixed[[0, 2]], other[[0, 2]], atol=1e-5)
    assert not torch.allclose(mixed[0], z[0], atol=1e-3)


def test_target_encoder_gets_no_gradient_and_sees_all_tokens():
    model, (states, mask, tokens, order) = make_model(), make_inputs()
    tokens.requires_grad_()
    prompt = model.prompt(states, mask)
    layout = model.layout(prompt, order, (4, 3))
    target = target_features(model.encoder, prompt, gather(tokens, order), layout, 5)
    assert target.shape == (3, 7, 16) and not target.requires_grad
    assert torch.allclose(target.mean(-1), torch.zeros(3, 7), atol=1e-5)
