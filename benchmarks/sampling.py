"""Sampling as the paper prints it against ours: seconds, their ratio, and the largest difference.

python benchmarks/sampling.py [--pictures N] [--repeats N]

`published` is Algorithm 1 written the plain way. Every autoregressive step encodes the prompt
anew, for the conditional and the unconditional half apart; both halves run at any guidance; the
predictor works out z of all hidden tokens, the flow head then draws the few of the step; every
Euler step projects z again. Ours gives the same pictures. Both run on one thread in turns; CPU
seconds, the least of the repeats, as other work on the machine only ever adds.

The network has random weights of a b-size network's width and few of its blocks; the text encoder
is all-MiniLM-L6-v2 with its own weights, small beside the paper's T5-XXL, which would add to what
encoding once saves.
"""

import argparse
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.model.djepa import DJEPA, DJEPAConfig
from components.model.sampler import (
    SamplerConfig,
    chance,
    cosine_step,
    sample_tokens,
)
from components.model.solvers import shifted_times
from components.tokens.text import MiniLMEncoder, TextEncoder

SIDE = 16  # tokens
NETWORK = DJEPAConfig(
    channels=16,
    text_width=384,
    width=768,
    heads=12,
    mlp_ratio=4,
    buffer_tokens=0,
    positions="vope",
    reference_grid=256,
    rope_base=10000.0,
    encoder_blocks=2,
    predictor_blocks=2,
    head_width=1024,
    head_blocks=2,
)


@torch.no_grad()
def published(
    model: DJEPA,
    encoder: TextEncoder,
    prompts: list[str],
    size: tuple[int, int],
    config: SamplerConfig,
    order: torch.Tensor,
    noise: torch.Tensor,
    unconditional: bool = True,
) -> torch.Tensor:
    """Tokens (B, N, C) in raster order, by Algorithm 1 as it stands; see the module's docstring.

    unconditional: whether v_u is computed where the guidance scale is 1 too, and so has no part.
    """
    batch, count, channels = noise.shape
    device = noise.device
    times = shifted_times(config.num_inference_steps, config.time_shift).to(device)
    halves = [False, True] if unconditional or config.guidance_scale != 1 else [False]
    tokens, visible = torch.zeros_like(noise), 0
    for drawn in cosine_step(config.autoregressive_steps, count):
        z = []
        for dropped in halves:
            states, mask = encoder.encode(prompts)
            drop = torch.full((batch,), dropped, device=device)
            every = model.condition(states, mask, tokens, order, visible, size, drop)
            z.append(every[:, :drawn])
        x = noise[:, visible : visible + drawn] * config.temperature
        for start, end in pairwise(times):
            v = [model.head(x[:, :, None], start.view(1, 1, 1), each)[:, :, 0] for each in z]
            if len(v) == 2:
                v = [v[1] + config.guidance_scale * (v[0] - v[1])]
            x = x + (end - start) * v[0]
        place = order[:, visible : visible + drawn, None].expand(-1, -1, channels)
        tokens = tokens.scatter(1, place, x)
        visible += drawn
    return tokens


def ours(
    model: DJEPA,
    encoder: TextEncoder,
    prompts: list[str],
    size: tuple[int, int],
    config: SamplerConfig,
    order: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    states, mask = encoder.encode(prompts)
    return sample_tokens(model, states, mask, size, config, order, noise)


def awake(model: DJEPA) -> DJEPA:
    """Weights of a size at which every layer tells, unlike those that training starts with."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=1, help="drawn together")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="autoregressive")
    parser.add_argument("--flow-steps", type=int, default=25, help="Euler steps a token")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, encoder, count = awake(DJEPA(NETWORK)), MiniLMEncoder(77), SIDE * SIDE
    print(
        f"{given.pictures} picture(s) of {count} tokens, {given.steps} steps of "
        f"{given.flow_steps} Euler steps, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, "
        f"one thread, CPU seconds, least of {given.repeats}"
    )
    print("guidance  caption tokens  published s  ours s  ratio  (v_u left out)  difference")
    for guidance in (6.0, 1.0):
        for length in (12, 77):
            # Two of the tokens are the encoder's own.
            prompts = [f"{'circle ' * (length - 2)}"] * given.pictures
            assert encoder.encode(prompts)[1].sum(1).tolist() == [length] * given.pictures
            config = SamplerConfig(
                given.steps, given.flow_steps, guidance, 1.0, 1.0, width=256, height=256
            )
            drawn = [
                chance(count, NETWORK.channels, torch.Generator().manual_seed(i))
                for i in range(given.pictures)
            ]
            order, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
            what = (model, encoder, prompts, (SIDE, SIDE), config, order, noise)
            ways = {"published": published, "ours": ours}
            if guidance == 1:
                ways["without"] = partial(published, unconditional=False)
            best, tokens = dict.fromkeys(ways, float("inf")), {}
            for _ in range(given.repeats):
                for name, way in ways.items():
                    started = time.process_time()
                    tokens[name] = way(*what)
                    best[name] = min(best[name], time.process_time() - started)
            difference = float((tokens["published"] - tokens["ours"]).abs().max())
            left_out = f"{best['without'] / best['ours']:.2f}" if guidance == 1 else ""
            print(
                f"{guidance:8g}  {length:14}  {best['published']:11.2f}  {best['ours']:6.2f}  "
                f"{best['published'] / best['ours']:5.2f}  {left_out:>14}  {difference:10.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
