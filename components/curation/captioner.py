"""Captions written by a vision-language model, for pictures without one or for all."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.curation.filters import Picture
from components.errors import UserError
from components.tokens.weights import FrozenWeights

NEVER, MISSING, ALL = "never", "missing", "all"
NONE = "none"


class Captioner:
    """transformers' image-text-to-text models with a chat template; InternVL3 in its -hf format.

    Greedy decoding, so the same picture, weights and machine give the same caption. On a GPU
    the weights are bfloat16, whose rounding may differ with the pictures beside one in a batch.
    """

    def __init__(self, captions: Mapping[str, Any]) -> None:
        self.captions = captions
        self.weights = FrozenWeights(
            str(captions["model"]),
            str(captions["revision"]),
            ("",),
            "curation.captions.model",
            "curation.captions.write=never",
        )

    @classmethod
    def from_params(cls, captions: Mapping[str, Any]) -> "Captioner | None":
        """The captioner of `params.curation.captions`; None where none are to be written.

        Raises UserError for another `write` than never, missing or all, and for no model.
        """
        if captions["write"] not in (NEVER, MISSING, ALL):
            raise UserError(
                f"curation.captions.write is {captions['write']!r}: set it to {NEVER}, {MISSING} "
                f"or {ALL}."
            )
        if captions["write"] == NEVER:
            return None
        if captions["model"] == NONE:
            raise UserError(
                f"curation.captions.write is {captions['write']} but curation.captions.model is "
                "none: set the model, for example to OpenGVLab/InternVL3-1B-hf, or choose "
                "curation.captions.write=never."
            )
        return cls(captions)

    def setup(self) -> None:
        """Read processor and model, onto a GPU if there is one.

        Raises UserError when they are missing, damaged or no such model.
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        folder = self.weights.folder()
        self.weights.config(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (ImportError, MemoryError):
            raise
        # A missing vocabulary, template or processor shows in a dozen kinds of errors.
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["damaged"])[0]
            raise self.weights.refusal("have no processor that can be read", reason) from error
        if not getattr(self.processor, "chat_template", None):
            raise self.weights.refusal("cannot be loaded", "they come without a chat template")
        cutter: Any = getattr(self.processor, "image_processor", None)
        if hasattr(cutter, "max_patches"):
            cutter.max_patches = int(self.captions["tiles"])
        model = self.weights.load(AutoModelForImageTextToText, logging, folder, dtype=dtype)
        # Settings of sampling that come with the weights mean nothing to greedy decoding.
        for name in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, name, None)
        self.model: Any = model.to(self.device)

    def wants(self, caption: str) -> bool:
        """Whether a picture with this caption gets a new one."""
        return self.captions["write"] == ALL or not caption.strip()

    def write(self, batch: Sequence[Picture]) -> list[str]:
        """One caption a picture, on a single line, `params.curation.captions.batch` at a time."""
        size = int(self.captions["batch"])
        written: list[str] = []
        for first in range(0, len(batch), size):
            written += self._write(batch[first : first + size])
        return written

    def _write(self, batch: Sequence[Picture]) -> list[str]:
        import torch
        from PIL import Image

        talks = []
        for picture in batch:
            image = {"type": "image", "image": Image.fromarray(picture.pixels)}
            text = {"type": "text", "text": str(self.captions["prompt"])}
            talks.append([{"role": "user", "content": [image, text]}])
        inputs = self.processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # The answer begins where the prompt ends, so shorter prompts are filled up in front.
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=int(self.captions["max_new_tokens"]),
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
