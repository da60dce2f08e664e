"""The optimisation of preferences itself: loss, steps, checks on held-out pairs, snapshots.

The error is the flow head's over the hidden tokens (Diffusion-DPO's loss with the velocity
error), with the same mask, order, t and noise for winner, loser, model and reference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.errors import UserError
from components.evaluation.statistics import spreads
from components.feedback.pair_set import PairSet
from components.files import atomic_folder, read_json, write_json
from components.progress import Progress
from components.tracking import Tracker
from components.training.draw import Draw
from components.training.policy import Policy


def dpo_loss(
    winner: Tensor, loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss, scalar, and the inside of its sigmoid (B,), from the flow errors (B,) of each.

    L = −E log σ(−(β/2)·[(e_θ^w − e_θ^l) − (e_ref^w − e_ref^l)]) (Diffusion-DPO, eq. 14, with
    the velocity error). Positive inside: the model prefers the winner more than the
    reference does.
    """
    inside = -(beta / 2) * ((winner - loser) - (reference_winner - reference_loser))
    return -F.logsigmoid(inside).mean(), inside


class Tuning:
    """Trains a policy on pairs until the steps are done or a check stops it.

    Every random number follows from the seed and the step, so a run that goes on from a
    snapshot ends with the same weights.
    """

    def __init__(
        self,
        policy: Policy,
        pairs: PairSet,
        params: dict[str, Any],
        snapshot: Path,
        tracker: Tracker,
    ) -> None:
        self.policy, self.pairs = policy, pairs
        self.snapshot, self.tracker = snapshot, tracker
        self.settings, self.training = params["dpo"], params["training"]
        self.seed = int(params["seed"])
        self.optimizer = torch.optim.AdamW(
            policy.parameters, lr=float(self.settings["lr"]), weight_decay=0.0
        )
        self.train_rows = np.flatnonzero(~pairs.held_out)
        self.check_rows = np.flatnonzero(pairs.held_out)
        self.step, self.kept_step = 0, 0
        self.kept = policy.weights()
        self.history: list[dict[str, float]] = []
        self.fixed: list[tuple[Tensor, Tensor]] = []  # the reference's errors in the checks
        self.stopped = ""

    def run(self) -> dict[str, Any]:
        """Train until the steps are done or a check stops it; leaves the best weights in `kept`."""
        if self.snapshot.exists():
            self._load()
        steps, every = int(self.settings["steps"]), int(self.settings["check_every"])
        progress = Progress("dpo", steps, "steps")
        if not self.history:
            self._check()
        while self.step < steps and not self.stopped:
            loss = self._train_step()
            self.step += 1
            progress.at(self.step, f"loss {loss:.3f}")
            if self.step % every == 0 or self.step == steps:
                self._check()
                self._save()
        first, last = self.history[0], self.history[-1]
        kept = next(h for h in self.history if h["step"] == self.kept_step)
        return {
            "changed": self.kept_step > 0,
            "steps": self.step,
            "kept_step": self.kept_step,
            "stopped": self.stopped or "all steps done",
            "loss": kept["loss"],
            "accuracy": kept["accuracy"],
            "accuracy_low": kept["accuracy_low"],
            "accuracy_high": kept["accuracy_high"],
            "margin": kept["margin"],
            "winner_flow": {
                "before": first["winner"],
                "kept": kept["winner"],
                "last": last["winner"],
            },
            "parameters": sum(p.numel() for p in self.policy.network.parameters()),  # adapter too
            "trained_parameters": sum(p.numel() for p in self.policy.parameters),
            "history": self.history,
        }

    def _train_step(self) -> float:
        settings, batch = self.settings, min(int(self.settings["batch"]), len(self.train_rows))
        per_epoch = len(self.train_rows) // batch
        epoch, place = divmod(self.step, per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.train_rows)
        rows = order[place * batch : (place + 1) * batch]
        left = 1 - self.step / int(settings["steps"])
        rate = float(settings["lr"]) * min(left, (self.step + 1) / int(settings["warmup"]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draw = self.pairs.draw(rows, self.training, self.seed, 2, self.step)
        reference = self._reference(rows, draw)
        errors = self.pairs.errors(self.policy.network, rows, draw)
        loss, _ = dpo_loss(*errors, *reference, float(settings["beta"]))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters, 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _reference(self, rows: np.ndarray, draw: Draw) -> tuple[Tensor, Tensor]:
        with self.policy.reference() as network:
            return self.pairs.errors(network, rows, draw)

    @torch.no_grad()
    def _check(self) -> None:
        """Measure on the held-out pairs, always on the same draws; keep the weights or stop."""
        inside, winners = [], []
        for repeat in range(int(self.settings["check_draws"])):
            draw = self.pairs.draw(self.check_rows, self.training, self.seed, 3, repeat)
            mine = self.pairs.errors(self.policy.network, self.check_rows, draw)
            if len(self.fixed) <= repeat:
                self.fixed.append(self._reference(self.check_rows, draw))
            reference = self.fixed[repeat]
            inside.append(dpo_loss(*mine, *reference, float(self.settings["beta"]))[1])
            winners.append(mine[0])
        # A pair's preference is that over all draws, as an expectation over t and noise.
        mean = torch.stack(inside).mean(dim=0)
        prompts = [self.pairs.prompts[row] for row in self.check_rows]
        hits, resamples = [(mean > 0).tolist()], int(self.settings["bootstrap"])
        (spread,) = spreads(hits, ["all"] * len(prompts), prompts, resamples, self.seed)
        entry = {
            "step": self.step,
            "loss": float(-F.logsigmoid(mean).mean()),
            "accuracy": float((mean > 0).float().mean()),
            "margin": float(mean.mean()),
            "winner": float(torch.stack(winners).mean()),
            "accuracy_low": spread.low,
            "accuracy_high": spread.high,
        }
        self.history.append(entry)
        self.tracker.log_metrics(
            {f"dpo/{k}": v for k, v in entry.items() if k != "step"}, step=self.step
        )
        rise = entry["winner"] / self.history[0]["winner"] - 1
        if not np.isfinite(entry["loss"]) or rise > float(self.settings["winner_rise"]):
            self.stopped = f"winners' flow loss rose by {100 * rise:.1f} % at step {self.step}"
            return
        best = next(h["loss"] for h in self.history if h["step"] == self.kept_step)
        if self.step and entry["loss"] < best:
            self.kept, self.kept_step = self.policy.weights(), self.step
        reached = [h["accuracy"] for h in self.history]
        patience = int(self.settings["patience"])
        if self.step and entry["accuracy"] >= float(self.settings["enough"]):
            self.stopped = f"accuracy on held-out pairs reached {entry['accuracy']:.2f}"
        elif len(reached) - 1 - int(np.argmax(reached)) >= patience:
            best_at = self.history[int(np.argmax(reached))]["step"]
            self.stopped = (
                f"accuracy on held-out pairs did not rise above {max(reached):.2f} of step "
                f"{best_at} in {patience} checks"
            )

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.policy.weights().items()}
        tensors |= {f"kept.{k}": v for k, v in self.kept.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v.cpu().contiguous() for k, v in state.items()}
        with atomic_folder(self.snapshot) as folder:
            save_file(tensors, folder / "tensors.safetensors")
            progress = {
                key: getattr(self, key) for key in ("step", "kept_step", "history", "stopped")
            }
            write_json(folder / "progress.json", progress)

    def _load(self) -> None:
        tensors = load_file(self.snapshot / "tensors.safetensors")
        try:
            self.policy.load(_under("model.", tensors))
        except (RuntimeError, KeyError) as problem:
            raise UserError(
                f"{self.snapshot} is of another model; delete it to start the tuning again."
            ) from problem
        self.kept = _under("kept.", tensors)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for key, value in read_json(self.snapshot / "progress.json").items():
            setattr(self, key, value)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
