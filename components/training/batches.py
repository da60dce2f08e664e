"""What each process trains on in each step: its part of the team's batch.

Every process asks the same sampler and takes its part of what it says; everything random follows
from seed and step. So the result does not depend on how many processes there are but for rounding,
and going on from a snapshot needs no random state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from components.feedback.sampler import StatisticalSampler
from components.model.network import Network
from components.tokens.encoded import EncodedSet
from components.training.batch import Batch, Picture, grouped, packed
from components.training.distribution import Team
from components.training.draw import draw_for, hidden_count, moved


@dataclass(frozen=True)
class Part:
    """A process's part of a batch and its share of the whole batch's loss."""

    batch: Batch
    share: float
    samples: list[tuple[str, np.ndarray]]  # of the whole batch: rung and sample ids

    @property
    def ids(self) -> np.ndarray:
        """All the whole batch's samples."""
        return np.concatenate([ids for _, ids in self.samples])


class Batches:
    """Parts of batches for one process of a team, by `params.training` as `settings`.

    grouped: pictures of one shape side by side, one mask ratio for all of them. packed: pictures
    of all shapes end to end, a mask ratio each; nothing is padded.
    """

    def __init__(
        self,
        encoded: EncodedSet,
        sampler: StatisticalSampler,
        network: Network,
        settings: Mapping[str, Any],
        seed: int,
        place: Team,
    ) -> None:
        self.encoded, self.sampler, self.network = encoded, sampler, network
        self.settings, self.seed, self.place = settings, seed, place

    def next(self, step: int) -> Part:
        """The part of the batch of this step."""
        if self.settings["batches"] == "packed":
            return self._pack(step)
        rung, ids = self.sampler.next_batch()
        mine = np.array_split(np.arange(len(ids)), self.place.size)[self.place.rank]
        share = len(mine) / len(ids)
        mine = mine if len(mine) else np.arange(1)  # for nothing, but in step with the others
        latents = self.encoded.latents(rung, ids[mine])
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        of_batch = tokens[:1].expand(len(ids), -1, -1)  # only its shape counts
        draw = draw_for(of_batch, self.settings, self._generator(step)).of(mine)
        states, mask = self.encoded.text(ids[mine])
        device = self.place.device
        batch = grouped(
            self.network,
            moved(tokens, device),
            moved(states, device),
            moved(mask, device),
            (latents.shape[3], latents.shape[2]),
            draw.to(device),
        )
        return Part(batch, share, [(rung, ids)])

    def _pack(self, step: int) -> Part:
        samples = self.sampler.next_pack()
        # Largest first, dealt out in turn, so that every process has about as many tokens.
        flat = [(rung, int(i)) for rung, ids in samples for i in ids]
        flat.sort(key=lambda pair: -np.prod(self.encoded.rungs[pair[0]]))
        mine = list(range(len(flat)))[self.place.rank :: self.place.size] or [0]
        pictures = [self._picture(*flat[number], step, number) for number in mine]
        hidden = [each.draw.noise.shape[1] for each in pictures]
        others = set(range(len(flat))) - set(mine)
        total = sum(hidden) + sum(self._hidden(flat[n][0], step, n) for n in others)
        idle = self.place.rank >= len(flat)
        share = 0.0 if idle else sum(hidden) / total
        return Part(packed(self.network, pictures), share, samples)

    def _picture(self, rung: str, sample: int, step: int, number: int) -> Picture:
        latents = self.encoded.latents(rung, [sample])
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        states, _ = self.encoded.text([sample])
        device = self.place.device
        draw = draw_for(tokens, self.settings, self._generator(step, number))
        size = (latents.shape[3], latents.shape[2])
        return Picture(moved(tokens, device), moved(states, device), size, draw.to(device))

    def _hidden(self, rung: str, step: int, number: int) -> int:
        """How many tokens of another process's picture are hidden."""
        patch = self.encoded.tokenizer().patch
        width, height = self.encoded.rungs[rung]
        count = (width // patch) * (height // patch)
        return hidden_count(count, self.settings, self._generator(step, number))[1]

    def _generator(self, *purpose: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, *purpose])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
