"""The order in which a picture's tokens are drawn."""

import torch
from torch import Tensor

ORDERS = ("random", "spread")


def spread(order: Tensor, size: tuple[int, int]) -> Tensor:
    """Orders (B, N), each token of which is as far from those before it as any can be.

    order (B, N): random ones, of raster positions of pictures of size (W, H) in tokens. They say
    where to begin and which of equally far tokens comes first, so an order depends on its own
    picture alone. What is drawn in one step then lies apart, and what is drawn so far lies
    around all that is not.
    """
    width, count = size[0], order.shape[1]
    # 0 … 1 by the random order: decides between distances, whose squares are whole numbers.
    rank = torch.empty_like(order, dtype=torch.float32).scatter_(
        1, order, torch.arange(count, device=order.device).expand_as(order) / count
    )
    place = torch.arange(count, device=order.device)
    row, column = place // width, place % width
    least = torch.full_like(rank, float("inf"))  # squared distance to the nearest one drawn
    chosen, result = order[:, :1], []
    for _ in range(count):
        result.append(chosen)
        away = (row - row[chosen]) ** 2 + (column - column[chosen]) ** 2
        least = torch.minimum(least, away.float())
        chosen = (least - rank).masked_fill(least == 0, float("-inf")).argmax(1, keepdim=True)
    return torch.cat(result, dim=1)
