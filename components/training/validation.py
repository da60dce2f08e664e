"""Validation: the losses on pictures that nothing trains on, at fixed masks, times and noises.

Everything random about a figure follows from the picture, so two points of a curve, two runs and
two groups of an ablation differ by the weights alone. Scores take minutes; this takes seconds.

Shapes: B pictures of N tokens, H of them hidden, C channels a token, K times a picture.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor

from components.model.dit import FlowDiT
from components.model.djepa import DJEPA, Encoder, target_features
from components.model.network import Network
from components.tokens.encoded import EncodedSet
from components.training.batch import Batch, grouped
from components.training.distribution import Team
from components.training.draw import Draw
from components.training.losses import flow_path, whole_error

MASKS = 4  # hidden shares: the middles of so many equally likely parts of training.mask


class Reaching(Protocol):
    """What the split needs to know of an encoded set."""

    @property
    def rungs(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102

    def rows(self, rung: str) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Split:
    """The samples that nothing trains on, by the rung that each is measured at; ids ascending."""

    rungs: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, encoded: Reaching, settings: Mapping[str, Any]) -> "Split":
        """Choose by `params.training.validation`; the same for every phase of an encoded set.

        `pictures` of each rung of the set, drawn uniformly from those that reach it: by `seed`,
        which is not the run's, and the rung's name. At most the share `most` of a rung's samples,
        all rungs' choices together, on the average; from MASKS on in whole multiples of it, so that
        each hidden share has as many. Memory holds the ids chosen only.
        """
        rungs = {}
        for rung in encoded.rungs:
            rows = encoded.rows(rung)
            most = int(float(settings["most"]) * len(rows) / len(encoded.rungs))
            rng = np.random.default_rng([int(settings["seed"]), zlib.crc32(rung.encode())])
            count = min(int(settings["pictures"]), most)
            count -= count % MASKS if count >= MASKS else 0
            places = rng.choice(len(rows), count, replace=False) if count else np.zeros(0, int)
            rungs[rung] = np.sort(np.asarray(rows[places], np.int64))
        return cls(rungs)

    @property
    def ids(self) -> np.ndarray:
        """All of them, ascending; one that is measured at two rungs stands once."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.rungs.values()]))


@dataclass(frozen=True)
class Group:
    """Pictures of one rung with as many hidden tokens: what is measured at once."""

    rung: str
    ids: np.ndarray
    places: np.ndarray  # in the table of all pictures
    tokens: int  # visible and hidden
    hidden: int


