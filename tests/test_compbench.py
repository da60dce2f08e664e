"""T2I-CompBench++: official files, BLIP-VQA and CLIPScore on random weights in the real files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.errors import UserError
from components.evaluation.blip_vqa import BlipVqa, chunk_file, spacy_chunks
from components.evaluation.clip_score import ClipScore
from components.evaluation.compbench import (
    CATEGORIES,
    Scorer,
    gaps,
    read_prompts,
    read_results,
    read_samples,
    score_compbench,
    write_results,
)
from components.evaluation.draw_sets import draw_compbench
from tests.test_draw_sets import model as drawing_model  # noqa: F401
from tests.test_mask2former import write_clip

SETTINGS = {"bootstrap": 200, "seed": 0}
PROMPTS = ["a red cup and a blue dog", "a green bench"]
CHUNKS = {PROMPTS[0]: ["a red cup", "top", "A blue dog!"], PROMPTS[1]: []}


def samples(folder: Path, prompts: list[str], images: int = 10, size: int = 16) -> Path:
    """Random pictures in the official layout."""
    (folder / "samples").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(images * len(prompts)):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        name = f"{prompts[i // images]}_{i:06d}.png"
        Image.fromarray(pixels).save(folder / "samples" / name)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP with random weights; as the real one, its tokeniser lacks [DEC] and [ENC]."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "blue", "cup"]
    words += ["dog", "woman", "?"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    text = small | {
        "vocab_size": len(words) + 2,
        "bos_token_id": len(words),
        "pad_token_id": 0,
        "sep_token_id": 3,
        "encoder_hidden_size": 16,
        "initializer_range": 0.5,
    }
    vision = small | {"image_size": 32, "patch_size": 16}
    place = tmp_path_factory.mktemp("blip")
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(place)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(pictures, tokenizer).save_pretrained(place)
    return place


def blip(folder: Path, batch: int = 3, size: int = 48) -> BlipVqa:
    settings = {"model": str(folder), "revision": "main", "batch": batch, "size": size}
    return BlipVqa(settings, lambda prompt: CHUNKS[prompt], "the test")


def test_questions_are_the_official_ones(blip_folder: Path) -> None:
    judge = blip(blip_folder)
    assert judge.questions(PROMPTS[0]) == ["a red cup?", "a blue dog?"]
    judge.chunks = lambda prompt: [f"thing {i}" for i in range(9)] + ["the left"]
    assert judge.questions("x") == [f"thing {i}?" for i in range(8)]


def test_blip_score_is_the_product_over_chunks_at_the_first_token(
    blip_folder: Path, tmp_path: Path
) -> None:
    """Against a plain loop through the model's own forward pass, one question at a time."""
    pictures = [(p.path, p.prompt) for p in read_samples(samples(tmp_path / "c", PROMPTS, 3))]
    judge = blip(blip_folder)
    found = judge.scores(pictures)
    assert found[3:] == [1.0] * 3  # no chunk
    yes, no = judge.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for (path, _), score in zip(pictures[:3], found[:3], strict=True):
        product = 1.0
        image = Image.open(path).resize((48, 48), Image.Resampling.BICUBIC)
        mean = torch.tensor(judge.processor.image_mean)[:, None, None]
        std = torch.tensor(judge.processor.image_std)[:, None, None]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        seen = judge.model.vision_model(
            ((pixels - mean) / std)[None], interpolate_pos_encoding=True
        )
        for question in ("a red cup?", "a blue dog?"):
            ids = judge.tokenizer(question, return_tensors="pt")["input_ids"]
            ids[0, 0] = 15  # [ENC]
            read = judge.model.text_encoder(
                input_ids=ids, encoder_hidden_states=seen.last_hidden_state
            ).last_hidden_state
            logits = judge.model.text_decoder(
                input_ids=torch.tensor([[14]]), encoder_hidden_states=read
            ).logits[0, 0]
            chance = logits.softmax(-1)
            product *= round(float(chance[yes] / (chance[yes] + chance[no])), 4)
        assert score == pytest.approx(product, abs=2e-4)
        assert 0 < score < 1
    # Batches change nothing.
    assert blip(blip_folder, batch=2).scores(pictures) == pytest.approx(found, abs=2e-4)


