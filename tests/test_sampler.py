"""Faster drawing: solvers, fewer head evaluations, guidance in the first steps only, orders."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import UserError
from components.model import DJEPAPipeline
from components.model.order import spread
from components.model.sampler import SamplerConfig, cosine_step, guided_steps, head_evaluations
from components.model.solvers import SOLVERS, Course, solve
from tests.test_pipeline import PROMPTS, SAMPLER, levels, pipe, seeded, tokenizer

__all__ = ["pipe", "tokenizer"]  # fixtures

FAST = {"solver": "adams", "annealing": 0.4, "guided_share": 0.5, "order": "spread"}


# ---- solvers


def error(solver: str, evaluations: int, rate: float, shift: float) -> float:
    """Of x(1), where dx/dt = rate·x + t and x(0) = 1."""
    course = Course.of(solver, evaluations, shift)
    times: list[int] = []

    def velocity(asked: int, x: torch.Tensor) -> torch.Tensor:
        times.append(asked)
        return rate * x + course.asked[asked]

    x = float(solve(course, velocity, torch.ones((), dtype=torch.float64)))
    assert times == list(range(evaluations))  # as many as were given, in turn
    exact = (1 + 1 / rate**2) * math.exp(rate) - 1 / rate - 1 / rate**2
    return abs(x - exact)


@given(
    rate=st.floats(0.5, 2.5) | st.floats(-2.5, -0.5),
    shift=st.floats(0.5, 2.0),
    solver=st.sampled_from(SOLVERS),
    odd=st.integers(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_twice_the_evaluations_halve_or_quarter_the_error(
    rate: float, shift: float, solver: str, odd: int
) -> None:
    few, many = (error(solver, n + odd, rate, shift) for n in (100, 200))
    # A method's leading term can vanish by chance, but then the error is small already.
    if solver == "euler":
        assert few / many == pytest.approx(2, rel=0.2) or few < 1e-3
    else:
        assert few / many > 3 or few < 3e-5


def test_at_equal_evaluations_second_order_comes_nearer() -> None:
    plain = error("euler", 16, 1.5, 1.0)
    for solver in SOLVERS[1:]:
        assert error(solver, 16, 1.5, 1.0) < plain / 4
        assert error(solver, 1, 1.5, 1.0) == error("euler", 1, 1.5, 1.0)


@given(st.sampled_from(SOLVERS), st.integers(1, 40), st.floats(0.2, 5))
@settings(deadline=None)
def test_a_straight_flow_is_followed_exactly(solver: str, evaluations: int, shift: float) -> None:
    course = Course.of(solver, evaluations, shift)
    assert course.ends[0] == 0 and course.ends[-1] == 1 and len(course.asked) == evaluations
    end = solve(course, lambda asked, x: torch.full_like(x, 3.0), torch.ones(4))
    assert torch.allclose(end, torch.full((4,), 4.0), atol=1e-5)


# ---- how much is computed in which autoregressive step


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0.01, 1))
def test_head_evaluations_fall_in_a_line(first: int, steps: int, share: float) -> None:
    config = SamplerConfig(steps, first, 2.0, 1.0, 1.0, 16, 16, annealing=share)
    counts = head_evaluations(config, steps)
    assert len(counts) == steps and counts[0] == first and min(counts) >= 1
    assert counts == sorted(counts, reverse=True)
    if steps > 1:
        assert abs(counts[-1] - max(first * share, 1)) <= 0.5
        assert abs(sum(counts) / steps - max((counts[0] + counts[-1]) / 2, 1)) <= 1


@given(st.integers(1, 64), st.floats(0.01, 1))
def test_a_share_of_the_steps_is_guided(steps: int, share: float) -> None:
    config = SamplerConfig(steps, 2, 2.0, 1.0, 1.0, 16, 16, guided_share=share)
    assert 1 <= guided_steps(config, steps) <= steps
    assert share * steps <= guided_steps(config, steps) < share * steps + 1


def drawn(pipe: DJEPAPipeline, **settings: object) -> list[torch.Tensor]:
    """The latents after each autoregressive step of one picture."""
    seen: list[torch.Tensor] = []
    pipe(
        PROMPTS[1],
        generator=seeded(0),
        callback_on_step_end=lambda p, s, t, tensors: seen.append(tensors["latents"]) or {},
        **settings,
    )
    return seen


def test_only_the_first_steps_are_guided_and_the_others_cost_half(pipe: DJEPAPipeline) -> None:
    passes: list[int] = []
    pipe.transformer.predictor.register_forward_hook(lambda m, given, z: passes.append(len(z)))
    full = drawn(pipe, autoregressive_steps=4)
    assert len(passes) == 8
    passes.clear()
    part = drawn(pipe, autoregressive_steps=4, guided_share=0.5)
    assert len(passes) == 6
    assert torch.equal(full[1], part[1]) and not torch.equal(full[2], part[2])
    # A share that covers all steps is full guidance, to the bit.
    assert torch.equal(drawn(pipe, autoregressive_steps=4, guided_share=0.76)[-1], full[-1])
    passes.clear()
    free = drawn(pipe, autoregressive_steps=4, guidance_scale=1.0, guided_share=0.5)
    assert len(passes) == 4 and not torch.equal(free[0], full[0])


def test_annealing_leaves_the_first_step_as_it_is(pipe: DJEPAPipeline) -> None:
    asked: list[int] = []
    head = pipe.transformer.head
    velocity, head.velocity = head.velocity, lambda *a: asked.append(1) or velocity(*a)
    full = drawn(pipe, num_inference_steps=9)
    assert len(asked) == 4 * 9
    asked.clear()
    part = drawn(pipe, num_inference_steps=9, annealing=1 / 3)
    assert len(asked) == 9 + 7 + 5 + 3
    assert torch.equal(full[0], part[0]) and not torch.equal(full[1], part[1])


# ---- orders

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(sizes, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_spread_takes_a_farthest_token_each_time(size: tuple[int, int], seed: int) -> None:
    width, count = size[0], size[0] * size[1]
    g = torch.Generator().manual_seed(seed)
    random = torch.stack([torch.randperm(count, generator=g) for _ in range(3)])
    orders = spread(random, size)
    assert torch.equal(orders.sort(1).values, torch.arange(count).expand(3, -1))
    assert torch.equal(orders[:, 0], random[:, 0])
    assert torch.equal(orders[1:2], spread(random[1:2], size))  # depends on no other picture
    places = [(int(i) // width, int(i) % width) for i in orders[0]]
    for n in range(1, count):
        near = [min(math.dist(a, b) for b in places[:n]) for a in places[n:]]
        assert near[0] == pytest.approx(max(near))


def test_half_a_spread_picture_lies_around_all_the_rest() -> None:
    orders = torch.stack([torch.randperm(64, generator=g) for g in seeded(*range(20))])
    for order in spread(orders, (8, 8)).tolist():
        # Beside every token that the last step draws lies one that is drawn.
        there = set(order[: 64 - cosine_step(8, 64)[-1]])
        for token in set(range(64)) - there:
            row, column = divmod(token, 8)
            beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            assert there & {r * 8 + c for r, c in beside if 0 <= r < 8 and 0 <= c < 8}
    assert len({tuple(each) for each in spread(orders, (8, 8)).tolist()}) == 20


# ---- in the pipeline


def test_a_fast_picture_does_not_depend_on_its_batch(pipe: DJEPAPipeline) -> None:
    heights, prompts = [16, 24, 16, 8], PROMPTS
    four = pipe(prompts, heights, 16, generator=seeded(*range(4)), **FAST).images
    for number in range(4):
        one = pipe(prompts[number], heights[number], 16, generator=seeded(number), **FAST)
        assert levels(one.images[0], four[number]) <= 1


def test_each_of_the_settings_changes_the_picture(pipe: DJEPAPipeline) -> None:
    plain = pipe("a ring", generator=seeded(0), num_inference_steps=6).images[0]
    choices = [{"solver": name} for name in SOLVERS[1:]] + [{k: FAST[k]} for k in FAST]
    for chosen in choices:
        other = pipe("a ring", generator=seeded(0), num_inference_steps=6, **chosen).images[0]
        assert levels(plain, other) > 1, chosen


def test_a_model_saved_before_there_were_these_settings_draws_as_it_did(
    pipe: DJEPAPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "sampler" / "config.json"
    saved = json.loads(file.read_text())
    assert set(FAST) <= set(saved)
    file.write_text(json.dumps({k: v for k, v in saved.items() if k not in FAST}))
    again = DJEPAPipeline.from_pretrained(tmp_path)
    assert again.sampler == SAMPLER
    assert again.sampler.solver == "euler" and again.sampler.order == "random"
    pictures = [p("a ring", generator=seeded(0)).images[0].tobytes() for p in (pipe, again)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"solver": "rk4"}, "give one of euler, midpoint"),
        ({"order": "raster"}, "give one of random, spread"),
        ({"annealing": 0}, "above 0, at most 1"),
        ({"guided_share": 1.5}, "above 0, at most 1"),
        ({"guided_share": float("nan")}, "above 0, at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(pipe: DJEPAPipeline, chosen: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipe("a ring", **chosen)
