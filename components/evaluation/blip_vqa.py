"""BLIP-VQA of T2I-CompBench: BLIP is asked for each noun phrase of the prompt, yes or no.

Follows the official BLIP_vqa.py (Karine-Huang/T2I-CompBench): the question "{noun chunk}?",
p(yes) / (p(yes) + p(no)) at the first decoded token, four decimals each; a picture's score is the
product over its prompt's first eight chunks, 1 where there is none.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from components.errors import UserError
from components.evaluation.clip_score import portrait
from components.evaluation.folder import Sample
from components.progress import Progress
from components.tokens.weights import FrozenWeights

# The official evaluator's: part of the metric, not settings.
MOST_CHUNKS, MOST_WORDS, MOST_TOKENS = 8, 50, 35
NO_CHUNKS = ("top", "the side", "the left", "the right")
DROPPED = re.compile(r'[.!"()*#:;~]')
INSTEAD = "--annotations DIR, results of the official tool"

Chunker = Callable[[str], list[str]]  # a prompt's noun chunks


class BlipVqa:
    """Scores how many of a prompt's noun phrases a picture shows.

    settings: `evaluation.blip_vqa`: `model`, `revision`, `size` (the side to which pictures are
    resized, px), `batch` (pictures). chunks: finds noun chunks. On the GPU if there is one.
    UserError for weights that are not there, damaged, or of another kind.
    """

    def __init__(self, settings: Mapping[str, Any], chunks: Chunker, chunked_by: str) -> None:
        from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil
        from transformers.utils import logging

        self.weights = FrozenWeights(
            str(settings["model"]),
            str(settings["revision"]),
            ("",),
            "evaluation.blip_vqa.model",
            INSTEAD,
        )
        self.chunks, self.chunked_by, self.batch = chunks, chunked_by, int(settings["batch"])
        self.size = int(settings["size"])
        folder = self.weights.folder()
        kind = self.weights.config(folder).get("model_type")
        if kind != "blip":
            raise self.weights.refusal("cannot be loaded", f"it is a {kind} model, not BLIP")
        model = self.weights.load(BlipForQuestionAnswering, logging, folder, dtype=torch.float32)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = model.to(self.device)
        try:
            self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = BlipImageProcessorPil.from_pretrained(
                folder, local_files_only=True, size={"height": self.size, "width": self.size}
            )
        # A missing file and a damaged one raise different errors and mean the same.
        except (OSError, ValueError, TypeError) as error:
            reason = "tokeniser or preprocessor_config.json are missing or damaged"
            raise self.weights.refusal("cannot be loaded", reason) from error
        self.answers = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self.tokenizer.unk_token_id in self.answers:
            raise self.weights.refusal("cannot be used", "its tokeniser does not know yes and no")
        # The official tokeniser has two tokens more than BERT's: [DEC] begins an answer, and
        # [ENC] stands at a question's beginning where BERT has [CLS].
        self.decode = int(model.config.text_config.bos_token_id)
        self.encode = self.decode + 1
        if self.encode >= int(model.config.text_config.vocab_size):
            raise self.weights.refusal("cannot be used", "it lacks the tokens [DEC] and [ENC]")

    def about(self) -> str:
        """What made the scores, for a result file."""
        return (
            f"BLIP-VQA {self.weights}, pictures at {self.size} px, noun chunks by {self.chunked_by}"
        )

    def self_test(self) -> None:
        """In a portrait that matplotlib brings it sees a woman and no dog, or UserError."""
        woman, dog = self.yes([portrait()] * 2, ["a woman?", "a dog?"])
        if not woman > 0.5 > dog:
            raise UserError(
                f"{self.weights} failed its self-test: in the portrait of a woman it answers "
                f"'a woman?' with yes by {woman:.2f} and 'a dog?' by {dog:.2f}; no score is "
                "reported. Set evaluation.blip_vqa.model to trained weights."
            )

    def scores(self, pictures: Sequence[tuple[Path, str]]) -> list[float]:
        """The score of each (picture, prompt), 0 to 1. UserError for an unreadable picture."""
        asked = {prompt: self.questions(prompt) for prompt in dict.fromkeys(p for _, p in pictures)}
        progress, found = Progress("BLIP-VQA", len(pictures), "pictures"), []
        for first in range(0, len(pictures), self.batch):
            part = pictures[first : first + self.batch]
            images = [Sample(path.name, {}, path).open() for path, _ in part]
            whose = [i for i, (_, prompt) in enumerate(part) for _ in asked[prompt]]
            questions = [question for _, prompt in part for question in asked[prompt]]
            said = self.yes(images, questions, whose) if questions else []
            for i in range(len(part)):
                # As officially: four decimals of each answer, a product of 32 bits, four of it.
                each = [np.float32(f"{p:.4f}") for p, j in zip(said, whose, strict=True) if i == j]
                found.append(float(f"{np.prod(each, dtype=np.float32):.4f}"))
            progress.at(len(found))
        return found

    def questions(self, prompt: str) -> list[str]:
        """What is asked about a picture of a prompt, as BLIP's own code cleans questions."""
        kept = [chunk for chunk in self.chunks(prompt) if chunk not in NO_CHUNKS][:MOST_CHUNKS]
        plain = [DROPPED.sub("", f"{chunk}?".lower()).rstrip(" ") for chunk in kept]
        return [" ".join(text.split(" ")[:MOST_WORDS]) for text in plain]

    @torch.inference_mode()
    def yes(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        whose: Sequence[int] | None = None,
    ) -> list[float]:
        """p(yes) / (p(yes) + p(no)) of each question; `whose` is the number of its image."""
        rgb = [image.convert("RGB") for image in images]
        pixels = self.processor(images=rgb, return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(
            pixel_values=pixels.to(self.device), interpolate_pos_encoding=True
        ).last_hidden_state[list(range(len(images)) if whose is None else whose)]
        tokens = self.tokenizer(
            list(questions),
            padding="longest",
            truncation=True,
            max_length=MOST_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        ids, mask = tokens["input_ids"].clone(), tokens["attention_mask"]
        ids[:, 0] = self.encode
        understood = self.model.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=self.device),
        ).last_hidden_state
        first = self.model.text_decoder(
            input_ids=torch.full((len(ids), 1), self.decode, device=self.device),
            encoder_hidden_states=understood,
            encoder_attention_mask=mask,
        ).logits[:, 0]
        return first[:, self.answers].float().softmax(-1)[:, 0].tolist()


