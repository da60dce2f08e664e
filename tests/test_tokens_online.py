"""The stage encode at scale: streamed files, encoding on demand, any tokeniser and text encoder."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from components.errors import UserError
from components.files import atomic_folder
from components.tokens.encode import encode, write_text
from components.tokens.encoded import EncodedSet
from components.tokens.rungs import fitted, reaching
from components.tokens.stream import TensorStream
from components.tokens.text import WordEncoder
from components.tokens.tokenizer import ImageTokenizer, PatchTokenizer
from components.tracking import Tracker
from tests.tiny_curated import tiny_params, write_curated
from tests.tiny_frozen import t5_settings, vae_settings, write_t5, write_vae


def loose_params():
    """`tiny_params`, with rungs that the set's pictures reach."""
    params = tiny_params()
    params["model"]["encode"] |= {"most_cropped": 0.12, "decoded": 4}
    return params


def made(folder, params, name):
    """The tiny curated set, encoded; gives the set and its figures."""
    curated = folder / "curated"
    if not curated.exists():
        write_curated(curated)
    encode(curated, folder / name, folder / f"{name}.json", params, Tracker())
    return EncodedSet.open(folder / name), json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module", params=["patches", "sd3"])
def pair(request, tmp_path_factory):
    """The same set cached and online, for both kinds of tokeniser, sd3 with T5."""
    folder, params = tmp_path_factory.mktemp(request.param), loose_params()
    if request.param == "sd3":
        params["model"]["tokenizer"] = vae_settings(write_vae(folder / "vae"))
        params["model"]["text"] = t5_settings(write_t5(folder / "t5"))
        params["training"]["phase1"]["rungs"] = ["48x48", "64x48"]
        params["training"]["phase2"]["rungs"] = ["48x48", "32x32"]
    cached = made(folder, params, "cached")
    params["data"]["encode"] = "online"
    return cached, made(folder, params, "online")


def test_online_gives_the_cached_latents_and_text_up_to_rounding(pair):
    (cached, _), (online, _) = pair
    assert dict(cached.rungs).keys() == dict(online.rungs).keys()
    for rung in cached.rungs:
        assert np.array_equal(cached.rows(rung), online.rows(rung))
        ids = cached.rows(rung)[[5, 0, 3, 3]]  # any order, any often
        one, other = cached.latents(rung, ids), online.latents(rung, ids)
        assert other.dtype == torch.float32 and other.device.type == "cpu"
        # bfloat16 keeps 8 bits: half a step is a 256th of the value.
        torch.testing.assert_close(one, other, rtol=1 / 256, atol=1e-4)
    (one, mask), (other, other_mask) = cached.text([7, 0, 1]), online.text([7, 0, 1])
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(one, other, rtol=1 / 256, atol=1e-4)


def test_online_has_the_same_face_and_no_latents(pair):
    (cached, cached_figures), (online, figures) = pair
    assert online.attribute_names == cached.attribute_names and online.keys == cached.keys
    for one, other in zip(
        *(each.attributes(np.arange(36)) for each in (online, cached)), strict=True
    ):
        assert np.array_equal(one, other)
    assert online.index.equals(cached.index)
    assert online.tokenizer().channels == cached.tokenizer().channels
    assert online.text_encoder().width == cached.text_encoder().width
    assert not (online.folder / "latents").exists()
    assert not (online.folder / "text.safetensors").exists()
    assert figures["rungs"] == cached_figures["rungs"] and "pixel_mse" not in figures
    rung = min(online.rungs, key=lambda name: len(online.rows(name)))
    absent = np.setdiff1d(np.arange(len(online.index)), online.rows(rung))
    for each in (cached, online):
        if len(absent):
            with pytest.raises(KeyError, match="do not reach"):
                each.latents(rung, absent[:1])


def test_latents_are_those_of_the_picture_itself(pair):
    (cached, figures), (online, _) = pair
    rung = next(iter(cached.rungs))
    row = int(cached.rows(rung)[4])
    picture = fitted(online.pictures.pixels(row), cached.rungs[rung])
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = cached.tokenizer().encode(images)
    torch.testing.assert_close(cached.latents(rung, [row]), expected, rtol=1 / 256, atol=1e-4)
    assert ("variance_kept" in figures) == isinstance(cached.tokenizer(), PatchTokenizer)


def test_online_survives_moving_with_its_shards_and_says_what_is_missing(pair, tmp_path):
    _, (online, _) = pair
    shutil.copytree(online.folder, tmp_path / "encoded")
    with pytest.raises(UserError, match=r"00000\.tar is missing.*data\.encode=cached"):
        EncodedSet.open(tmp_path / "encoded")
    shutil.copytree(online.curated, tmp_path / "curated")
    moved = EncodedSet.open(tmp_path / "encoded")
    rung = next(iter(moved.rungs))
    ids = moved.rows(rung)[:2]
    assert torch.equal(moved.latents(rung, ids), online.latents(rung, ids))
    shard = tmp_path / "curated" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut off|cannot be read"):
        moved.latents(rung, moved.rows(rung)[-2:])


