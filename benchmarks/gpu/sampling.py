"""Pictures drawn by h with random weights, in bfloat16: seconds a picture and pictures a second.

`published`: Algorithm 1 as the paper prints it (benchmarks/sampling.py), kernel by kernel. `ours`
gives the same pictures. `graphs`: with CUDA graphs for the flow head; `compiled`: the head
compiled too; `no mask`: attention told that no caption is padded. Frozen encoder and decoder are
left out. Where a picture takes longer than a call may, some of its steps are drawn and the rest is
worked out between them; the report says so.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.record import Clock, Results, spread, timed
from benchmarks.gpu.training import GIB, free, is_djepa
from benchmarks.gpu.world import parameters
from components.model import flops, sampler
from components.model.build import build_network
from components.model.djepa import DJEPA
from components.model.graphed import Graphed
from components.model.precision import as_stored, halved
from components.model.sampler import SamplerConfig, chance, cosine_step, sample_tokens
from components.model.solvers import Course
from components.plan import tokens_of, widths

WORDS, PATCH = 77, 16
TOGETHER = 64  # tokens of a step are padded to a multiple: a graph for each such number
# Size, pictures at once, autoregressive and Euler steps, way; in order of importance.
CASES: list[tuple[str, int, int, int, str]] = [
    ("1024x1024", 1, 32, 25, "graphs"),
    ("1024x1024", 1, 64, 250, "graphs"),
    ("1024x1024", 1, 64, 250, "ours"),
    ("1024x1024", 1, 32, 25, "ours"),
    ("1024x1024", 1, 32, 25, "compiled no mask"),
    ("1024x1024", 1, 32, 25, "graphs no mask"),
    ("1024x1024", 1, 16, 25, "graphs"),
    ("256x256", 1, 32, 25, "graphs"),
    ("256x256", 1, 64, 250, "graphs"),
    ("256x256", 64, 32, 25, "graphs"),
    ("256x256", 16, 32, 25, "graphs"),
    ("1024x1024", 4, 32, 25, "graphs"),
    ("1024x1024", 16, 32, 25, "graphs"),
    ("1024x1024", 1, 64, 250, "published"),
    ("256x256", 1, 64, 250, "published"),
    ("1024x1024", 1, 128, 250, "graphs"),
    ("256x256", 1, 64, 250, "ours"),
    ("4096x4096", 1, 32, 25, "graphs no mask"),
    ("4096x4096", 1, 64, 250, "graphs"),
]
TINY = [
    ("64x64", 2, 4, 3, "graphs no mask"),
    ("64x64", 1, 4, 3, "published"),
    ("128x128", 1, 8, 3, "ours"),
]
REPEATS = 5
WHOLE = 2.0e16  # operations above which only some steps of a picture are drawn


def random_network(params: dict[str, Any], device: str) -> DJEPA:
    """Weights of a size at which every layer tells, unlike those that training starts with."""
    channels, _, text_width = widths(params)
    with torch.device(device):
        model = is_djepa(build_network(params["model"]["network"], channels, text_width, 0))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return halved(model.eval().requires_grad_(False))


def grouped_graph(denoise: Any) -> Any:
    """The sampler's Euler steps as graphs, a step's tokens padded to a multiple of TOGETHER."""
    graphed = Graphed(denoise)

    def run(head: Any, z: Tensor, x: Tensor, *rest: Any) -> Tensor:
        count = x.shape[1]
        more = -count % TOGETHER
        longer = [F.pad(each, (0, 0, 0, more)) for each in (z, x)]
        return graphed(head, *longer, *rest)[:, :count]

    return run


@contextmanager
def drawn_by(way: str, model: DJEPA) -> Iterator[None]:
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(as_stored(model))
        if "compiled" in way:
            compiled = torch.compile(model.head.velocity, dynamic=False)
            stack.enter_context(mock.patch.object(model.head, "velocity", compiled))
        if "no mask" in way:
            layout = model.layout
            all_seen = lambda *given: replace(layout(*given), padded=False)  # noqa: E731
            stack.enter_context(mock.patch.object(model, "layout", all_seen))
        if "graphs" in way or "compiled" in way:
            run = grouped_graph(sampler._denoise)
            stack.enter_context(mock.patch.object(sampler, "_denoise", run))
        yield


def some_steps(steps: int, tokens: int) -> list[int]:
    """What `cosine_step` gives, cut down: about seven steps spread evenly, their tokens alone.

    The tokens between two of them count as drawn, for nothing.
    """
    counts = cosine_step(steps, tokens)
    places = sorted({round(n * (len(counts) - 1) / 6) for n in range(7)})
    return [counts[n] if n in places else -counts[n] for n in range(len(counts))]


def draw_partly(model: DJEPA, given: tuple[Any, ...], config: SamplerConfig) -> list[float]:
    """Seconds of some of a picture's steps, in places evenly spread, the first and last among."""
    states, mask, size, order, noise = given
    halves = []
    for dropped, length in ((None, states.shape[1]), (torch.ones(len(noise), dtype=torch.bool), 1)):
        drop = None if dropped is None else dropped.to(noise.device)
        prompt = model.prompt(states[:, :length], mask[:, :length], drop)
        halves.append((model.encoder.text_in(prompt), model.layout(prompt, order, size)))
    course = Course.of(config.solver, config.num_inference_steps, config.time_shift)
    times = noise.new_tensor(course.asked).view(-1, 1, 1, 1)
    moments = list(zip(*model.head.moments(times), strict=True))
    visible, seconds = 0, []

    def step(visible: int, drawn: int) -> None:
        z = torch.cat(
            [model.predict(text, noise[:, :visible], layout, drawn) for text, layout in halves]
        )
        now = noise[:, visible : visible + drawn]
        sampler._denoise(model.head, z, now, course, moments, config.guidance_scale)

    for count in some_steps(config.autoregressive_steps, noise.shape[1]):
        if count > 0:
            if not seconds:
                step(visible, count)  # warms up
            seconds.append(timed(partial(step, visible, count), noise.device.type))
        visible += abs(count)
    return seconds


