"""Frozen parts of the real model: the loading code on small models saved in the same formats."""

import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from benchmarks.tiles import measure
from components.errors import UserError
from components.feedback import describe
from components.tokens import weights
from components.tokens.text import TextEncoder
from components.tokens.tokenizer import ImageTokenizer
from tests.tiny_frozen import t5_settings, vae_settings, write_t5, write_vae


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def vae(vae_folder):
    return ImageTokenizer.from_config(vae_settings(vae_folder))


def by_hand(vae_folder, images, shift=0.0609, scaling=1.5305):
    """Posterior mean through diffusers' own model, 2×2 latents gathered cell by cell."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        moments = model.encoder(images)  # mean and log variance
    latents = (moments[:, :16] - shift) * scaling
    count, _, height, width = latents.shape
    tokens = torch.empty(count, 64, height // 2, width // 2)
    for channel in range(16):
        for dy in range(2):
            for dx in range(2):
                tokens[:, 4 * channel + 2 * dy + dx] = latents[:, channel, dy::2, dx::2]
    return tokens


def pictures(count, height, width, seed=0):
    return (
        torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


def test_vae_tokens_are_shifted_scaled_means_taken_two_by_two(vae, vae_folder):
    assert (vae.patch, vae.channels) == (16, 64)
    images = pictures(3, 48, 32)
    tokens = vae.encode(images)
    assert tokens.shape == (3, 64, 3, 2) and tokens.dtype == torch.float32
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens, by_hand(vae_folder, images))


def test_missing_shift_counts_as_none(tmp_path):
    folder = write_vae(tmp_path / "vae", shift_factor=None)
    tokens = ImageTokenizer.from_config(vae_settings(folder)).encode(pictures(1, 32, 32))
    torch.testing.assert_close(tokens, by_hand(folder, pictures(1, 32, 32), shift=0.0))


def test_decoding_undoes_gathering_and_scaling(vae):
    tokens = torch.randn(2, 64, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.vae.decode(pixel_shuffle(tokens, 2) / 1.5305 + 0.0609).sample
    images = vae.decode(tokens)
    assert images.shape == (2, 3, 32, 48)
    torch.testing.assert_close(images, expected)
    drawn = vae.decode_images(tokens)
    assert [image.size for image in drawn] == [(48, 32)] * 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_two_by_two_gathering_loses_nothing(count, channels, height, width):
    latents = torch.randn(count, channels, 2 * height, 2 * width)
    assert torch.equal(pixel_shuffle(pixel_unshuffle(latents, 2), 2), latents)


def test_batches_of_any_length_give_the_same_tokens(vae_folder):
    vae = ImageTokenizer.from_config(vae_settings(vae_folder, tile=64))
    images = pictures(6, 64, 32)  # more pixels than one tile
    together = vae.encode(images)
    torch.testing.assert_close(together, torch.cat([vae.encode(x[None]) for x in images]))


def test_size_that_is_no_whole_number_of_tokens_is_refused(vae):
    with pytest.raises(UserError, match=r"40x32.*multiples of 16"):
        vae.encode(pictures(1, 32, 40))


def test_bfloat16_weights_give_nearly_the_same_tokens(vae, vae_folder):
    half = ImageTokenizer.from_config(vae_settings(vae_folder)).to(torch.bfloat16)
    images = pictures(2, 32, 32)
    tokens = half.encode(images)
    assert tokens.dtype == torch.float32
    assert (tokens - vae.encode(images)).abs().mean() < 0.05 * vae.encode(images).abs().mean()


def test_small_vae_is_copied_into_the_saved_part(vae, tmp_path):
    source = write_vae(tmp_path / "source")
    tokenizer = ImageTokenizer.from_config(vae_settings(source))
    tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["copied"] and config["id"] == str(source) and config["revision"] == "main"
    shutil.rmtree(source)
    again = ImageTokenizer.from_pretrained(tmp_path / "saved")
    images = pictures(1, 32, 32)
    assert torch.equal(again.encode(images), vae.encode(images))
    again.save_pretrained(tmp_path / "third")  # a model trained on from a saved one
    third = ImageTokenizer.from_pretrained(tmp_path / "third")
    assert torch.equal(third.encode(images), vae.encode(images))


def test_large_vae_is_only_named(vae_folder, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("components.tokens.vae.COPIED_BELOW", 1000)
    vae.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pictures(1, 32, 32)), vae.encode(pictures(1, 32, 32)))


def test_critic_features_come_from_any_tokeniser(vae):
    class Pipe:
        tokenizer = vae

    images = vae.decode_images(torch.randn(2, 64, 2, 2))
    assert describe.encode_images(Pipe, images).shape == (2, 64, 2, 2)


def test_blended_tiles_differ_less_from_the_untiled_decode_than_hard_ones(vae_folder):
    figures = measure(ImageTokenizer.from_config(vae_settings(vae_folder, tile=96)), side=192)
    blended, hard = figures["blended"], figures["four hard tiles"]
    assert 0 < blended["along"] < 0.95 * hard["along"]
    # A hard border stands out from what is around it, a blended one does not.
    assert blended["ratio"] < 1.3 < 1.5 < hard["ratio"]


def test_up_to_the_tiles_size_nothing_is_cut(vae_folder):
    small = ImageTokenizer.from_config(vae_settings(vae_folder, tile=64))
    large = ImageTokenizer.from_config(vae_settings(vae_folder, tile=1024))
    images = pictures(1, 64, 64)
    assert torch.equal(small.encode(images), large.encode(images))
    wide = pictures(1, 64, 144)
    tokens = small.encode(wide)
    assert tokens.shape == (1, 64, 4, 9)
    assert not torch.equal(tokens, large.encode(wide))
    assert small.decode(tokens).shape == wide.shape


def test_tile_that_cuts_a_latent_is_refused(vae_folder):
    with pytest.raises(UserError, match=r"tile is 100.*multiple of 32"):
        ImageTokenizer.from_config(vae_settings(vae_folder, tile=100))


def test_t5_gives_the_last_hidden_states_of_the_real_model(t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = TextEncoder.from_config(t5_settings(t5_folder))
    assert encoder.width == 24
    prompts = ["a photo of a red circle", "zebra", ""]
    states, mask = encoder.encode(prompts)
    assert mask.sum(1).tolist() == [7, 7, 1]  # the end mark included
    assert not states.requires_grad and (states[~mask] == 0).all()
    model = T5EncoderModel.from_pretrained(t5_folder, subfolder="text_encoder_3").eval()
    tokenizer = AutoTokenizer.from_pretrained(t5_folder, subfolder="tokenizer_3")
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states[row, mask[row]], alone, atol=1e-5, rtol=1e-4)


def test_t5_cuts_at_its_length_and_takes_bfloat16(t5_folder):
    encoder = TextEncoder.from_config(t5_settings(t5_folder, length=4, precision="bfloat16"))
    states, mask = encoder.encode(["a photo of a red circle"])
    assert states.shape == (1, 4, 24) and states.dtype == torch.float32 and mask.all()
    full, _ = TextEncoder.from_config(t5_settings(t5_folder, length=4)).encode(
        ["a photo of a red circle"]
    )
    assert (states - full).abs().mean() < 0.05 * full.abs().mean()


def test_t5_is_saved_by_name_and_read_again(t5_folder, tmp_path):
    encoder = TextEncoder.from_config(t5_settings(t5_folder))
    encoder.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id"] == str(t5_folder) and config["revision"] == "main"
    again = TextEncoder.from_pretrained(tmp_path).to("cpu")
    assert torch.equal(again.encode(["a circle"])[0], encoder.encode(["a circle"])[0])


def one_sentence(error, *parts):
    """The refusal is a single line that names what it must."""
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text, text
    for part in parts:
        assert part in text, text


def test_missing_folders_are_said_in_a_sentence(tmp_path):
    nowhere = tmp_path / "deep" / "nowhere"
    with pytest.raises(UserError) as error:
        ImageTokenizer.from_config(vae_settings(nowhere))
    one_sentence(error, str(nowhere), "hf download", "model.tokenizer.id", "tokenizer=patches")
    with pytest.raises(UserError) as error:
        TextEncoder.from_config(t5_settings(nowhere))
    one_sentence(error, str(nowhere), "revision main", "model.text.id", "text=words")


def test_folder_of_another_model_is_said_in_a_sentence(vae_folder, t5_folder):
    t5 = t5_folder / "text_encoder_3"
    with pytest.raises(UserError) as error:
        ImageTokenizer.from_config(vae_settings(t5))
    one_sentence(error, str(t5), "not AutoencoderKL")
    with pytest.raises(UserError) as error:
        settings = t5_settings(vae_folder, subfolder="", tokenizer_subfolder="")
        TextEncoder.from_config(settings)
    one_sentence(error, "AutoencoderKL model, not T5")


@pytest.mark.parametrize("how", ["cut", "shape", "tensor", "config"])
def test_damaged_weights_are_said_in_a_sentence(how, vae_folder, t5_folder, tmp_path, capfd):
    folders = {
        "diffusion_pytorch_model": shutil.copytree(vae_folder, tmp_path / "vae"),
        "model": shutil.copytree(t5_folder, tmp_path / "t5") / "text_encoder_3",
    }
    for name, folder in folders.items():
        path = folder / f"{name}.safetensors"
        tensors = load_file(path)
        if how == "cut":
            path.write_bytes(path.read_bytes()[:2000])
        elif how == "config":
            (folder / "config.json").write_text("{")
        else:
            key = next(k for k in sorted(tensors) if k.endswith("weight"))
            if how == "tensor":
                del tensors[key]
            else:
                tensors[key] = tensors[key][:1].clone()
            save_file(tensors, path, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        ImageTokenizer.from_config(vae_settings(folders["diffusion_pytorch_model"]))
    one_sentence(error, "cannot be loaded", str(tmp_path / "vae"))
    with pytest.raises(UserError) as error:
        TextEncoder.from_config(t5_settings(tmp_path / "t5")).encode(["a"])
    one_sentence(error, "cannot be loaded", str(tmp_path / "t5"))
    assert "initialized" not in capfd.readouterr().err  # the sentence stands alone


def test_unpickled_weights_are_not_taken(vae_folder, tmp_path):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        ImageTokenizer.from_config(vae_settings(folder))


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that takes connections and never answers, and an empty cache."""
    import huggingface_hub.constants as constants
    from huggingface_hub import _snapshot_download

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert _snapshot_download.constants is constants
        server.setblocking(False)
        yield tmp_path / "cache", server