def test_picture_that_is_not_the_manifests_is_refused(tmp_path):
    curated = write_curated(tmp_path / "curated")
    manifest = pd.read_parquet(curated / "manifest.parquet")
    manifest.loc[3, "width"] = 80
    manifest.to_parquet(curated / "manifest.parquet", index=False)
    with pytest.raises(UserError, match=r"000000003 has 72x72 pixels, 80x72 in"):
        encode(curated, tmp_path / "out", tmp_path / "m.json", loose_params(), Tracker())


def test_rung_that_cuts_a_token_of_the_vae_is_named(tmp_path):
    params = tiny_params()
    params["model"]["tokenizer"] = vae_settings(write_vae(tmp_path / "vae"))
    params["training"]["phase2"]["rungs"] = ["64x64", "64x40"]
    params["training"]["phase1"]["rungs"] = ["64x64"]
    with pytest.raises(UserError, match=r"64x40 in params\.training.*16 pixels.*64x32"):
        encode(tmp_path / "curated", tmp_path / "out", tmp_path / "m.json", params, Tracker())


def test_unfinished_set_leaves_no_folder(tmp_path):
    curated = write_curated(tmp_path / "curated")
    with tarfile.open(curated / "00001.tar") as tar:
        member = [m for m in tar if m.name.endswith(".png")][-1]
    data = bytearray((curated / "00001.tar").read_bytes())
    data[member.offset_data : member.offset_data + 8] = b"no image"
    (curated / "00001.tar").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        encode(curated, tmp_path / "out", tmp_path / "m.json", loose_params(), Tracker())
    assert [path.name for path in tmp_path.iterdir()] == ["curated"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_streamed_file_is_what_safetensors_reads(tmp_path_factory, pieces, random):
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    total = sum(pieces)
    values = torch.randn(total, 3, 5).bfloat16()
    starts = np.cumsum([0, *pieces[:-1]]).tolist()
    order = list(range(len(pieces)))
    random.shuffle(order)
    vector = np.arange(7) ** 2
    with TensorStream(path, "rows", (3, 5), "numbers", 7) as file:
        for piece in order:
            file.write(starts[piece], values[starts[piece] : starts[piece] + pieces[piece]])
        file.finish(vector)
    read = load_file(path)
    assert torch.equal(read["rows"], values)
    assert read["numbers"].tolist() == vector.tolist()


def test_fit_by_batches_is_the_fit_to_all(tmp_path):
    images = torch.rand(40, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = PatchTokenizer(4, 12), PatchTokenizer(4, 12)
    assert whole.fit([images]) == pytest.approx(parts.fit(iter(images.split(7))), abs=1e-12)
    torch.testing.assert_close(whole.encode(images), parts.encode(images))
    x = whole._patches(images).flatten(0, 2).double()
    covariance = torch.cov(x.T)
    values = torch.linalg.eigvalsh(covariance).flip(0)[:12]
    torch.testing.assert_close(whole.scale.double() ** 2, values, rtol=1e-5, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["a red circle", "a", "two blue rings", ""]), min_size=1, max_size=70)
)
def test_text_states_do_not_depend_on_windows(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    encoder = WordEncoder(8, 16)
    write_text(path, encoder, captions, batch=1)  # 32 captions a window
    read = load_file(path)
    states, mask = encoder.encode(captions)
    for row in range(len(captions)):
        start, end = read["offsets"][row : row + 2].tolist()
        assert torch.equal(read["states"][start:end], states[row, mask[row]].bfloat16())


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 200), st.integers(8, 200), st.floats(0, 0.5))
def test_reaching_is_never_enlarged_nor_cropped_too_much(width, height, most):
    size = (32, 24)
    reached = len(reaching(np.array([width]), np.array([height]), size, most)) == 1
    if width < 32 or height < 24:
        assert not reached
    else:
        scale = min(width / 32, height / 24)
        assert (
            reached == (1 - 32 * 24 * scale**2 / (width * height) <= most + 1e-9)
            or abs(1 - 32 * 24 * scale**2 / (width * height) - most) < 1e-9
        )
        pixels = np.zeros((height, width, 3), np.uint8)
        assert fitted(pixels, size).shape == (24, 32, 3)


def test_critic_vectors_come_from_an_online_set(pair):
    from components.feedback import describe

    _, (online, _) = pair
    ids = np.unique(np.concatenate([online.rows(rung) for rung in online.rungs]))[:5]
    assert describe.samples(online, ids).shape == (5, 2 * online.tokenizer().channels)
    assert describe.captions(online, ids).shape == (5, online.text_encoder().width)


def test_tokenisers_of_both_kinds_are_read_by_one_name(pair):
    (cached, _), _ = pair
    tokenizer = ImageTokenizer.from_pretrained(cached.folder / "tokenizer")
    assert type(tokenizer) is type(cached.tokenizer())
    with atomic_folder(Path(cached.folder) / "again") as folder:
        tokenizer.save_pretrained(folder)
        assert ImageTokenizer.from_pretrained(folder).patch == tokenizer.patch