def run(results: Results, clock: Clock, device: str, tiny: bool, peak: float) -> Iterator[str]:
    """Measure all cases that are not there yet; yields what it left for want of time."""
    params = parameters("h", ["256x256"], 1, tiny)
    text_width = widths(params)[2]
    model = None
    for size, batch, steps, euler, way in TINY if tiny else CASES:
        case = {"kind": "sampling", "model": "h", "size": size, "batch": batch,
                "steps": steps, "euler": euler, "way": way}  # fmt: skip
        if results.has(case):
            continue
        side = int(size.split("x")[0])
        config = SamplerConfig(steps, euler, 6.0, 1.0, 4.5, side, side)
        if model is None:
            if clock.left() < (3 if tiny else 20):
                yield f"sampling {size} {way}"
                continue
            model = random_network(params, device)
        count = tokens_of(size, PATCH)
        work = batch * flops.drawn_picture(model, WORDS, count, config)
        # Launched one by one, an Euler step of the head takes about 1.5 ms, published 3.
        launching = steps * euler * {"ours": 0.0015, "published": 0.003}.get(way, 0.0003)
        expected = work / (0.3 * peak) * (3 if way == "published" else 1) + launching
        partly = work > WHOLE or (tiny and size == "128x128")
        expected *= 8 / steps if partly else 1
        if clock.left() < (1 if tiny else 2.5 * min(expected, 60) + 10):
            yield f"sampling {size} {way}"
            continue
        try:
            with drawn_by(way, model):
                found = drawn(model, size, batch, config, way, partly, text_width, clock)
            found["utilisation"] = work / found["seconds"]["median"] / peak
            results.add(case, found)
        except Exception as error:
            results.add_failure(case, error)
        free()


def drawn(
    model: DJEPA, size: str, batch: int, config: SamplerConfig, way: str, partly: bool,
    text_width: int, clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a batch, over repeats."""
    device = next(model.parameters()).device
    width, height = (int(side) // PATCH for side in size.split("x"))
    grid, count = (width, height), width * height
    chosen = [
        chance(count, model.config.channels, torch.Generator().manual_seed(n)) for n in range(batch)
    ]
    order, noise = (torch.stack(each).to(device) for each in zip(*chosen, strict=True))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch, WORDS, text_width, generator=generator).to(device)
    mask = torch.ones(batch, WORDS, dtype=torch.bool, device=device)
    given = (states, mask, grid, order, noise)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if partly:
        each = draw_partly(model, given, config)
        counts = cosine_step(config.autoregressive_steps, count)
        # Between two measured steps the time goes straight from one to the other.
        total = (len(counts) - 1) * sum(a + b for a, b in pairwise(each))
        total = total / 2 / (len(each) - 1) + (each[0] + each[-1]) / 2
        found: dict[str, Any] = {"seconds": spread([total]), "steps_measured": len(each)}
    else:
        work = (
            _published(model, given, config) if way == "published" else _ours(model, given, config)
        )
        first = timed(work, device.type)  # captures its graphs
        seconds: list[float] = []
        while not seconds or (
            len(seconds) < REPEATS and sum(seconds) < 30 and clock.left() > 1.5 * max(seconds)
        ):
            seconds.append(timed(work, device.type))
        found = {"seconds": spread(seconds), "seconds_first": round(first, 2)}
    found["pictures_per_second"] = batch / found["seconds"]["median"]
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def _ours(model: DJEPA, given: tuple[Any, ...], config: SamplerConfig) -> Any:
    states, mask, grid, order, noise = given
    return lambda: sample_tokens(model, states, mask, grid, config, order, noise)


def _published(model: DJEPA, given: tuple[Any, ...], config: SamplerConfig) -> Any:
    from types import SimpleNamespace

    from benchmarks.sampling import published

    states, mask, grid, order, noise = given
    encoder: Any = SimpleNamespace(encode=lambda prompts: (states, mask))
    prompts = [""] * len(noise)
    return lambda: published(model, encoder, prompts, grid, config, order, noise)