def test_hub_that_does_not_answer_is_given_up_within_seconds(silent_hub, monkeypatch):
    monkeypatch.setattr(weights, "HUB_SECONDS", 1.0)
    place = weights.FrozenWeights("someone/some-vae", "abc123", ("",), "a", "b")
    started = time.monotonic()  # the loading libraries' import takes seconds by itself
    with pytest.raises(UserError):
        place.folder()
    assert time.monotonic() - started < 20
    with pytest.raises(UserError) as error:
        ImageTokenizer.from_config(vae_settings(Path("someone/some-vae"), revision="abc123"))
    command = "hf download someone/some-vae --revision abc123"
    one_sentence(error, "someone/some-vae (revision abc123)", command, "tokenizer=patches")
    with pytest.raises(UserError) as error:
        TextEncoder.from_config(t5_settings(Path("someone/some-t5")))
    one_sentence(error, "someone/some-t5", '--include "text_encoder_3/*"', "text=words")


def test_weights_in_the_hubs_cache_need_no_hub(silent_hub, vae_folder, t5_folder, monkeypatch):
    cache, server = silent_hub
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--someone--both" / "snapshots" / commit
    shutil.copytree(vae_folder, snapshot / "vae")
    shutil.copytree(t5_folder, snapshot, dirs_exist_ok=True)
    refs = cache / "models--someone--both" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    for revision in ("main", commit):
        place = {"id": "someone/both", "revision": revision}
        tokenizer = ImageTokenizer.from_config(vae_settings(vae_folder, subfolder="vae") | place)
        assert tokenizer.encode(pictures(1, 32, 32)).shape == (1, 64, 2, 2)
        assert tokenizer.id == "someone/both"
        encoder = TextEncoder.from_config(t5_settings(t5_folder) | place)
        assert encoder.encode(["a circle"])[0].shape[2] == 24
        assert encoder.config()["id"] == "someone/both"
    with pytest.raises(BlockingIOError):
        server.accept()  # nobody called
    monkeypatch.setattr(weights, "HUB_SECONDS", 0.5)
    with pytest.raises(UserError, match=re.escape("someone/both")):
        ImageTokenizer.from_config(
            vae_settings(vae_folder, subfolder="elsewhere") | {"id": "someone/both"}
        )


def test_saved_tokeniser_without_kind_or_config_is_said_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="names no kind"):
        ImageTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "sd3", "id": 3}')
    with pytest.raises(UserError, match="damaged"):
        ImageTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.kind"):
        ImageTokenizer.from_config({"kind": "dct"})
    with pytest.raises(UserError, match="does not fit the kind patches"):
        ImageTokenizer.from_config({"kind": "patches", "patch": 4, "tile": 3})