class Validation:
    """Measures networks on a split, at the rungs `names` of a phase; `settings` is params.training.

    Each picture is measured at K times, one in each of K equal bins of [0, 1] whatever
    training.time says, so every bin has as many. A quarter of a rung's pictures has each of MASKS
    hidden shares. No prompt is dropped.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        split: Split,
        names: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        self.encoded, self.settings = encoded, settings
        self.seed = int(settings["validation"]["seed"])
        self.times = int(settings["validation"]["times"])
        self.rungs: dict[str, slice] = {}  # places in the table of all pictures
        self.groups: list[Group] = []
        self.pictures = 0
        for rung in names:
            if len(split.rungs[rung]):
                self._add(rung, split.rungs[rung])

    def _add(self, rung: str, ids: np.ndarray) -> None:
        start, self.pictures = self.pictures, self.pictures + len(ids)
        self.rungs[rung] = slice(start, self.pictures)
        patch, most = self.encoded.tokenizer().patch, int(self.settings["most_tokens"])
        width, height = self.encoded.rungs[rung]
        tokens = min((width // patch) * (height // patch), most)
        shares = hidden_shares(**self.settings["mask"])[np.arange(len(ids)) % MASKS]
        hidden = np.clip(np.round(shares * tokens), 1, tokens).astype(int)
        for count in np.unique(hidden).tolist():
            (members,) = np.nonzero(hidden == count)
            # As many tokens at once as one largest picture of training has.
            for some in np.array_split(members, -(-len(members) * tokens // most)):
                self.groups.append(Group(rung, ids[some], start + some, tokens, count))

    def measure(self, network: Network, target: Encoder | None, place: Team) -> dict[str, Any]:
        """Mean losses of whole weights: `flow`, `jepa` with a target encoder, `rungs`, `times`.

        `rungs` and `times` are the flow error by rung and by bin of t. Every process of `place`
        calls it with the same weights, measures its part, and gets the same figures.
        """
        table = torch.zeros(self.pictures, self.times + 1, dtype=torch.float64)
        low = self.settings["precision"] == "bfloat16"
        for group in self.groups[place.rank :: place.size]:
            with torch.no_grad(), torch.autocast(
                torch.device(place.device).type, torch.bfloat16, enabled=low
            ):  # fmt: skip
                batch = self._batch(group, network, place.device)
                flow, jepa = errors(network, target, batch, float(self.settings["jepa_beta"]))
            table[group.places, : self.times] = flow.double().cpu()
            table[group.places, self.times] = jepa.double().cpu()
        table = table.to(place.device)
        place.sum(table)  # each row is one process's, and 0 in the others
        found = table.cpu().numpy()
        flow_error = found[:, : self.times]
        return {
            "flow": float(flow_error.mean()),
            **({} if target is None else {"jepa": float(found[:, self.times].mean())}),
            "rungs": {rung: float(flow_error[at].mean()) for rung, at in self.rungs.items()},
            "times": dict(
                zip(time_bins(self.times), flow_error.mean(axis=0).tolist(), strict=True)
            ),
        }

    def _batch(self, group: Group, network: Network, device: str) -> Batch:
        latents = self.encoded.latents(group.rung, group.ids)
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        states, mask = self.encoded.text(group.ids)
        size = (latents.shape[3], latents.shape[2])
        return grouped(
            network,
            tokens.to(device),
            states.to(device),
            mask.to(device),
            size,
            self._draw(group, tokens).to(device),
        )

    def _draw(self, group: Group, tokens: Tensor) -> Draw:
        """Order, times and noises of each picture, from its id and rung."""
        orders, times, noises = [], [], []
        name = zlib.crc32(group.rung.encode())
        for i in group.ids.tolist():
            entropy = np.random.SeedSequence([self.seed, name, i])
            g = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            orders.append(torch.randperm(tokens.shape[1], generator=g)[: group.tokens])
            bins = torch.arange(self.times)
            times.append((bins + torch.rand(self.times, generator=g))[None] / self.times)
            noises.append(torch.randn(group.hidden, self.times, tokens.shape[2], generator=g))
        return Draw(
            order=torch.stack(orders),
            visible=group.tokens - group.hidden,
            drop=torch.zeros(len(group.ids), dtype=torch.bool),
            t=torch.stack(times),
            noise=torch.stack(noises),
        )


def errors(
    network: Network, target: Encoder | None, batch: Batch, beta: float
) -> tuple[Tensor, Tensor]:
    """Flow error by picture and time, (B, K), and L_pred by picture, (B,); 0 without a target.

    The baseline has one time a picture, so it runs K times; of D-JEPA the flow head alone does.
    """
    if isinstance(network, FlowDiT):
        each = [
            replace(batch, t=batch.t[:, :, k : k + 1], noise=batch.noise[:, :, k : k + 1])
            for k in range(batch.t.shape[2])
        ]
        flow = torch.stack([whole_error(network, one).mean(dim=1) for one in each], dim=1)
        return flow, flow.new_zeros(len(flow))
    assert isinstance(network, DJEPA)
    text = network.encoder.text_in(batch.prompt)
    z = network.predict(text, batch.x[:, : batch.visible], batch.layout)
    x = batch.x[:, batch.visible :, None]
    moved, velocity = flow_path(x, batch.noise, batch.t[..., None])
    flow = (network.head(moved, batch.t, z) - velocity).square().mean(dim=(1, 3))
    if target is None:
        return flow, flow.new_zeros(len(flow))
    features = target_features(
        target, batch.whole_prompt, batch.x, batch.whole_layout, batch.visible
    )
    jepa = F.smooth_l1_loss(network.projection(z), features, beta=beta, reduction="none")
    return flow, jepa.mean(dim=(1, 2))


def hidden_shares(mean: float, std: float, low: float, high: float) -> np.ndarray:
    """MASKS hidden shares (MASKS,), equally likely under training.mask's truncated normal."""
    if std == 0 or low == high:
        return np.full(MASKS, float(np.clip(mean, low, high)))
    a, b = ndtr((low - mean) / std), ndtr((high - mean) / std)
    middles = (np.arange(MASKS) + 0.5) / MASKS
    return np.clip(mean + std * ndtri(a + middles * (b - a)), low, high)


def time_bins(times: int) -> list[str]:
    """Names of the bins of t, such as `0.2-0.4`."""
    edges = [f"{edge:.3g}" for edge in np.linspace(0, 1, times + 1)]
    return [f"{a}-{b}" for a, b in pairwise(edges)]


def figures(point: Mapping[str, Any]) -> dict[str, float]:
    """A point by the names of its metrics: `validation/flow`, `validation/flow/t0.2-0.4`."""
    named = {f"validation/{key}": point[key] for key in ("flow", "jepa") if key in point}
    named |= {f"validation/flow/{rung}": value for rung, value in point["rungs"].items()}
    return named | {f"validation/flow/t{bin}": value for bin, value in point["times"].items()}
