"""Seams of a VAE's tiled decode: blended tiles and four hard ones against the untiled decode.

python benchmarks/tiles.py [SIDE] [FOLDER] [PICTURE]

SIDE: px of the square pictures, 512 by default; tiles are half of it. FOLDER: a diffusers
AutoencoderKL (its config.json and safetensors); without one, a small one with random weights.
PICTURE: where a PNG of the decodes and, four times as strong, of their differences goes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.tokens.vae import OVERLAP, VAETokenizer
from tests.tiny_frozen import write_vae

PICTURES = 8
NEAR = 8  # px on each side of a border that count as along it


def jumps(picture, borders):
    """Mean absolute jump between neighbouring columns (and rows) at the borders and elsewhere."""
    at, elsewhere = [], []
    for turned in (picture, picture.transpose(2, 3)):
        each = turned.diff(dim=3).abs().mean(dim=(0, 1, 2))  # W − 1
        here = torch.zeros(len(each), dtype=torch.bool)
        here[[border - 1 for border in borders]] = True
        at.append(each[here].mean())
        elsewhere.append(each[~here].mean())
    return float(sum(at) / 2), float(sum(elsewhere) / 2)


def seam(tiled, whole, borders):
    """Seam figures of a tiled decode (B, 3, H, W), square, with borders at these pixels.

    ratio: jump across the borders over the jump elsewhere, of the difference from the untiled
    decode; 1 is no seam. picture, untiled: the same ratio of the decodes themselves. along,
    everywhere: mean absolute difference from the untiled decode; pixels are in [−1, 1].
    """
    difference = tiled - whole
    at, elsewhere = jumps(difference, borders)
    near = [difference[..., b - NEAR : b + NEAR] for b in borders]
    near += [difference.transpose(2, 3)[..., b - NEAR : b + NEAR] for b in borders]
    return {
        "ratio": at / elsewhere,
        "picture": np.divide(*jumps(tiled, borders)),
        "untiled": np.divide(*jumps(whole, borders)),
        "along": float(torch.cat(near, dim=3).abs().mean()),
        "everywhere": float(difference.abs().mean()),
    }


def measure(tokenizer, side, picture=None):
    """Seam figures by kind of tiling, on smooth random pictures; writes a PNG to `picture`."""
    noise = torch.rand(PICTURES, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = interpolate(noise, size=(side, side), mode="bicubic").clamp(-1, 1)
    tokenizer.vae.disable_tiling()
    latents = tokenizer.encode(images)
    whole = tokenizer.decode(latents)
    tokenizer.vae.enable_tiling()
    figures, decodes = {}, [whole]
    for name, overlap in (("blended", OVERLAP), ("four hard tiles", 0.0)):
        tokenizer.vae.tile_overlap_factor = overlap
        step = int(tokenizer.tile * (1 - overlap))
        decodes.append(tokenizer.decode(latents))
        figures[name] = seam(decodes[-1], whole, list(range(step, side, step)))
    tokenizer.vae.tile_overlap_factor = OVERLAP
    if picture is not None:
        differences = [4 * (decode - whole) for decode in decodes]
        rows = [torch.cat([x[0] for x in row], dim=2) for row in (decodes, differences)]
        pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
        size = (450, 300)
        Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BOX).save(picture)
    return figures


def main():
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    with tempfile.TemporaryDirectory() as temporary:
        given = sys.argv[2] if len(sys.argv) > 2 else ""
        folder = given or str(write_vae(Path(temporary) / "vae"))
        tokenizer = VAETokenizer(id=folder, revision="none", subfolder="", tile=side // 2)
    picture = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    print(
        f"{PICTURES} pictures of {side} px, tiles of {side // 2} px, weights: {given or 'random'}"
    )
    print("tiles            ratio  of picture  untiled  |difference| along  everywhere")
    for name, f in measure(tokenizer, side, picture).items():
        print(
            f"{name:15} {f['ratio']:6.2f}  {f['picture']:10.2f}  {f['untiled']:7.2f}"
            f"  {f['along']:18.4f}  {f['everywhere']:10.4f}"
        )


if __name__ == "__main__":
    main()
