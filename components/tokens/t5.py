"""The paper's text encoder: frozen T5, last hidden states (spec, section 1)."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from components.errors import UserError
from components.tokens.text import TextEncoder
from components.tokens.weights import FrozenWeights

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class T5Encoder(TextEncoder):
    """transformers' T5EncoderModel; width is the model's d_model.

    The weights (9 GB for T5-XXL in bfloat16) are read at the first prompt: who only wants the
    width, or writes the encoder's name into a saved model, does not pay for them.
    """

    kind = "t5"

    def __init__(
        self,
        length: int,
        id: str,
        revision: str,
        subfolder: str,
        tokenizer_subfolder: str,
        precision: str,
    ) -> None:
        """Find the weights and read their config and vocabulary.

        length: tokens a prompt at most, the end mark included. id, revision, subfolder: see
        `FrozenWeights`; tokenizer_subfolder holds the vocabulary; both are "" where all lies
        in one folder. precision: of the weights, float32 or bfloat16.
        Raises UserError when something is not to be had or of another model.
        """
        super().__init__(length)
        if precision not in PRECISIONS:
            raise UserError(
                f"model.text.precision is {precision!r}: set it to {' or '.join(PRECISIONS)}."
            )
        self.precision = precision
        self._weights = FrozenWeights(
            id, revision, (subfolder, tokenizer_subfolder), "model.text.id", "text=words"
        )
        self._folder = self._weights.folder()
        config = self._weights.config(self._folder)
        if config.get("model_type") != "t5" or "d_model" not in config:
            found = config.get("model_type") or config.get("_class_name")
            raise self._weights.refusal("cannot be loaded", f"it is a {found} model, not T5")
        self.width = int(config["d_model"])
        self.id = str(self._folder.resolve()) if self._weights.is_local else id
        self._tokenizer = self._read_tokenizer(tokenizer_subfolder, int(config["vocab_size"]))

    def _read_tokenizer(self, subfolder: str, known: int) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._folder, subfolder=subfolder, local_files_only=True
            )
        except (ImportError, MemoryError):
            raise
        # A damaged vocabulary shows in many kinds of errors.
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["damaged"])[0]
            raise self._weights.refusal("have no vocabulary that can be read", reason) from error
        if len(tokenizer) > known:
            reason = f"{len(tokenizer)} tokens for {known} embeddings"
            raise self._weights.refusal("have the vocabulary of another model", reason)
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel
        from transformers.utils import logging

        dtype = PRECISIONS[self.precision]
        model = self._weights.load(T5EncoderModel, logging, self._folder, dtype=dtype)
        return model.to(self.device)

    def to(self, device: torch.device | str) -> "T5Encoder":
        """Run on a device from now on."""
        super().to(device)
        if "_model" in self.__dict__:
            self._model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`."""
        batch = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return states * mask[..., None], mask.bool()

    def config(self) -> dict[str, Any]:
        """Kind, length, precision and the names by which the weights are found again."""
        subfolder, tokenizer_subfolder = self._weights.subfolders
        return {
            **super().config(),
            "id": self.id,
            "revision": self._weights.revision,
            "subfolder": subfolder,
            "tokenizer_subfolder": tokenizer_subfolder,
            "precision": self.precision,
        }
