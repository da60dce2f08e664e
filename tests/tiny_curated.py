"""A tiny curated set and parameters, for the tests of tokens and training."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from components.model.djepa import DJEPAConfig

CAPTIONS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 150, 60)}


def write_curated(folder: Path, count: int = 36) -> Path:
    """Discs on grey in two aspects, 72x72 and 72x54 pixels, in two shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(count // 2):
                key = f"{shard:05d}{number:04d}"
                color = list(CAPTIONS)[number % 3]
                width, height = (72, 72) if number % 2 else (72, 54)
                y, x = np.mgrid[:height, :width]
                center = rng.uniform(20, 34, 2)
                disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 < rng.uniform(8, 16) ** 2
                pixels = np.where(disc[..., None], CAPTIONS[color], rng.integers(110, 150))
                file = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
                for name, data in (
                    (f"{key}.png", file.getvalue()),
                    (f"{key}.txt", f"a photo of a {color} circle".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                rows.append(
                    {
                        "key": key,
                        "shard": f"{shard:05d}",
                        "caption": f"a photo of a {color} circle",
                        "width": width,
                        "height": height,
                        **{f"notion_{name}": name == color for name in CAPTIONS},
                        "notion_words": [color, "circle"],
                        "source": "studio" if number % 4 else "street",
                    }
                )
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet", index=False)
    notions = {"notion": list(CAPTIONS), "kind": ["colour"] * len(CAPTIONS)}
    pd.DataFrame(notions).to_parquet(folder / "notions.parquet", index=False)
    return folder


def tiny_config(channels: int, text_width: int) -> DJEPAConfig:
    return DJEPAConfig(
        channels=channels,
        text_width=text_width,
        width=16,
        heads=2,
        mlp_ratio=2.0,
        buffer_tokens=0,
        positions="vope",
        reference_grid=8.0,
        rope_base=100.0,
        encoder_blocks=1,
        predictor_blocks=1,
        head_width=16,
        head_blocks=1,
    )


def tiny_params() -> dict[str, Any]:
    return {
        "seed": 0,
        "data": {"encode": "cached"},
        "init": {"model": "none"},
        "model": {
            "network": {
                "kind": "djepa",
                "buffer_tokens": 0,
                "positions": "vope",
                "width": 16,
                "heads": 2,
                "encoder_blocks": 1,
                "predictor_blocks": 1,
                "mlp_ratio": 2,
                "head_width": 16,
                "head_blocks": 1,
                "reference_grid": 8,
                "rope_base": 100.0,
            },
            "tokenizer": {"kind": "patches", "patch": 4, "channels": 12},
            "text": {"kind": "words", "length": 16, "width": 24},
            "encode": {
                "most_cropped": 0.1,
                "batch_pixels": 65536,
                "captions": 128,
                "decoded": 100,
            },
        },
        "training": {
            "workers": 2,
            "accumulate": 1,
            "sharding": "replicate",
            "precision": "float32",
            "checkpointing": "none",
            "compile": False,
            "mask": {"mean": 1.0, "std": 0.25, "low": 0.5, "high": 1.0},
            "most_tokens": 4096,
            "flow_samples": 2,
            "time": {"distribution": "logit_normal", "mean": 0.0, "std": 1.0},
            "text_drop": 0.2,
            "jepa_weight": 1.0,
            "jepa_beta": 2.0,
            "ema": 0.9,
            "target_ema": 0.9,
            "clip": 5.0,
            "optimizer": {
                "kind": "muon",
                "muon_rate": 0.02,
                "muon_momentum": 0.95,
                "muon_decay": 0.01,
                "adam_rate": 0.003,
                "adam_betas": [0.9, 0.95],
                "adam_decay": 0.0,
            },
            "batches": "grouped",
            "schedule": {"shape": "linear", "warmup": 0.1, "decay": 0.3, "last": 0.0},
            "snapshot_seconds": 3600,
            "lines": 4,
            "grids": 1,
            "validation": {"pictures": 0, "most": 0.5, "points": 4, "times": 4, "seed": 0},
            "phase1": {
                "images": 96,
                "batch": 8,
                "rungs": ["24x24", "24x16"],
                "size": {"mean": 24, "std": 4, "low": 20, "high": 24},
                "aspect": {"mean": 0.3, "std": 0.3, "low": 0, "high": 0.6},
            },
            "phase2": {
                "images": 48,
                "batch": 8,
                "rungs": ["24x24", "32x32", "32x24"],
                "size": {"mean": 28, "std": 4, "low": 24, "high": 32},
                "aspect": {"mean": 0, "std": 0.3, "low": -0.6, "high": 0.6},
            },
        },
        "feedback": {
            "sampling": "statistical",
            "coin": "sample",
            "discard": 0.5,
            "targets": {"notion": 0.0},
            "tolerance": 0.1,
            "most_dropped": 0.9,
        },
        "plan": {"caption_tokens": 4, "tokenizers": {}, "text_widths": {}},
        "evaluation": {
            "size": "24x24",
            "sampler": {
                "autoregressive_steps": 3,
                "num_inference_steps": 2,
                "guidance_scale": 2.0,
                "temperature": 0.9,
                "time_shift": 1.0,
            },
        },
    }
