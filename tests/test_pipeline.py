"""The pipeline as people use diffusers' ones: arguments, seeds, saving, LoRA, bad calls."""

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.errors import UserError
from components.model import DJEPAPipeline
from components.model.dit import FlowDiT, FlowDiTConfig
from components.model.djepa import DJEPA, DJEPAConfig
from components.model.network import NetworkConfig
from components.model.sampler import SamplerConfig, chance
from components.model.solvers import shifted_times
from components.tokens.text import WordEncoder
from components.tokens.tokenizer import PatchTokenizer

CONFIG = DJEPAConfig(
    channels=12,
    text_width=24,
    width=32,
    heads=2,
    mlp_ratio=2,
    buffer_tokens=2,
    positions="vope",
    reference_grid=32,
    rope_base=10.0,
    encoder_blocks=1,
    predictor_blocks=2,
    head_width=16,
    head_blocks=2,
)
SAMPLER = SamplerConfig(4, 5, 2.0, 0.9, 1.5, width=16, height=16)
PROMPTS = ["a red circle", "two blue squares left of a bar", "anything at all", "a ring"]


def awake(model: DJEPA) -> DJEPA:
    """Away from the zero initialisation, where most of the network is silent."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PatchTokenizer:
    made = PatchTokenizer(4, 12)
    made.fit([torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    return made


@pytest.fixture
def pipe(tokenizer: PatchTokenizer) -> DJEPAPipeline:
    return DJEPAPipeline(awake(DJEPA(CONFIG)), tokenizer, WordEncoder(16, 24), SAMPLER)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def levels(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of a pixel, in 255ths."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


# ---- what a call gives


def test_a_picture_does_not_depend_on_its_batch(pipe: DJEPAPipeline) -> None:
    heights, widths = [16, 24, 16, 8, 16, 24, 32, 16], [16, 16, 16, 24, 16, 16, 16, 16]
    prompts = PROMPTS + PROMPTS[::-1]
    eight = pipe(prompts, heights, widths, generator=seeded(*range(8))).images
    assert [image.size for image in eight] == list(zip(widths, heights, strict=True))
    for number in range(8):
        one = pipe(prompts[number], heights[number], widths[number], generator=seeded(number))
        assert levels(one.images[0], eight[number]) <= 1
    assert levels(eight[0], eight[2]) > 20


def test_a_long_neighbour_changes_nothing(pipe: DJEPAPipeline) -> None:
    alone = pipe("a ring", generator=seeded(3), output_type="np").images
    prompts = ["a ring", "one two three four five six seven eight nine ten"]
    beside = pipe(prompts, generator=seeded(3, 4), output_type="np").images
    assert np.abs(alone[0] - beside[0]).max() < 1e-4


def test_output_types_are_the_same_pictures(pipe: DJEPAPipeline) -> None:
    made = {
        kind: pipe(PROMPTS[:2], 8, 16, generator=seeded(1, 2), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["np"].shape == (2, 8, 16, 3) and made["pt"].shape == (2, 3, 8, 16)
    assert made["latent"].shape == (2, 12, 2, 4)
    assert made["np"].min() >= 0 and made["np"].max() <= 1
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    for image, array in zip(made["pil"], made["np"], strict=True):
        assert np.abs(np.asarray(image) - array * 255).max() <= 0.51
    decoded = pipe.tokenizer.decode_images(made["latent"])
    assert [i.tobytes() for i in decoded] == [i.tobytes() for i in made["pil"]]
    mixed = pipe(PROMPTS[:2], [8, 12], 16, generator=seeded(1, 2), output_type="np").images
    assert [array.shape for array in mixed] == [(8, 16, 3), (12, 16, 3)]
    (images,) = pipe("a ring", return_dict=False)
    assert images[0].size == (16, 16)


def test_images_of_a_prompt_lie_together_and_generators_count(pipe: DJEPAPipeline) -> None:
    four = pipe(PROMPTS[:2], num_images_per_prompt=2, generator=seeded(5, 6, 7, 8)).images
    again = pipe(PROMPTS[1], num_images_per_prompt=2, generator=seeded(7, 8)).images
    assert all(levels(a, b) <= 1 for a, b in zip(four[2:], again, strict=True))
    # A single generator gives the pictures their noise in turn.
    one = torch.Generator().manual_seed(5)
    first, second = pipe("a ring", num_images_per_prompt=2, generator=one).images
    assert levels(first, pipe("a ring", generator=seeded(5)).images[0]) <= 1
    assert levels(first, second) > 20
    torch.manual_seed(1)
    free = [pipe("a ring").images[0] for _ in range(2)]
    assert levels(*free) > 20


def test_each_setting_changes_the_picture(pipe: DJEPAPipeline) -> None:
    def draw(**settings: float) -> np.ndarray:
        return pipe(
            "a red circle", 16, 32, generator=seeded(0), output_type="np", **settings
        ).images

    base = draw()
    for settings in (
        {"autoregressive_steps": 2},
        {"num_inference_steps": 2},
        {"guidance_scale": 1.0},
        {"temperature": 0.5},
        {"time_shift": 4.5},
        {"layout_offset": 0},
    ):
        assert np.abs(base - draw(**settings)).max() > 1e-3, settings
    again = draw(layout_offset=2, guidance_scale=2.0)  # centred is |8 − 4|/2
    assert np.abs(base - again).max() < 1e-4


def test_offsets_one_a_prompt(pipe: DJEPAPipeline) -> None:
    same = {"height": 16, "width": 32, "output_type": "np"}
    three = pipe(["a ring"] * 3, generator=seeded(0, 0, 0), layout_offset=[0, None, 4], **same)
    alone = pipe("a ring", generator=seeded(0), layout_offset=4, **same).images[0]
    assert np.abs(three.images[2] - alone).max() < 1e-4
    assert np.abs(three.images[0] - three.images[1]).max() > 1e-3


def test_without_guidance_nothing_unconditional_is_computed(pipe: DJEPAPipeline) -> None:
    seen: list[bool] = []
    pipe.transformer.encoder.text_in.register_forward_hook(
        lambda module, given, result: seen.append(bool((given[0].learned == 1).any()))
    )
    pipe("a red circle", guidance_scale=1.0)
    assert seen == [False]
    seen.clear()
    pipe("a red circle", guidance_scale=3.0)
    assert seen == [False, True]


def test_more_steps_than_tokens_and_any_size(pipe: DJEPAPipeline) -> None:
    sizes = [(4, 4), (64, 4), (8, 64)]
    images = pipe(
        ["a ring"] * 3, [h for _, h in sizes], [w for w, _ in sizes], autoregressive_steps=1000
    ).images
    assert [image.size for image in images] == sizes


def test_callback_sees_each_step_and_may_change_it(pipe: DJEPAPipeline) -> None:
    calls: list[tuple[int, float]] = []

    def watch(pipeline, step, timestep, tensors):
        assert pipeline is pipe and tensors["latents"].shape == (1, 12, 4, 4)
        drawn = (tensors["latents"].abs().sum(1) > 0).float().mean()
        assert float(drawn) == pytest.approx(timestep)
        calls.append((step, timestep))
        return {}

    plain = pipe("a ring", generator=seeded(0), callback_on_step_end=watch).images[0]
    assert [step for step, _ in calls] == [0, 1, 2, 3] and calls[-1][1] == 1
    assert levels(plain, pipe("a ring", generator=seeded(0)).images[0]) <= 1
    black = pipe(
        "a ring",
        callback_on_step_end=lambda p, s, t, tensors: {"latents": tensors["latents"] * 0},
        output_type="latent",
    ).images
    assert not black.any()


def test_the_baseline_transformer_draws_too(tokenizer: PatchTokenizer, tmp_path: Path) -> None:
    sizes = {name: getattr(CONFIG, name) for name in NetworkConfig.__dataclass_fields__}
    model = awake(FlowDiT(FlowDiTConfig(**sizes, blocks=2)))
    pipe = DJEPAPipeline(model, tokenizer, WordEncoder(16, 24), SAMPLER)
    times: list[float] = []
    three = pipe(
        PROMPTS[:3],
        [16, 24, 16],
        generator=seeded(0, 1, 2),
        callback_on_step_end=lambda p, s, t, tensors: times.append(t) or {},
    ).images
    assert times == pytest.approx(shifted_times(5, 1.5)[1:].tolist() * 2)
    pipe.save_pretrained(tmp_path / "model")
    again = DJEPAPipeline.from_pretrained(tmp_path / "model")
    assert levels(again(PROMPTS[2], generator=seeded(2)).images[0], three[2]) <= 1


# ---- the object


def test_save_and_load(pipe: DJEPAPipeline, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    pipe.save_pretrained(tmp_path / "model", {"scale": "tiny", "images seen": 123})
    again = DJEPAPipeline.from_pretrained(tmp_path / "model")
    first = pipe(PROMPTS, generator=seeded(*range(4))).images
    second = again(PROMPTS, generator=seeded(*range(4))).images
    assert [i.tobytes() for i in first] == [i.tobytes() for i in second]
    assert set(again.components) == {"transformer", "tokenizer", "text_encoder", "sampler"}
    assert again.to("cpu") is again and again.device.type == "cpu"
    rebuilt = DJEPAPipeline(**again.components)
    assert rebuilt.sampler == SAMPLER
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-to-image")
    assert "| images seen | 123 |" in card.text and "from_pretrained" in card.text
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))


def test_saving_takes_nothing_away_that_is_no_model(pipe: DJEPAPipeline, tmp_path: Path) -> None:
    for folder, save in (("model", pipe.save_pretrained), ("lora", pipe.save_lora_weights)):
        theirs = tmp_path / folder / "thesis.txt"
        theirs.parent.mkdir()
        if folder == "lora":
            pipe.add_lora(2, 2)
        save(theirs.parent)  # an empty one is taken, and a saved one replaced
        save(theirs.parent)
        shutil.rmtree(theirs.parent)
        theirs.parent.mkdir()
        theirs.write_text("years of work")
        with pytest.raises(
            UserError, match=r"something else \(no (model_index|adapter_config)\.json"
        ):
            save(theirs.parent)
        assert theirs.read_text() == "years of work"
        with pytest.raises(UserError, match=r"thesis\.txt holds something else"):
            save(theirs)
    pipe.unload_lora_weights()


def test_a_pipeline_draws_in_bfloat16_where_it_is_asked_to(pipe: DJEPAPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = pipe("a red circle", generator=generator, output_type="latent")
    assert pipe.to(torch.bfloat16) is pipe.to("cpu", torch.bfloat16) is pipe
    generator.manual_seed(0)
    low = pipe("a red circle", generator=generator, output_type="latent")
    assert low.images.dtype == torch.float32 and not torch.equal(low.images, whole.images)
    torch.testing.assert_close(low.images, whole.images, rtol=0.1, atol=0.1)
    with pytest.raises(UserError, match="float16"):
        pipe.to("cpu", torch.float16)


def test_progress_bar_is_tqdms(pipe: DJEPAPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("a ring")
    assert capsys.readouterr().err == ""  # not at a terminal
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    pipe("a ring")
    assert "drawing: 100%" in capsys.readouterr().err


# ---- LoRA


def test_lora_trained_saved_loaded_switched_and_fused(pipe: DJEPAPipeline, tmp_path: Path) -> None:
    def draw(which: DJEPAPipeline) -> np.ndarray:
        return which(PROMPTS[:2], generator=seeded(0, 1), output_type="np").images

    pipe.save_pretrained(tmp_path / "base")
    base = draw(pipe)
    pipe.add_lora(rank=2, alpha=4)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    # A and B of four layers in both streams of three blocks, less two where the text ends.
    assert len(trained) == 2 * (4 * 2 * 3 - 3)
    assert np.abs(draw(pipe) - base).max() < 1e-5
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    states, mask = pipe.text_encoder.encode(PROMPTS)
    tokens, order = torch.randn(4, 16, 12), torch.rand(4, 16).argsort(1)
    for _ in range(3):
        z = pipe.transformer.condition(states, mask, tokens, order, 5, (4, 4))
        optimizer.zero_grad()
        z.square().mean().backward()
        optimizer.step()
    tuned = draw(pipe)
    assert np.abs(tuned - base).max() > 0.02
    pipe.save_lora_weights(tmp_path / "lora")
    with pytest.raises(UserError, match="fuse_lora"):
        pipe.save_pretrained(tmp_path / "no")

    for source in ("lora", "lora/adapter_model.safetensors"):
        fresh = DJEPAPipeline.from_pretrained(tmp_path / "base")
        fresh.load_lora_weights(tmp_path / source)
        assert np.abs(draw(fresh) - tuned).max() < 1 / 255
    with pytest.raises(UserError, match="unload_lora_weights"):
        fresh.load_lora_weights(tmp_path / "lora")
    fresh.disable_lora()
    assert np.abs(draw(fresh) - base).max() < 1e-5
    fresh.enable_lora()
    assert np.abs(draw(fresh) - tuned).max() < 1 / 255
    fresh.fuse_lora()
    fresh.save_pretrained(tmp_path / "fused")
    assert np.abs(draw(DJEPAPipeline.from_pretrained(tmp_path / "fused")) - tuned).max() < 1 / 255
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), base)
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(
    pipe: DJEPAPipeline, tokenizer: PatchTokenizer, tmp_path: Path
) -> None:
    from dataclasses import replace

    before = set(pipe.transformer.state_dict())
    other = DJEPA(replace(CONFIG, width=16))
    wrong = DJEPAPipeline(other, tokenizer, WordEncoder(16, 24), SAMPLER)
    wrong.add_lora(2, 2)
    wrong.save_lora_weights(tmp_path / "wrong")
    (tmp_path / "empty").mkdir()
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "adapter_config.json").write_text("{}")
    (tmp_path / "spoilt" / "adapter_model.safetensors").write_bytes(b"nothing")
    for folder, words in (
        ("wrong", "trained on this model"),
        ("empty", r"holds no adapter_config\.json"),
        ("spoilt", "holds no LoRA adapter"),
        ("absent", r"holds no adapter_config\.json"),
    ):
        with pytest.raises(UserError, match=words):
            pipe.load_lora_weights(tmp_path / folder)
    assert set(pipe.transformer.state_dict()) == before
    with pytest.raises(UserError, match="no LoRA adapter; load"):
        pipe.fuse_lora()


def test_generate_draws_with_an_adapter_an_offset_and_guidance(
    pipe: DJEPAPipeline, tmp_path: Path
) -> None:
    from components.generate import generate

    pipe.save_pretrained(tmp_path / "model")
    pipe.add_lora(2, 2)
    pipe.save_lora_weights(tmp_path / "lora")
    out = tmp_path / "out" / "ring.png"
    drawn = generate("a ring", tmp_path / "model", "32x16", 2, 5, out, 1.0, 3.0, tmp_path / "lora")
    assert [path.name for path in drawn] == ["ring-0.png", "ring-1.png"]
    expected = pipe(
        "a ring", 16, 32, guidance_scale=1.0, layout_offset=3.0, generator=seeded(6)
    ).images[0]
    assert levels(Image.open(drawn[1]), expected) <= 1


# ---- bad calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 30}, "multiples of 4"),
        ({"height": 0}, "multiples of 4"),
        ({"height": 16.0}, "multiples of 4"),
        ({"prompt": ""}, "Prompt 0 is empty"),
        ({"prompt": ["a ring", " "]}, "Prompt 1 is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [3]}, "no text"),
        ({"width": [16, 16]}, "width has 2 values for 1 prompts"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"generator": [7]}, "not seeds"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"autoregressive_steps": 0}, "autoregressive_steps"),
        ({"autoregressive_steps": 2.5}, "autoregressive_steps"),
        ({"time_shift": 0.0}, "time_shift"),
        ({"temperature": -1.0}, "temperature"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"layout_offset": 1}, "give 0 to 0 tokens"),
        ({"width": 32, "layout_offset": 4.5}, "give 0 to 4 tokens .centred: 2"),
        ({"width": 32, "layout_offset": -1}, "off the reference field"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, "there is only latents"),
    ],
)
def test_bad_calls_are_said_in_a_sentence(pipe: DJEPAPipeline, arguments: dict, words: str) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=words) as refusal:
        pipe(**{"prompt": "a ring", **arguments})
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_a_prompt_of_ten_thousand_words_is_cut_with_a_warning(
    pipe: DJEPAPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    words = " ".join(f"word{i}" for i in range(10_000))
    started = time.process_time()
    with caplog.at_level(logging.WARNING):
        long = pipe(words, generator=seeded(0)).images[0]
    assert time.process_time() - started < 5
    assert "at most 16 tokens" in caplog.text and len(caplog.text) < 400
    cut = pipe(" ".join(words.split()[:16]), generator=seeded(0)).images[0]
    assert levels(long, cut) <= 1


def test_an_offset_needs_vope(tokenizer: PatchTokenizer) -> None:
    from dataclasses import replace

    model = awake(DJEPA(replace(CONFIG, positions="rope")))
    pipe = DJEPAPipeline(model, tokenizer, WordEncoder(16, 24), SAMPLER)
    with pytest.raises(UserError, match="positions are rope"):
        pipe("a ring", 16, 32, layout_offset=1)


def test_folders_that_hold_another_model_are_refused(
    pipe: DJEPAPipeline, tokenizer: PatchTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        DJEPAPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="holds a StableDiffusionPipeline"):
        DJEPAPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be loaded"):
        DJEPAPipeline.from_pretrained(tmp_path)
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    config = folder / "transformer" / "config.json"
    sizes = json.loads(config.read_text())
    config.write_text(json.dumps(sizes | {"width": 64}))
    with pytest.raises(UserError, match="do not fit"):
        DJEPAPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)
    (folder / "sampler" / "config.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="another version"):
        DJEPAPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="12 channels a token and the tokeniser gives 8"):
        DJEPAPipeline(DJEPA(CONFIG), PatchTokenizer(4, 8), WordEncoder(16, 24), SAMPLER)


# ---- speed


@pytest.mark.parametrize("guidance", [6.0, 1.0])
def test_ours_draws_what_the_published_way_draws(pipe: DJEPAPipeline, guidance: float) -> None:
    from benchmarks.sampling import ours, published

    prompts = ["a red circle", "two blue squares left of a bar"]
    config = SamplerConfig(5, 6, guidance, 0.8, 4.5, width=20, height=12)
    drawn = [chance(15, 12, generator) for generator in seeded(0, 1)]
    order, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
    what = (pipe.transformer, pipe.text_encoder, prompts, (5, 3), config, order, noise)
    tokens = published(*what)
    assert torch.allclose(ours(*what), tokens, rtol=1e-4, atol=1e-4)
    assert tokens.std() > 0.1