def test_untrained_and_foreign_weights_are_refused(blip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed its self-test: in the portrait of a woman"):
        blip(blip_folder).self_test()
    with pytest.raises(UserError, match=r"no-such.*evaluation\.blip_vqa\.model.*--annotations"):
        blip(tmp_path / "no-such")
    write_clip(tmp_path / "clip")
    with pytest.raises(UserError, match=r"it is a clip model, not BLIP"):
        blip(tmp_path / "clip")
    with pytest.raises(UserError, match=r"failed its self-test: it holds the portrait"):
        clip(tmp_path / "clip").self_test()


def clip(folder: Path) -> ClipScore:
    return ClipScore({"model": str(folder), "revision": "main", "batch": 4})


def test_clip_score_is_the_plain_cosine(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    judge = clip(tmp_path / "clip")
    pictures = [(p.path, p.prompt) for p in read_samples(samples(tmp_path / "c", PROMPTS, 3))]
    found = judge.scores(pictures)
    for (path, prompt), score in zip(pictures, found, strict=True):
        image = Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)
        mean = torch.tensor(judge.clip.processor.image_mean)[:, None, None]
        std = torch.tensor(judge.clip.processor.image_std)[:, None, None]
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        tokens = judge.clip.tokenizer(prompt, return_tensors="pt")
        seen = judge.clip.model.get_image_features(pixels[None]).pooler_output[0]
        said = judge.clip.model.get_text_features(**tokens).pooler_output[0]
        assert score == pytest.approx(float(torch.cosine_similarity(seen, said, 0)), abs=1e-5)
    with pytest.raises(UserError, match=r"reads at most 77 tokens, and 'a green"):
        judge.scores([(pictures[0][0], "a green bench " * 30)])


def test_official_prompt_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "color_val.txt"
    file.write_bytes(b"a green bench and a blue bowl\tseen\r\na red cup. \r\n\r\ntwo boys")
    assert read_prompts(file) == ["a green bench and a blue bowl", "a red cup. ", "two boys"]
    file.write_text("\n")
    with pytest.raises(UserError, match=r"holds no prompt"):
        read_prompts(file)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_result_files_come_back(tmp_path_factory: pytest.TempPathFactory, answers: list) -> None:
    place = tmp_path_factory.mktemp("r")
    (place / "samples").mkdir()
    for i in range(len(answers)):
        (place / "samples" / f"a cup_{i:06d}.png").touch()
    pictures = read_samples(place)
    for kind, error in (("blip", 5.1e-5), ("clip", 0)):
        write_results(place / "vqa_result.json", answers, kind)
        found = read_results(place / "vqa_result.json", pictures)
        assert found == pytest.approx(answers, abs=error)
    rows = json.loads((place / "vqa_result.json").read_text())
    assert [row["question_id"] for row in rows] == list(range(len(answers)))


def test_a_whole_folder_is_scored_and_official_results_are_read(
    blip_folder: Path, tmp_path: Path
) -> None:
    write_clip(tmp_path / "clip")
    out = tmp_path / "out"
    for name in CATEGORIES:
        samples(out / name, PROMPTS)
    for name in ("spatial", "3d_spatial", "numeracy"):
        file = out / name / CATEGORIES[name][1][0] / "vqa_result.json"
        # As the detectors write: in any order, by the number in the picture's name.
        rows = [{"question_id": i, "answer": i / 20} for i in reversed(range(20))]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(rows))
    made: list[str] = []

    def scorer(kind: str) -> Scorer:
        made.append(kind)
        return blip(blip_folder, batch=20) if kind == "blip" else clip(tmp_path / "clip")

    result = score_compbench(out, SETTINGS, scorer)
    assert set(result["categories"]) == set(CATEGORIES) - {"complex"}
    assert result["n"] == 140 and made == ["blip"] * 3 + ["clip"]
    assert result["categories"]["numeracy"]["score"] == pytest.approx(9.5 / 20)
    assert "official result file" in result["categories"]["spatial"]["scored_by"]
    assert "48 px, noun chunks by the test" in result["categories"]["color"]["scored_by"]
    assert result["categories"]["color"]["stderr"] > 0
    assert any("complex: scored by the official tool's" in gap for gap in result["problems"])
    assert "color: it has 2 prompts, officially 300 (or 700)." in result["problems"]
    # What was written is what the official tool would have left, and reads back alike.
    written = out / "color/annotation_blip/vqa_result.json"
    again = score_compbench(out, SETTINGS, scorer, ["color"], annotations=out)
    assert str(written) in again["categories"]["color"]["scored_by"]
    for key in ("score", "n", "stderr"):
        assert again["categories"]["color"][key] == result["categories"]["color"][key]
    # An official run has one category a folder.
    alone = score_compbench(out / "color", SETTINGS, scorer, ["color"], annotations=out / "color")
    assert alone["categories"] == again["categories"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    place = samples(tmp_path / "color", PROMPTS)
    assert gaps(read_samples(place), PROMPTS) == []
    for number in (3, 4):
        (place / "samples" / f"{PROMPTS[0]}_{number:06d}.png").unlink()
    Image.new("RGB", (8, 9)).save(place / "samples" / f"{PROMPTS[1]}_000019.png")
    said = "; ".join(gaps(read_samples(place), [*PROMPTS, "two boys"]))
    assert "2 pictures are missing (000003, 000004)" in said
    assert f"1 prompts have other than 10 pictures ({PROMPTS[0]!r} 8)" in said
    assert "1 prompts have no picture ('two boys')" in said
    assert "its pictures have 2 sizes (17 of 16x16, 1 of 8x9)" in said
    said = "; ".join(gaps(read_samples(place), PROMPTS[:1]))
    assert "1 prompts are not in the prompt file ('a green bench')" in said


def spoil(place: Path, how: str) -> None:
    first = place / "color/samples" / f"{PROMPTS[0]}_000000.png"
    match how:
        case "unreadable":
            first.write_bytes(b"no picture")
        case "twice":
            shutil.copy(first, first.with_name("two boys_000000.png"))
        case "name":
            (first.parent / "notes.txt").touch()
        case "foreign":
            shutil.copytree(place / "color", place / "colour")
        case "fewer answers":
            write_results(place / "color/annotation_blip/vqa_result.json", [0.5] * 19, "blip")
        case "no score":
            write_results(place / "color/annotation_blip/vqa_result.json", [7.0] * 20, "blip")
        case "no results":
            (place / "color/annotation_blip").mkdir()
            (place / "color/annotation_blip/vqa_result.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("unreadable", "_000000.png cannot be read as a picture"),
        ("twice", "have one number"),
        ("name", "notes.txt is not named like"),
        ("foreign", "holds colour, which are no categories"),
        ("fewer answers", "has 19 answers, and there are 20 pictures"),
        ("no score", "answers that are no scores"),
        ("no results", r"is no result of the official tool|has 0 answers"),
    ],
)
def test_bad_input_is_refused_by_name(how: str, words: str, tmp_path: Path) -> None:
    samples(tmp_path / "out/color", PROMPTS)
    spoil(tmp_path / "out", how)
    annotations = tmp_path / "out"

    def scorer(kind: str) -> Scorer:
        raise AssertionError(kind)

    with pytest.raises(UserError, match=words):
        score_compbench(tmp_path / "out", SETTINGS, scorer, [], annotations)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    samples(tmp_path / "spatial", PROMPTS)

    def scorer(kind: str) -> Scorer:
        raise AssertionError(kind)

    with pytest.raises(UserError, match=r"no category colour: it has color"):
        score_compbench(tmp_path, SETTINGS, scorer, ["colour"])
    with pytest.raises(UserError, match=r"detectors only.*--annotations, labels/annotation_obj"):
        score_compbench(tmp_path, SETTINGS, scorer, ["spatial"])
    with pytest.raises(UserError, match=r"no category could be scored"):
        score_compbench(tmp_path, SETTINGS, scorer)
    with pytest.raises(UserError, match=r"color/samples is not there"):
        score_compbench(tmp_path, SETTINGS, scorer, ["color"])
    with pytest.raises(UserError, match=r"name it with --category"):
        score_compbench(tmp_path / "spatial", SETTINGS, scorer)