def spacy_chunks(name: str) -> tuple[Chunker, str]:
    """Noun chunks by a pipeline of spaCy, officially en_core_web_sm; and what found them.

    name: of an installed pipeline, or a folder. UserError where it or spaCy is not there: other
    chunks would be other questions, and other scores.
    """
    try:
        import spacy

        pipeline = spacy.load(name)
        next(iter(pipeline("a cup").noun_chunks), None)  # ValueError without a parser
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        raise UserError(
            f"BLIP-VQA asks about the noun chunks that spaCy's {name} finds, and it cannot be used "
            f"({reason}): `pip install spacy` and `python -m spacy download en_core_web_sm`, set "
            "evaluation.blip_vqa.spacy to a folder that holds it, or give chunks found elsewhere "
            "with --chunks FILE."
        ) from None
    said = pipeline.meta
    about = f"spaCy {spacy.__version__} {said['lang']}_{said['name']} {said['version']}"
    return (lambda prompt: [chunk.text for chunk in pipeline(prompt).noun_chunks]), about


def chunk_file(file: Path) -> tuple[Chunker, str]:
    """Noun chunks found elsewhere: JSON lines {"prompt": …, "chunks": […]}; and their file.

    The chunker raises UserError for a prompt without a line.
    """
    known: dict[str, list[str]] = {}
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            if not all(isinstance(chunk, str) for chunk in row["chunks"]):
                raise ValueError(f"line {number}: a chunk is no text")
            known[row["prompt"]] = list(row["chunks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read as JSON lines with prompt and chunks ({error!r})."
        ) from None

    def chunks(prompt: str) -> list[str]:
        if prompt not in known:
            raise UserError(f"{file} has no line for the prompt {prompt!r}; add its noun chunks.")
        return known[prompt]

    return chunks, f"the file {file.name}"
