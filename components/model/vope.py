"""VoPE: rotary positions that put every image, whatever its size, on one reference field.

Paper, section "VoPE" and supplement 12, and the two that it is compared with: RoPE on the
tokens' own columns and rows, and RoPE with NTK scaling. Lengths here are in tokens.
"""

import torch
from torch import Tensor

POSITIONS = ("vope", "rope", "ntk_rope")


def image_positions(
    width: int,
    height: int,
    grid: float,
    shift: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Positions (width·height, 2), columns then rows, of the tokens in raster order.

    With ρ = max(W, H)/g and b = |W − H|/2 the token in column w and row h stands at
    ((w + b)/ρ, h/ρ) if W ≤ H, else at (w/ρ, (h + b)/ρ). `grid` is g, the reference grid's
    side. `shift` replaces b, which moves the layout along the shorter axis (supplement 12).
    """
    if width < 1 or height < 1 or grid <= 0:
        raise ValueError(
            f"an image of {width}x{height} tokens on a grid of {grid} has no positions"
        )
    ratio = max(width, height) / grid
    offset = abs(width - height) / 2 if shift is None else shift
    column = torch.arange(width, dtype=torch.float32, device=device)
    row = torch.arange(height, dtype=torch.float32, device=device)
    if width <= height:
        column = column + offset
    else:
        row = row + offset
    rows, columns = torch.meshgrid(row / ratio, column / ratio, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=-1)


def rotary_grid(
    kind: str,
    size: tuple[int, int],
    grid: float,
    head_width: int,
    base: float,
    shift: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Rotations (W·H, head_width/2) of an image of `size` (W, H), its tokens in raster order.

    Computed on `device`: a copy from the CPU would wait for all that a GPU still has to do.

    kind: one of POSITIONS. `vope` needs the reference grid's side `grid` and takes `shift`; its
    base is the same at every size. `rope`: columns and rows as they are. `ntk_rope`: so too, with
    the base ω·s^(d/(d−2)) for an image s times longer than `grid`, the longest side that the base
    was trained for; d is the width of an axis. (The paper prints ω/2 for twice the length, which
    lengthens no wave and is not NTK-aware scaling.)
    """
    if kind == "vope":
        return image_rotations(image_positions(*size, grid, shift, device), head_width, base)
    if kind not in POSITIONS:
        raise ValueError(f"positions {kind!r}: known are {', '.join(POSITIONS)}")
    longest = max(size)
    if kind == "ntk_rope" and longest > grid:
        axis = head_width // 2
        base *= (longest / grid) ** (axis / (axis - 2))
    # On a field of its own length and uncentred, VoPE's positions are columns and rows.
    return image_rotations(image_positions(*size, longest, 0.0, device), head_width, base)


def _frequencies(width: int, base: float, device: torch.device | None = None) -> Tensor:
    """θ_j = ω^(−2(j−1)/d) for the d/2 pairs of d = `width` channels, (width/2,)."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def image_rotations(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Unit complex numbers (…, head_width/2) that rotate a head at `positions` (…, 2).

    Half of the head's width belongs to each axis, so the inner product of a rotated query at
    m and a rotated key at n depends on m − n only, which VoPE has divided by ρ.
    """
    if head_width % 4:
        raise ValueError(f"head width {head_width} is not a multiple of 4, two axes of pairs")
    frequencies = _frequencies(head_width // 2, base, positions.device)
    angles = positions[..., None] * frequencies  # … 2 d/4
    return torch.polar(torch.ones_like(angles), angles).flatten(-2)


def text_rotations(
    length: int, head_width: int, base: float, device: torch.device | None = None
) -> Tensor:
    """1-D rotary positions of the text tokens over the full head, (length, head_width/2)."""
    places = torch.arange(length, dtype=torch.float32, device=device)
    angles = places[:, None] * _frequencies(head_width, base, device)
    return torch.polar(torch.ones_like(angles), angles)


class _NormaliseAndRotate(torch.autograd.Function):
    # The same in separate operations passes over the memory three times as often and took
    # three times as long; with it a small model's whole step took a tenth longer.

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, rotations: Tensor) -> Tensor:  # type: ignore[override]
        kind, x = x.dtype, x.to(scale.dtype)  # bfloat16 is too coarse for lengths and angles
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_()
        normal = x * inverse
        out = normal * scale
        _pairs(out).mul_(rotations)
        ctx.save_for_backward(normal.to(kind), inverse, scale, rotations)
        return out.to(kind)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normal, inverse, scale, rotations = ctx.saved_tensors
        gradient = gradient.to(scale.dtype).contiguous()
        back = torch.view_as_real(_pairs(gradient) * rotations.conj()).flatten(-2)
        product = back * normal
        middle = tuple(range(product.dim() - scale.dim()))
        of_scale = product.sum(middle).sum_to_size(scale.shape)
        along = (product * scale).mean(-1, keepdim=True)
        of_x = back.mul_(scale).sub_(normal * along).mul_(inverse)
        return of_x.to(normal.dtype), of_scale, None


EPSILON = 1e-6  # of the RMSNorm


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _plainly(x: Tensor, scale: Tensor, rotations: Tensor) -> Tensor:
    """What `_NormaliseAndRotate` computes, in real numbers: a compiler makes one kernel of it.

    It would leave operations on complex numbers as they are, each a pass over the memory.
    """
    kind, x = x.dtype, x.to(scale.dtype)
    normal = x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    first, second = (normal * scale).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = torch.view_as_real(rotations).unbind(-1)
    turned = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.stack(turned, dim=-1).flatten(-2).to(kind)


def normalise_and_rotate(heads: Tensor, scale: Tensor, rotations: Tensor) -> Tensor:
    """RMSNorm of each head, times `scale`, then its rotation: what Q and K go through.

    heads (B, N, 2, H, d), scale (2, 1, d) learned, rotations (B or 1, N, d/2) unit
    complex numbers that turn pairs of neighbouring channels.
    """
    rotations = rotations[:, :, None, None]
    if torch.compiler.is_compiling():
        return _plainly(heads, scale, rotations)
    return _NormaliseAndRotate.apply(heads, scale, rotations)
