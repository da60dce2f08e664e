import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import UserError
from components.tokens.attributes import Attributes, write_attributes
from components.tokens.encode import encode
from components.tokens.encoded import EncodedSet
from components.tokens.pictures import keys_hash
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
    assert len(encoded) == 36 and encoded.shards == {"00000": 18, "00001": 18}
    assert encoded.keys == keys_hash(encoded.index["key"])
    for wanted in ([], [20, 3, 20]):
        found = encoded.columns(["key", "caption"], np.array(wanted, int))
        assert found.to_dict("list") == encoded.index.iloc[wanted][["key", "caption"]].to_dict(
            "list"
        )
    assert encoded.attribute_names == {
        "notion": ["red", "blue", "green"],
        "style": [],
        "source": ["street", "studio"],
    }
    values, offsets = encoded.attributes(np.array([4, 0, 1, 0]))
    # "circle" is no notion that curation kept.
    assert values.tolist() == [1, 3, 0, 3, 1, 4, 0, 3] and offsets.tolist() == [0, 2, 4, 6, 8]
    values, offsets = encoded.attributes(np.arange(36))
    assert encoded.attribute_counts.tolist() == np.bincount(values).tolist() == [12, 12, 12, 10, 26]
    assert isinstance(encoded.rows("24x16"), np.memmap)
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


def test_sets_of_an_older_version_and_curated_sets_without_notions_are_refused(encoded, tmp_path):
    shutil.copytree(encoded.folder, tmp_path / "old")
    (tmp_path / "old" / "samples.json").unlink()
    with pytest.raises(UserError, match=r"older version.*run the stage encode again"):
        EncodedSet.open(tmp_path / "old")
    curated = write_curated(tmp_path / "curated")
    (curated / "notions.parquet").unlink()
    params = tiny_params()
    params["model"]["encode"]["most_cropped"] = 0.12
    with pytest.raises(UserError, match=r"notions\.parquet.*run the stage curate again"):
        encode(curated, tmp_path / "encoded", tmp_path / "m.json", params, Tracker())


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["red", "oil painting", "unlisted", "blue"]), max_size=5),
            st.sampled_from(["a", "b", None]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_attributes_are_those_of_the_manifest_whatever_the_batches(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("attributes")
    listed = pd.DataFrame({"notion": ["red", "oil painting", "blue"]})
    listed.assign(kind=["colour", "style", "colour"]).to_parquet(folder / "notions.parquet")
    words, sources = zip(*samples, strict=True)
    manifest = pd.DataFrame({"notion_words": list(words), "source": list(sources)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.tokens.attributes.ROWS", 7)
        write_attributes(folder / "out", folder, manifest)
    read = Attributes(folder / "out")
    names = [name for kind in read.names.values() for name in kind]
    assert read.names["style"] == ["oil painting"] and read.names["notion"] == ["red", "blue"]
    values, offsets = read(np.arange(len(samples)))
    for i, (words, source) in enumerate(samples):
        found = {names[v] for v in values[offsets[i] : offsets[i + 1]]}
        assert found == (set(words) - {"unlisted"}) | ({source} - {None})
    assert read.counts.sum() == len(values) == offsets[-1]
