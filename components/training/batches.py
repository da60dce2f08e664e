"""What each process trains on in each step: its parts of the team's batch.

Every process asks the same sampler and takes its parts of what it says; everything random follows
from seed and step. So the result does not depend on how many processes or parts there are but for
rounding, and going on from a snapshot needs no random state.
"""

import math
from collections.abc import Iterator, Mapping
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
    """Pictures that a process goes through at once, and their share of the whole batch's loss."""

    batch: Batch
    share: float
    last: bool  # of this process's parts of the batch


@dataclass(frozen=True)
class Whole:
    """A step's batch."""

    samples: list[tuple[str, np.ndarray]]  # rung and sample ids, of all processes
    parts: Iterator[Part]  # this process's; each is made, and copied to a GPU, when it is asked for

    @property
    def ids(self) -> np.ndarray:
        """All its samples."""
        return np.concatenate([ids for _, ids in self.samples])


class Batches:
    """Batches for one process of a team, by `params.training` as `settings`.

    grouped: pictures of one shape side by side, one mask ratio for all of them. packed: pictures
    of all shapes end to end, a mask ratio each; nothing is padded.

    A process goes through its share in `accumulate` parts, or as many as give each process a
    picture at a time. All processes have as many, as sharded ones meet in each of them; where
    pictures run out in the last one, a process takes any picture, with share 0.
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

    def next(self, step: int) -> Whole:
        """The batch of this step."""
        if self.settings["batches"] == "packed":
            samples = self.sampler.next_pack()
            return Whole(samples, self._packed(samples, step))
        rung, ids = self.sampler.next_batch()
        return Whole([(rung, ids)], self._grouped(rung, ids, step))

    def _turns(self, images: int) -> tuple[range, int]:
        """Which of the shares that so many images are dealt into are this process's parts.

        And how many shares there are. Those that are smaller by one, or empty, come last.
        """
        size = self.place.size
        count = size * min(int(self.settings["accumulate"]), math.ceil(images / size))
        return range(self.place.rank, count, size), count

    def _grouped(self, rung: str, ids: np.ndarray, step: int) -> Iterator[Part]:
        channels, device = self.encoded.tokenizer().channels, self.place.device
        of_batch = torch.empty(()).expand(len(ids), self._tokens(rung), channels)  # a shape only
        draw = draw_for(of_batch, self.settings, self._generator(step))
        turns, count = self._turns(len(ids))
        dealt = np.array_split(np.arange(len(ids)), count)
        for turn in turns:
            mine = dealt[turn]
            share = len(mine) / len(ids)
            mine = mine if len(mine) else np.arange(1)  # for nothing, but in step with the others
            latents = self.encoded.latents(rung, ids[mine])
            tokens = latents.flatten(2).transpose(1, 2).contiguous()
            states, mask = self.encoded.text(ids[mine])
            batch = grouped(
                self.network,
                moved(tokens, device),
                moved(states, device),
                moved(mask, device),
                (latents.shape[3], latents.shape[2]),
                draw.of(mine).to(device),
            )
            yield Part(batch, share, last=turn == turns[-1])

    def _packed(self, samples: list[tuple[str, np.ndarray]], step: int) -> Iterator[Part]:
        # Largest first, dealt out in turn, so that every part has about as many tokens.
        flat = [(rung, int(i)) for rung, ids in samples for i in ids]
        flat.sort(key=lambda pair: -np.prod(self.encoded.rungs[pair[0]]))
        hidden = [self._hidden(rung, step, number) for number, (rung, _) in enumerate(flat)]
        turns, count = self._turns(len(flat))
        for turn in turns:
            mine = range(turn, len(flat), count)
            share = sum(hidden[n] for n in mine) / sum(hidden)
            pictures = [self._picture(*flat[n], step, n) for n in mine or [0]]
            batch = packed(self.network, pictures, self.place.device)
            yield Part(batch, share, last=turn == turns[-1])

    def _picture(self, rung: str, sample: int, step: int, number: int) -> Picture:
        latents = self.encoded.latents(rung, [sample])
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        states, _ = self.encoded.text([sample])
        draw = draw_for(tokens, self.settings, self._generator(step, number))
        return Picture(tokens, states, (latents.shape[3], latents.shape[2]), draw)

    def _hidden(self, rung: str, step: int, number: int) -> int:
        """How many tokens of a picture of the batch are hidden."""
        generator = self._generator(step, number)
        return hidden_count(self._tokens(rung), self.settings, generator)[1]

    def _tokens(self, rung: str) -> int:
        patch = self.encoded.tokenizer().patch
        width, height = self.encoded.rungs[rung]
        return (width // patch) * (height // patch)

    def _generator(self, *purpose: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, *purpose])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
