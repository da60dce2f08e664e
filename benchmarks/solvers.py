"""How far the flow head's solvers end from where the flow leads: python benchmarks/solvers.py MODEL

Prompts of the embedded world (params.yaml of the current folder), one picture each, drawn with the
model's own settings. Of each the next tokens are drawn again by each solver from the same noise,
under the same z, with so many evaluations of the head a token, after some share of the picture's
tokens. The error is the root mean square of the difference to 400 evaluations of `adams`, over
the spread of the tokens: mean over the pictures ± its standard error. Nothing chaotic is in it, as
there is in whole pictures, where each token changes all that come after it.

Heun's method is here only: it was not worth its place among the sampler's. It is given one
evaluation more, for the Euler step at its end (Karras et al. 2022), without which it does worse.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import load
from components.evaluation.drawing import load_pipeline
from components.evaluation.evaluate import benchmark, parse_size
from components.model.network import gather
from components.model.sampler import chance, sample_tokens
from components.model.solvers import SOLVERS, Course, shifted_times, solve
from components.processes import one_thread
from components.scenes.world import World

EVALUATIONS = (4, 6, 8, 12, 16, 24)
SHARES = (0.0, 0.125, 0.375, 0.75)
MANY, NEXT = 400, 16  # evaluations of the reference, tokens that are drawn
Field = Callable[[Tensor, float], Tensor]  # x and a time to v


def by_heun(field: Field, x: Tensor, evaluations: int, shift: float) -> Tensor:
    """Heun's method with an odd number of evaluations: the last step is Euler's."""
    ends, asked = shifted_times((evaluations + 1) // 2, shift).tolist(), 0
    for time, end in pairwise(ends):
        length = end - time
        slope = field(x, time)
        asked += 1
        if asked < evaluations:
            slope = (slope + field(x + length * slope, time + length)) / 2
            asked += 1
        x = x + length * slope
    return x


def by(solver: str, field: Field, x: Tensor, evaluations: int, shift: float) -> Tensor:
    if solver == "heun":
        return by_heun(field, x, evaluations + 1, shift)
    course = Course.of(solver, evaluations, shift)
    return solve(course, lambda asked, x: field(x, course.asked[asked]), x)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--shifts", type=float, nargs="+", default=[1.0, 2.0])
    given = parser.parse_args()
    params, pipe = load(), load_pipeline(given.model)
    settings, model, sampler = params["evaluation"], pipe.transformer, pipe.sampler
    world = World.from_params(params["data"])
    chosen = benchmark(world, settings | {"pictures": max(given.pictures // 12, 1), "images": 1})
    prompts = [metadata["prompt"] for metadata, _ in chosen][: given.pictures]
    width, height = parse_size(settings["size"])
    size = width // pipe.tokenizer.patch, height // pipe.tokenizer.patch
    count, channels = size[0] * size[1], pipe.tokenizer.channels
    drawn = [chance(count, channels, torch.Generator().manual_seed(i)) for i in range(len(prompts))]
    order, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
    scale, noise = sampler.guidance_scale, noise * sampler.temperature
    states, mask = pipe.text_encoder.encode(prompts)
    drop = torch.ones(len(prompts), dtype=torch.bool)
    with one_thread():
        tokens = sample_tokens(model, states, mask, size, sampler, order, noise)
        for share in SHARES:
            seen, now = (
                round(share * count),
                slice(round(share * count), round(share * count) + NEXT),
            )
            z = [
                model.condition(states, mask, tokens, order, seen, size, dropped, NEXT)
                for dropped in (None, drop)
            ]

            def field(x: Tensor, time: float, z: list[Tensor] = z) -> Tensor:
                at = x.new_full((1, 1, 1), time)
                told, untold = (model.head(x, at, each) for each in z)
                return untold + scale * (told - untold)

            start = noise[:, now, None]
            exact = by("adams", field, start, MANY, 1.0)
            spread = float(gather(tokens, order).std())
            print(f"\nafter {share:.3g} of the tokens, {len(prompts)} pictures")
            print(
                f"evaluations  {'shift':>5}  " + "  ".join(f"{s:>15}" for s in (*SOLVERS, "heun"))
            )
            for evaluations in EVALUATIONS:
                for shift in given.shifts:
                    row = []
                    for solver in (*SOLVERS, "heun"):
                        away = by(solver, field, start, evaluations, shift) - exact
                        error = away.square().mean((1, 2, 3)).sqrt() / spread
                        standard = float(error.std()) / len(error) ** 0.5
                        row.append(f"{float(error.mean()):.4f} ± {standard:.4f}")
                    print(
                        f"{evaluations:11}  {shift:5g}  "
                        + "  ".join(f"{each:>15}" for each in row),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