def test_noun_chunks_come_from_spacy_or_a_file_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such-pipeline finds, and it cannot be used.*--chunks"):
        spacy_chunks("no-such-pipeline")
    file = tmp_path / "chunks.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[1], "chunks": ["a green bench"]}) + "\n")
    chunks, about = chunk_file(file)
    assert chunks(PROMPTS[1]) == ["a green bench"] and about == "the file chunks.jsonl"
    with pytest.raises(UserError, match=r"no line for the prompt 'a red cup and"):
        chunks(PROMPTS[0])
    file.write_text('{"prompt": "x", "chunks": [1]}\n')
    with pytest.raises(UserError, match=r"a chunk is no text"):
        chunk_file(file)


def test_an_official_file_is_drawn_and_gone_on_with(
    drawing_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    file = tmp_path / "color_val.txt"
    file.write_text("\r\n".join(PROMPTS))
    settings = {"batch_size": 10, "workers": 1, "sampler": {"autoregressive_steps": 2}}
    out = tmp_path / "out/color"
    assert draw_compbench(drawing_model, file, out, None, settings) == 20
    pictures = read_samples(out)
    assert [p.number for p in pictures] == list(range(20)) and gaps(pictures, PROMPTS) == []
    before = [p.path.read_bytes() for p in pictures]
    assert len(set(before)) == 20
    pictures[3].path.unlink()
    assert draw_compbench(drawing_model, file, out, None, settings) == 1
    assert [p.path.read_bytes() for p in read_samples(out)] == before
    # Officially the first picture of every prompt has the seed 42.
    again = tmp_path / "again"
    file.write_text(PROMPTS[1])
    draw_compbench(drawing_model, file, again, None, settings)
    assert [p.path.read_bytes() for p in read_samples(again)] == before[10:]
    with pytest.raises(UserError, match=r"begun with other settings"):
        draw_compbench(drawing_model, file, out, None, settings)
    file.write_text("a cup_and a dog")
    with pytest.raises(UserError, match=r"'a cup_and a dog' cannot be a file's name"):
        draw_compbench(drawing_model, file, tmp_path / "other", None, settings)
