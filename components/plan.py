"""`djepa plan`: what a scale costs before anything is trained.

Parameters are counted on the meta device; operations by the formulas of components/model/flops.py;
what a step keeps for its backward pass by running it on tensors that have a shape and no memory.
The frozen encoders are left out of operations and memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from components.activations import saved_bytes
from components.errors import UserError
from components.feedback.sizes import TargetRungs
from components.model import flops
from components.model.build import build_network
from components.model.djepa import DJEPA
from components.model.network import Network
from components.model.sampler import SamplerConfig
from components.tokens.encoded import rung_size
from components.training.optim import Muon, optimizers

GIB = 2**30
DEPTHS = {"djepa": ("encoder_blocks", "predictor_blocks", "head_blocks"), "flow_dit": ("blocks",)}


def plan(params: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Everything `djepa plan --json` prints.

    Args:
        params: the whole tree.
        gpus: how many share a batch.

    Raises:
        UserError: settings that no network, tokeniser or rung fits.
    """
    channels, patch, text_width = widths(params)
    with torch.device("meta"):
        network = build_network(params["model"]["network"], channels, text_width, 0)
    assumed, training = params["plan"], params["training"]
    text = float(assumed["caption_tokens"])
    peak = gpus * float(assumed["peak_flops"]) * float(assumed["utilisation"])
    phases = {}
    for name, phase in phases_of(params).items():
        shares = rung_shares(phase)
        cost = sum(
            share * image_flops(network, training, text, tokens_of(rung, patch))
            for rung, share in shares.items()
        )
        images = int(phase["images"])
        phases[name] = {
            "images": images,
            "flops_per_image": cost,
            "images_per_second": peak / cost,
            "days": images * cost / peak / 86400,
        }
    sampler = SamplerConfig.from_params(params)
    drawn = tokens_of(assumed["draw"], patch)
    width, height = rung_size(assumed["draw"])
    return {
        "scale": params["scale"],
        "gpus": gpus,
        "parameters": parameters(network),
        "train": phases,
        "days": sum(phase["days"] for phase in phases.values()),
        "draw": {
            "size": f"{width}x{height}",
            "tokens": drawn,
            "flops_per_picture": flops.drawn_picture(network, text, drawn, sampler),
        },
        "memory": memory(params, gpus),
        "cache": cache(params, channels, patch, text_width),
        "assumed": dict(assumed),
    }


def phases_of(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Phase 1, then phase 2 as each round has it."""
    training = params["training"]
    rounds = params["feedback"]["rounds"].items()
    later = {key: training["phase2"] | line.get("phase2", {}) for key, line in rounds}
    return {"phase1": training["phase1"], **later}


def widths(params: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels a token, pixels a token's side and width of a text state, by the parameters."""
    model, assumed = params["model"], params["plan"]
    tokenizer = assumed["tokenizers"].get(model["tokenizer"]["kind"], model["tokenizer"])
    width = assumed["text_widths"].get(model["text"]["kind"], model["text"].get("width"))
    return int(tokenizer["channels"]), int(tokenizer["patch"]), int(width)


def tokens_of(size: str, patch: int) -> int:
    """Image tokens of a size such as 32x24, in pixels."""
    width, height = rung_size(size)
    return math.ceil(width / patch) * math.ceil(height / patch)


def parameters(network: Network) -> dict[str, int]:
    """Trained parameters by part, their total, and those of the target encoder beside."""
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()
    }
    total = sum(p.numel() for p in network.parameters())
    return {"total": total, **counts, "target_encoder": _target_size(network)}


def _target_size(network: Network) -> int:
    return sum(p.numel() for p in network.encoder.parameters()) if isinstance(network, DJEPA) else 0


def hidden_share(mask: Mapping[str, float]) -> float:
    """Mean of the truncated normal that hides tokens."""
    from scipy.stats import truncnorm  # half a second that a training stage can do without

    mean, std, low, high = (float(mask[key]) for key in ("mean", "std", "low", "high"))
    if std == 0 or low == high:
        return min(max(mean, low), high)
    return float(truncnorm.mean((low - mean) / std, (high - mean) / std, loc=mean, scale=std))


