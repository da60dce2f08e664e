"""The critic network: a ResNet-18 with one output, its training and its scores (paper, 3.2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.errors import UserError
from components.files import atomic_file, read_json, write_json
from components.processes import one_thread
from components.progress import Progress

IMAGENET = "timm/resnet18.a1_in1k"


class CornerConv(nn.Conv2d):
    """A 3×3 convolution with padding 1 that passes over the padding where its output is one place.

    So it is in the last stage at 32 px, where 8 of 9 products are with zeros: without them a
    training step takes half the time. The same values and gradients up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, out channels, …)."""
        h, w = x.shape[2:]
        if h > self.stride[0] or w > self.stride[1]:
            return super().forward(x)
        kernel = self.weight[:, :, 1 : 1 + h, 1 : 1 + w]
        return F.linear(x.flatten(1), kernel.flatten(1))[:, :, None, None]


@dataclass(frozen=True)
class Learned:
    """A trained critic, where its weights came from, in words, the mean loss of each epoch.

    held: its scores (m,) of the pictures held out.
    """

    network: nn.Module
    started: str
    losses: list[float]
    held: np.ndarray


def build(seed: int) -> nn.Module:
    """A ResNet-18 with random weights and one logit, made the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model("resnet18", pretrained=False, num_classes=1)
    for block in network.get_submodule("layer4").children():
        for name in ("conv1", "conv2"):
            conv = getattr(block, name)
            corner = CornerConv(
                conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, device="meta"
            )
            corner.weight = conv.weight
            setattr(block, name, corner)
    return network


def start(previous: Path | None, seed: int) -> tuple[nn.Module, str]:
    """The network to train on and where its weights come from, in words.

    From the previous round's critic if it has weights, else from ImageNet weights if they
    are in the local Hugging Face cache (the network is never asked), else from scratch.
    """
    if previous is not None and (Path(previous) / "critic.safetensors").is_file():
        return load(previous), "previous critic"
    from huggingface_hub import try_to_load_from_cache

    network = build(seed)
    cached = try_to_load_from_cache(IMAGENET, "model.safetensors")
    if isinstance(cached, str):
        weights = {k: v for k, v in load_file(cached).items() if not k.startswith("fc.")}
        network.load_state_dict(weights, strict=False)
        return network, f"ImageNet weights {IMAGENET} from the local cache"
    return network, "scratch (ImageNet weights are not in the local cache)"


def save(folder: Path, network: nn.Module, config: Mapping[str, Any]) -> None:
    """Write critic.safetensors and config.json."""
    weights = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
    with atomic_file(folder / "critic.safetensors") as temporary:
        save_file(weights, temporary)
    write_json(folder / "config.json", dict(config))


def load(folder: Path) -> nn.Module:
    """Read a critic's network, on the CPU. UserError when it does not fit."""
    path = Path(folder) / "critic.safetensors"
    network = build(0)
    try:
        network.load_state_dict(load_file(path))
    except Exception as problem:
        architecture = read_json(path.parent / "config.json").get("architecture", "unknown")
        raise UserError(
            f"{path} holds no ResNet-18 with one output (config.json says {architecture}); "
            "run the critic stage of that round again."
        ) from problem
    return network


def augment(pixels: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Random resized crop and horizontal flip, one draw a picture.

    pixels (B, 3, s, s); the crop keeps a share of the area between `least` and 1, with an
    aspect ratio between 3/4 and 4/3 (the usual ImageNet augmentation).
    """
    b = len(pixels)
    area = torch.empty(b).uniform_(least, 1.0, generator=generator)
    aspect = torch.empty(b).uniform_(-0.2877, 0.2877, generator=generator).exp()
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x = (torch.rand(b, generator=generator) * 2 - 1) * (1 - w)
    y = (torch.rand(b, generator=generator) * 2 - 1) * (1 - h)
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = w * flip, x
    theta[:, 1, 1], theta[:, 1, 2] = h, y
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def normalise(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 (B, s, s, 3) to float32 (B, 3, s, s) by ImageNet's mean and deviation."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


@one_thread()
def train(
    network: nn.Module,
    pixels: np.ndarray,
    labels: np.ndarray,
    settings: Mapping[str, Any],
    seed: int,
    name: str = "critic",
) -> list[float]:
    """Train in place by binary cross-entropy; returns the mean loss of each epoch.

    On the GPU if there is one, and the network stays there.

    pixels uint8 (m, s, s, 3), labels (m,) bool. The ordinary ImageNet recipe: random resized
    crops and flips, warm-up, cosine; AdamW, as the few steps of a small run learn nothing with
    plain SGD. `settings`: epochs, batch, lr (at that batch), weight_decay, crop (least share
    of the area).
    """
    device = _device()
    network.to(device)
    generator = torch.Generator().manual_seed(seed)
    m, batch, epochs = len(pixels), int(settings["batch"]), int(settings["epochs"])
    steps = max(1, m // batch)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=float(settings["lr"]),
        weight_decay=float(settings["weight_decay"]),
        fused=True,  # a fifth of the time of one operation after the other
    )
    total = epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(6 * (i + 1) / total, 0.5 + 0.5 * float(np.cos(np.pi * i / total))),
    )
    targets = torch.from_numpy(np.asarray(labels, np.float32)).to(device)
    progress, losses = Progress(name, total, "steps"), []
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(m, generator=generator).numpy()
        seen = []
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            x = augment(normalise(pixels[rows]), float(settings["crop"]), generator).to(device)
            loss = F.binary_cross_entropy_with_logits(network(x)[:, 0], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seen.append(loss.item())
            progress.at(epoch * steps + step + 1, f"loss {loss.item():.3f}")
        losses.append(float(np.mean(seen)))
    network.eval()
    return losses


def learner(
    pixels: np.ndarray,
    labels: np.ndarray,
    previous: Path | None,
    settings: Mapping[str, Any],
    seed: int,
) -> Callable[[tuple[str, np.ndarray, np.ndarray]], Learned]:
    """Make the function that trains a critic on some labelled pictures and scores others.

    Its argument is (what progress calls it, places to learn from, places held out) among
    pixels (m, s, s, 3) and labels (m,); the others as in `start` and `train`. For
    `processes.spread`.
    """

    def learn(part: tuple[str, np.ndarray, np.ndarray]) -> Learned:
        name, places, out = part
        network, started = start(previous, seed)
        losses = train(network, pixels[places], labels[places], settings, seed, name)
        return Learned(network.cpu(), started, losses, score(network, pixels[out]))

    return learn


@one_thread()
@torch.inference_mode()
def score(network: nn.Module, pixels: np.ndarray, batch: int = 256) -> np.ndarray:
    """Probabilities (m,) float32 of the positive class for pixels uint8 (m, s, s, 3).

    On the GPU if there is one.
    """
    device = _device()
    # Half again as fast in this layout on a CPU; training is not.
    network.eval().to(memory_format=torch.channels_last).to(device)
    parts = [
        torch.sigmoid(network(normalise(pixels[i : i + batch]).to(device))[:, 0]).cpu().numpy()
        for i in range(0, len(pixels), batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
