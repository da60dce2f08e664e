"""A function of tensors as one CUDA graph a shape.

The flow head's Euler steps are thousands of small kernels, which a CPU takes longer to launch one
by one than a GPU to run; a graph of all of them is launched at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # what the graph reads
    output: Tensor  # what it writes


class Graphed:
    """`function`, replayed from a CUDA graph; called as it is where its tensors are on a CPU.

    The first call of each kind (shapes and types of the tensors, and all that is no tensor) runs
    the function once and captures it, the later ones copy their tensors in and replay. Arguments
    may be tuples and lists of tensors. The function gives one tensor, draws no random number,
    never waits for the GPU, and reads besides its arguments only what stays in place, such as a
    network's weights. No gradients. Every kind keeps its memory: give few of them, pad.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None  # one for all: no two run at once, and results are copied out

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Tensor:
        """The function's result, the caller's own.

        Raises RuntimeError under an autocast that keeps cast weights, which a graph would read
        after they are gone: cast the weights, and set cache_enabled=False.
        """
        leaves, tree = tree_flatten(arguments)
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors: list[Tensor] = [leaves[n] for n in places]
        if not tensors or not all(tensor.is_cuda for tensor in tensors):
            return self.function(*arguments)
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise RuntimeError("a CUDA graph under autocast needs cache_enabled=False")
        kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        key = (str(tree), tuple(kinds), torch.is_autocast_enabled("cuda"))
        if key not in self._captured:
            inputs = [tensor.clone() for tensor in tensors]
            for place, tensor in zip(places, inputs, strict=True):
                leaves[place] = tensor
            self._captured[key] = self._capture(inputs, tree_unflatten(leaves, tree))
        captured = self._captured[key]
        torch._foreach_copy_(captured.inputs, tensors)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, inputs: list[Tensor], arguments: Any) -> _Captured:
        # Libraries set themselves up in the first call, which a capture may not contain.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self.function(*arguments)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self.function(*arguments)
        return _Captured(graph, inputs, output)