def image_flops(network: Network, training: Mapping[str, Any], text: float, tokens: float) -> float:
    """A training image of so many tokens, at the mean share of hidden ones."""
    tokens = min(tokens, float(training["most_tokens"]))
    hidden = hidden_share(training["mask"]) * tokens
    draws, jepa = int(training["flow_samples"]), float(training["jepa_weight"]) > 0
    return flops.train_image(network, text, tokens, hidden, draws, jepa)


def rung_shares(phase: Mapping[str, Any]) -> dict[str, float]:
    """How often each rung of a phase is drawn."""
    names = list(phase["rungs"])
    law = TargetRungs([rung_size(name) for name in names], phase["size"], phase["aspect"])
    return dict(zip(names, law.shares().tolist(), strict=True))


def activation_bytes(params: Mapping[str, Any], phase: Mapping[str, Any]) -> int:
    """Bytes a picture of the phase's largest rung keeps for the backward pass.

    Blocks of one kind keep alike, so shallow networks tell what deep ones keep. With activation
    checkpointing a block keeps its input only, and one block at a time the rest.
    """
    channels, patch, text_width = widths(params)
    training = dict(params["training"])
    # The share of hidden tokens is that of the mean, not drawn.
    share = hidden_share(training["mask"])
    training["mask"] = {"mean": share, "std": 0.0, "low": 0.0, "high": 1.0}
    width, height = largest_rung(phase)
    side = (math.ceil(width / patch), math.ceil(height / patch))
    text = int(params["plan"]["caption_tokens"])
    settings = dict(params["model"]["network"])
    depths = DEPTHS[settings["kind"]]

    def kept(checkpointing: str, **changes: int) -> int:
        shallow = settings | dict.fromkeys(depths, 2) | changes
        chosen = training | {"checkpointing": checkpointing}
        return saved_bytes(shallow, chosen, (channels, text_width), text, side)

    def each(checkpointing: str) -> tuple[int, dict[str, int]]:
        least = kept(checkpointing)
        return least, {name: kept(checkpointing, **{name: 3}) - least for name in depths}

    least, more = each(training["checkpointing"])
    total = least + sum(more[name] * (int(settings[name]) - 2) for name in depths)
    if training["checkpointing"] == "none":
        return total
    _, whole = each("none")
    return total + max(whole[name] for name in depths if name != "head_blocks")


