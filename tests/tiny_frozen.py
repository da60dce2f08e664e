"""Small random-weight models in the very formats of the real ones."""

from pathlib import Path

import torch


def write_vae(folder: Path, seed: int = 0, **changes) -> Path:
    """An AutoencoderKL of SD3's layout, stride 8 and 16 channels, some 90k parameters."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    AutoencoderKL(**config | changes).save_pretrained(folder)
    return folder


def write_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 encoder, 24 wide, and its unigram vocabulary in SD3's two subfolders."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(seed)
    words = ["▁a", "▁photo", "▁of", "▁red", "▁blue", "▁green", "▁circle"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocabulary += [(word, -3.0) for word in words]
    vocabulary += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return folder


def vae_settings(folder: Path, **changes) -> dict:
    """`params.model.tokenizer` for a folder that `write_vae` wrote."""
    settings = {"kind": "sd3", "id": str(folder), "revision": "main", "subfolder": "", "tile": 128}
    return settings | changes


def t5_settings(folder: Path, **changes) -> dict:
    """`params.model.text` for a folder that `write_t5` wrote."""
    settings = {
        "kind": "t5",
        "length": 256,
        "id": str(folder),
        "revision": "main",
        "subfolder": "text_encoder_3",
        "tokenizer_subfolder": "tokenizer_3",
        "precision": "float32",
    }
    return settings | changes
