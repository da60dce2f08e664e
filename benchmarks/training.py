"""A training step, ours against the same model computed the plain way; ratios, and equal losses.

python benchmarks/training.py [STEPS]

Plain: every image token goes through the context encoder, hidden ones merely unseen; the predictor
and the flow head compute every token and the loss leaves out the visible; pictures of different
shapes are padded to the largest and texts to 77 tokens. Ours: visible tokens only in the encoder,
hidden tokens only in the head and in the predictor's last block, pictures of one shape at a time,
texts padded to the longest. Both have the target encoder over all tokens. Blocks of size b (768
wide, 12 heads; 2 + 2 of them, flow head 2 x 1024), float32, forward and backward, one thread;
seconds are the CPU's, so that other work on the machine does not count.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.model.build import build_network
from components.training.batch import grouped
from components.training.draw import draw_for
from components.training.losses import flow_path, losses

NETWORK = {
    "kind": "djepa",
    "width": 768,
    "heads": 12,
    "encoder_blocks": 2,
    "predictor_blocks": 2,
    "mlp_ratio": 4,
    "buffer_tokens": 0,
    "head_width": 1024,
    "head_blocks": 2,
    "positions": "vope",
    "reference_grid": 256,
    "rope_base": 10000.0,
}
SETTINGS = {
    "mask": {"mean": 1.0, "std": 0.25, "low": 0.7, "high": 1.0},  # MAR's
    "most_tokens": 4096,
    "flow_samples": 1,
    "time": {"distribution": "uniform", "mean": 0.0, "std": 1.0},
    "text_drop": 0.1,
}
CHANNELS, TEXT_WIDTH, PADDED = 64, 1024, 77
SIZES = [(16, 16), (16, 12), (12, 16), (14, 14)]  # tokens; 256 px, 16 px a token
EACH = 1  # pictures of each size


def pictures(words, seed):
    """For each size: tokens, states, mask and draw of its pictures."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for size in SIZES:
        tokens = torch.randn(EACH, size[0] * size[1], CHANNELS, generator=g)
        states = torch.randn(EACH, words, TEXT_WIDTH, generator=g)
        mask = torch.ones(EACH, words, dtype=torch.bool)
        groups.append((size, tokens, states, mask, draw_for(tokens, SETTINGS, g)))
    return groups


def ours(model, target, groups):
    """Mean losses over all hidden tokens, one shape at a time."""
    hidden = [EACH * draw.noise.shape[1] for *_, draw in groups]
    total = 0.0
    for (size, tokens, states, mask, draw), count in zip(groups, hidden, strict=True):
        batch = grouped(model, tokens, states, mask, size, draw)
        flow, jepa = losses(model, target, batch, 2.0)
        loss = (flow + jepa) * (count / sum(hidden))
        loss.backward()
        total += loss.item()
    return total


def pad_rows(x, count):
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, count - x.shape[1]))


def plain(model, target, groups):
    """The same losses over one padded batch, everything computed for every token."""
    longest = max(size[0] * size[1] for size, *_ in groups)
    rows = {name: [] for name in ("x", "states", "mask", "drop", "t", "noise", "seen", "real")}
    rotations = []
    for size, tokens, states, mask, draw in groups:
        n = tokens.shape[1]
        raster = torch.arange(n).expand(len(tokens), -1)
        r = torch.view_as_real(model.rotations(PADDED, raster, size)).flatten(2)
        rotations.append(pad_rows(r, PADDED + longest))
        seen = torch.zeros(len(tokens), n, dtype=torch.bool)
        seen.scatter_(1, draw.order[:, : draw.visible], True)
        noise = torch.zeros(len(tokens), n, CHANNELS)
        place = draw.order[:, draw.visible :, None].expand(-1, -1, CHANNELS)
        noise.scatter_(1, place, draw.noise[:, :, 0])
        rows["x"].append(pad_rows(tokens, longest))
        rows["states"].append(pad_rows(states, PADDED))
        rows["mask"].append(F.pad(mask, (0, PADDED - mask.shape[1])))
        rows["drop"].append(draw.drop)
        rows["t"].append(draw.t)
        rows["noise"].append(pad_rows(noise, longest))
        rows["seen"].append(F.pad(seen, (0, longest - n)))
        rows["real"].append(F.pad(torch.ones_like(seen), (0, longest - n)))
    b = {name: torch.cat(parts) for name, parts in rows.items()}
    turned = torch.view_as_complex(torch.cat(rotations).unflatten(2, (-1, 2)).contiguous())
    prompt = model.prompt(b["states"], b["mask"], b["drop"])
    whole = model.prompt(b["states"], b["mask"])

    def bias(owner, image):
        keys = torch.cat([owner >= 0, image], dim=1)
        return torch.zeros(keys.shape).masked_fill(~keys, float("-inf"))[:, None, None]

    encoder = model.encoder
    text, image = encoder(encoder.text_in(prompt), b["x"], turned, bias(prompt.owner, b["seen"]))
    image = torch.where(b["seen"][..., None], image, model.predictor.mask_token)
    visible_to_all = bias(prompt.owner, b["real"])
    for block in model.predictor.blocks:
        text, image = block(text, image, turned, visible_to_all)
    z = model.predictor.norm(image)
    t = b["t"][..., None]
    moved, velocity = flow_path(b["x"][:, :, None], b["noise"][:, :, None], t)
    error = (model.head(moved, b["t"], z) - velocity).square().mean(dim=(2, 3))
    with torch.no_grad():
        _, features = target(target.text_in(whole), b["x"], turned, bias(whole.owner, b["real"]))
        features = F.layer_norm(features, features.shape[-1:])
    jepa = F.smooth_l1_loss(model.projection(z), features, beta=2.0, reduction="none").mean(2)
    wanted = b["real"] & ~b["seen"]
    loss = ((error + jepa) * wanted).sum() / wanted.sum()
    loss.backward()
    return loss.item()


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    model = build_network(NETWORK, CHANNELS, TEXT_WIDTH, 0)
    for parameter in model.parameters():  # away from the zeros that silence it
        torch.nn.init.normal_(parameter, std=0.02)
    target = build_network(NETWORK, CHANNELS, TEXT_WIDTH, 1).encoder.requires_grad_(False)
    count = EACH * len(SIZES)
    print(f"torch {torch.__version__}, one thread, {platform.machine()}")
    print("caption tokens  plain images/s  ours images/s  ours/plain [least, most]  loss")
    for words in (12, 77):
        seconds = {ours: [], plain: []}
        for step in range(steps + 1):
            groups = pictures(words, step)
            said = {}
            for way in (plain, ours) if step % 2 else (ours, plain):
                model.zero_grad()
                started = time.process_time()
                said[way] = way(model, target, groups)
                if step:  # the first warms up
                    seconds[way].append(time.process_time() - started)
            assert abs(said[ours] - said[plain]) < 1e-4 * abs(said[plain]), said
        ratios = [p / o for p, o in zip(seconds[plain], seconds[ours], strict=True)]
        rates = [count / statistics.median(seconds[way]) for way in (plain, ours)]
        print(
            f"{words:14}  {rates[0]:14.2f}  {rates[1]:13.2f}  "
            f"{statistics.median(ratios):10.2f} [{min(ratios):.2f}, {max(ratios):.2f}]  "
            f"{said[ours]:.4f}"
        )


if __name__ == "__main__":
    main()