def fixed_bytes(params: Mapping[str, Any], gpus: int) -> dict[str, int]:
    """Bytes on each GPU by part, whatever the batch.

    Under `shard` (FSDP2) weights, gradients, averages and the optimiser's state are divided among
    the GPUs; two blocks' weights are gathered at a time.
    """
    channels, _, text_width = widths(params)
    training = params["training"]
    with torch.device("meta"):
        network = build_network(params["model"]["network"], channels, text_width, 0)
    count = sum(p.numel() for p in network.parameters())
    jepa = float(training["jepa_weight"]) > 0
    fixed = {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": optimizer_bytes(network, training["optimizer"]),
        "ema": 4 * count,
        "target_encoder": 4 * _target_size(network) if jepa else 0,
    }
    half = training["precision"] == "bfloat16"
    if training["sharding"] == "shard":
        fixed = {name: size // gpus for name, size in fixed.items()}
        fixed["gathered"] = 2 * (2 if half else 4) * max(_block_sizes(network))
    elif half:
        fixed["gathered"] = 2 * count  # autocast's copies of the weights
    return fixed


def memory(params: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Bytes on each GPU by part, for the phase that needs most, and what batch would fit."""
    training, patch = params["training"], widths(params)[1]
    fixed = fixed_bytes(params, gpus)
    together = _gradients_stay(training, gpus)
    result: dict[str, Any] = {"sharding": training["sharding"], "per_gpu": {}, "phases": {}}
    available = int(float(params["plan"]["memory"]) * GIB)
    for name, phase in phases_of(params).items():
        images = phase_batch(phase, int(training["most_tokens"]) * patch**2)
        mine = _at_once(images, training, gpus)
        each = activation_bytes(params, phase)
        result["phases"][name] = {
            "images_at_once": mine,  # on each GPU
            "activations_per_image": each,
            "activations": mine * each,
            "total": peak_bytes(fixed, mine * each, together),
            "images_that_fit": _fitting(fixed, each, available, together),
            "accumulate_that_fits": _parts(fixed, each, available, math.ceil(images / gpus)),
        }
    worst = max(result["phases"].values(), key=lambda entry: entry["total"])
    result["per_gpu"] = fixed | {"activations": worst["activations"], "total": worst["total"]}
    return result


def peak_bytes(fixed: Mapping[str, int], activations: int, gradients_stay: bool) -> int:
    """The most that is held at once, of `fixed_bytes` and a batch's activations.

    A backward pass makes gradients as it frees activations and the weights' copies, so the most is
    held where it begins or where it ends; unless the gradients stay from step to step.
    """
    copies, gradients = fixed.get("gathered", 0), fixed["gradients"]
    rest = sum(fixed.values()) - copies - gradients
    if gradients_stay:
        return rest + gradients + copies + activations
    return rest + max(copies + activations, gradients)


def _gradients_stay(training: Mapping[str, Any], processes: int) -> bool:
    """From step to step in DDP's buckets, or from one part of a batch to the next."""
    replicated = processes > 1 and training["sharding"] == "replicate"
    return replicated or int(training["accumulate"]) > 1


def _at_once(images: int, training: Mapping[str, Any], processes: int) -> int:
    """Of a batch of so many images, those that each process goes through at once."""
    return math.ceil(images / (processes * int(training["accumulate"])))


def _fitting(fixed: Mapping[str, int], each: int, available: int, gradients_stay: bool) -> int:
    """How many pictures of so many bytes each fit beside what is fixed."""
    if peak_bytes(fixed, 0, gradients_stay) > available:
        return 0
    held = sum(fixed.values()) - (0 if gradients_stay else fixed["gradients"])
    return (available - held) // each


def _parts(fixed: Mapping[str, int], each: int, available: int, images: int) -> int:
    """In how many parts a process's batch of so many images fits; 0: in none.

    The gradients of the parts before stay.
    """
    most = _fitting(fixed, each, available, gradients_stay=True)
    return math.ceil(images / most) if most else 0


def check_memory(params: Mapping[str, Any], phase: str, processes: int, available: int) -> None:
    """Refuse a phase that cannot fit, before it starts, and say what would.

    Args:
        params: the whole tree.
        phase: phase1 or phase2.
        processes: that share a batch, each with `available` bytes of its own.
        available: bytes that one process may take.

    Raises:
        UserError: weights, optimiser and averages, or they and a batch's activations, need more.
    """
    training, patch = params["training"], widths(params)[1]
    budget = training[phase]
    fixed = fixed_bytes(params, processes)
    together = _gradients_stay(training, processes)
    alone = peak_bytes(fixed, 0, together)
    fitting = "a smaller model (model=NAME), training.sharding=shard over more GPUs"
    if alone > available:
        raise UserError(
            f"{phase} needs {alone / GIB:.3g} GiB for weights, gradients, optimiser and averages "
            f"alone, and {available / GIB:.3g} are free: take {fitting}, or another machine; "
            "`djepa plan` says what each needs."
        )
    images = phase_batch(budget, int(training["most_tokens"]) * patch**2)
    mine = _at_once(images, training, processes)
    settings = params["model"]["network"]
    depth = sum(int(settings[name]) for name in DEPTHS[settings["kind"]])
    tokens = min(math.prod(largest_rung(budget)) / patch**2, training["most_tokens"])
    # Some 60 numbers a token, channel and block: only near the limit is the exact count needed,
    # which takes seconds.
    if alone + mine * tokens * int(settings["width"]) * depth * 240 < available / 2:
        return
    each = activation_bytes(params, budget)
    total = peak_bytes(fixed, mine * each, together)
    if total <= available:
        return
    ways = []
    if parts := _parts(fixed, each, available, math.ceil(images / processes)):
        ways.append(f"training.accumulate={parts}")
    if at_once := _fitting(fixed, each, available, together):
        most = at_once * processes * int(training["accumulate"])
        ways.append(f"training.{phase}.batch={most * int(budget['batch']) // images}")
    fit = f"{' or '.join(ways)} fits" if ways else f"take {fitting}"
    raise UserError(
        f"{phase} needs {total / GIB:.3g} GiB a process with "
        f"training.{phase}.batch={budget['batch']}, and {available / GIB:.3g} are free: "
        f"{fit}; training.checkpointing=blocks needs less."
    )


def largest_rung(phase: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height, px, of the largest rung that the phase's sizes ever draw."""
    drawn = [rung_size(name) for name, share in rung_shares(phase).items() if share > 1e-9]
    return max(drawn, key=math.prod)


def phase_batch(phase: Mapping[str, Any], most_area: float) -> int:
    """Images of a batch at the phase's largest rung: larger pictures come in smaller batches.

    most_area: px of a picture that are trained on.
    """
    first = min(math.prod(rung_size(phase["rungs"][0])), most_area)
    return max(
        1, round(int(phase["batch"]) * first / min(math.prod(largest_rung(phase)), most_area))
    )


def optimizer_bytes(network: Network, settings: Mapping[str, Any]) -> int:
    """Two moments a parameter for AdamW, one for Muon."""
    total = 0
    for optimizer in optimizers(network, dict(settings)):
        moments = 1 if isinstance(optimizer, Muon) else 2
        total += sum(4 * moments * p.numel() for g in optimizer.param_groups for p in g["params"])
    return total


def _block_sizes(network: nn.Module) -> list[int]:
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    return [sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks]


def cache(params: Mapping[str, Any], channels: int, patch: int, text_width: int) -> dict[str, Any]:
    """Bytes of cached latents and text states, bfloat16, were every picture in every rung."""
    assumed = params["plan"]
    samples = assumed["samples"] or params["data"]["raw"]["pictures"]
    training = params["training"]
    rungs = {name for phase in ("phase1", "phase2") for name in training[phase]["rungs"]}
    latents = sum(2 * channels * tokens_of(name, patch) for name in rungs)
    text = 2 * text_width * int(assumed["caption_tokens"])
    return {
        "samples": int(samples),
        "rungs": len(rungs),
        "latents_per_sample": latents,
        "text_per_sample": text,
        "total": int(samples) * (latents + text),
        "encode": params["data"]["encode"],
    }


def text(found: Mapping[str, Any]) -> str:
    """A plan as a person reads it."""
    memory, draw, cached = found["memory"], found["draw"], found["cache"]
    lines = [f"scale {found['scale']} on {found['gpus']} GPU(s)", "", "parameters, millions"]
    lines += [f"  {name:<16}{count / 1e6:12.2f}" for name, count in found["parameters"].items()]
    lines += ["", "training           images   GFLOP/image    images/s       days"]
    for name, phase in found["train"].items():
        lines.append(
            f"  {name:<12}{phase['images']:12,}{phase['flops_per_image'] / 1e9:14.2f}"
            f"{phase['images_per_second']:12.1f}{phase['days']:11.2f}"
        )
    assumed = found["assumed"]
    lines += [
        f"  at {assumed['utilisation']:.0%} of {assumed['peak_flops'] / 1e12:.3g} TFLOP/s a GPU, "
        f"captions of {assumed['caption_tokens']} tokens",
        "",
        f"a picture of {draw['size']} px, {draw['tokens']} tokens: "
        f"{draw['flops_per_picture'] / 1e9:.2f} GFLOP",
        "",
        f"memory a GPU, GiB ({memory['sharding']})",
    ]
    lines += [f"  {name:<16}{size / GIB:12.3f}" for name, size in memory["per_gpu"].items()]
    for name, phase in memory["phases"].items():
        line = (
            f"  {name}: {phase['images_at_once']} images of the largest size at once; "
            f"{assumed['memory']} GiB hold {phase['images_that_fit']}"
        )
        if phase["images_at_once"] > phase["images_that_fit"] and phase["accumulate_that_fits"]:
            line += f"; training.accumulate={phase['accumulate_that_fits']} fits"
        lines.append(line)
    online = cached["encode"] == "online"
    lines += [
        "",
        f"cache of {cached['samples']:,} samples in {cached['rungs']} sizes: "
        f"{cached['total'] / GIB:,.2f} GiB (text {cached['text_per_sample'] / 1024:.1f} KiB, "
        f"latents {cached['latents_per_sample'] / 1024:.1f} KiB a sample); "
        + ("not kept: data.encode is online" if online else "data.encode=online keeps none"),
    ]
    return "\n".join(lines)
