import numpy as np
import pytest
import torch

from components.errors import UserError
from components.tokens.encode import encode
from components.tokens.encoded import EncodedSet
from components.tokens.text import TextEncoder, WordEncoder
from components.tokens.tokenizer import PatchTokenizer
from components.tracking import Tracker
from tests.tiny_curated import tiny_params, write_curated


@pytest.fixture(scope="module")
def encoded(encoded_folder):
    return EncodedSet.open(encoded_folder)


def test_encoded_set_gives_rungs_latents_text_and_notions(encoded):
    assert encoded.rungs["24x16"] == (24, 16)
    assert len(encoded.rows("24x24")) == len(encoded.rows("24x16")) == 18
    ids = encoded.rows("24x16")[:3]
    assert encoded.latents("24x16", ids).shape == (3, 12, 4, 6)
    assert encoded.latents("24x16", ids).dtype == torch.float32
    states, mask = encoded.text([0, 1])
    assert states.shape == (2, 6, 24) and mask.all()
    assert encoded.notion_names == ["red", "blue", "green"]
    assert encoded.notions.sum() == 36
    again, _ = encoded.text_encoder().encode([encoded.index["caption"][0]])
    assert torch.equal(again[0], states[0])


def test_latents_decode_to_the_picture(encoded):
    ids = encoded.rows("24x24")
    pictures = encoded.tokenizer().decode(encoded.latents("24x24", ids))
    color = pictures[int(np.flatnonzero(ids == ids[0])[0])]
    assert color.amax() > 0.5  # a bright disc on grey
    latents = encoded.latents("24x24", ids)
    assert abs(float(latents.mean())) < 0.3 and 0.5 < float(latents[:, 0].std()) < 2


def test_no_picture_is_enlarged_or_cropped_too_much(encoded):
    with pytest.raises(KeyError, match="do not reach"):
        encoded.latents("24x24", encoded.rows("24x16")[:1])


def test_tokenizer_is_exact_with_all_components_and_survives_saving(tmp_path):
    images = torch.rand(16, 3, 16, 12) * 2 - 1
    tokenizer = PatchTokenizer(4, 48)
    assert tokenizer.fit([images]) == pytest.approx(1, abs=1e-6)
    latents = tokenizer.encode(images)
    assert latents.shape == (16, 48, 4, 3)
    assert torch.allclose(tokenizer.decode(latents), images, atol=1e-3)
    assert torch.allclose(latents.var(dim=(0, 2, 3)), torch.ones(48), atol=0.02)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PatchTokenizer.from_pretrained(tmp_path).encode(images), latents)


def test_words_are_nearly_orthogonal_codes_and_unknown_ones_are_taken(tmp_path):
    encoder = WordEncoder(8, 256)
    states, mask = encoder.encode(["a red Circle!", "zebra", ""])
    assert states.shape == (3, 3, 256)
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    red, circle = states[0, 1], states[0, 2]
    assert abs(float(red @ circle)) / 256 < 0.25
    encoder.save_pretrained(tmp_path)
    again, _ = TextEncoder.from_pretrained(tmp_path).encode(["zebra"])
    assert torch.equal(again[0, 0], states[1, 0])


def test_minilm_gives_token_states():
    encoder = TextEncoder.from_config({"kind": "minilm", "length": 16})
    states, mask = encoder.encode(["a photo of a red circle", "a circle"])
    assert states.shape == (2, mask.shape[1], 384)
    assert mask.sum(1).tolist() == [8, 4]


def test_bad_input_is_said_in_a_sentence(tmp_path):
    curated = write_curated(tmp_path / "curated")
    params = tiny_params()
    params["training"]["phase1"]["rungs"] = ["25x24"]
    with pytest.raises(UserError, match=r"25x24.*multiple"):
        encode(curated, tmp_path / "encoded", tmp_path / "m.json", params, Tracker())
    params["training"]["phase1"]["rungs"] = ["24x24", "96x96"]
    with pytest.raises(UserError, match="96x96"):
        encode(curated, tmp_path / "encoded", tmp_path / "m.json", params, Tracker())
    shard = curated / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:7000])
    params = tiny_params()
    with pytest.raises(UserError, match=r"00001\.tar|in no shard"):
        encode(curated, tmp_path / "encoded", tmp_path / "m.json", params, Tracker())
    with pytest.raises(UserError, match="run the stage encode"):
        EncodedSet.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"text\.kind"):
        TextEncoder.from_config({"kind": "elmo"})
