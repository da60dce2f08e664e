"""LoRA adapters of a pipeline's network, by peft and in peft's own files.

peft's import takes seconds, so it waits for the first adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import UserError
from components.files import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel

    from components.model.network import Network

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The linear layers of both streams of every block, in context encoder and predictor.
LAYERS = r".*blocks\.\d+\.(text|image)\.(qkv|proj|up|down)"


class LoraMixin:
    """Adds, loads, saves, switches and merges one adapter of `transformer`.

    While there is one its layers stand in the network's own, whose weights they leave as they are.
    """

    transformer: Network
    adapter: PeftModel | None = None  # peft's handle; the network itself is changed in place

    def add_lora(self, rank: int, alpha: float) -> PeftModel:
        """Put a new adapter into the network and freeze the rest of it, for training.

        A layer's W becomes W + alpha/rank · B·A with A (rank, in), B (out, rank) and B zero, so
        nothing is drawn differently yet. Train with an optimiser over the parameters that require
        a gradient. Returns peft's model. UserError if there is an adapter already, or rank < 1.
        """
        from peft import LoraConfig, get_peft_model

        self.refuse_adapter("add_lora")
        if rank < 1:
            raise UserError(f"rank is {rank}: give a whole number from 1 on.")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS)  # type: ignore[arg-type]
        self.adapter = get_peft_model(self.transformer, config)  # type: ignore[arg-type]
        return self.adapter

    def save_lora_weights(self, folder: Path | str) -> None:
        """Write adapter_config.json and adapter_model.safetensors. UserError without an adapter."""
        adapter = self._adapter("save_lora_weights")
        with atomic_folder(Path(folder), CONFIG) as target:
            adapter.save_pretrained(str(target))

    def load_lora_weights(self, source: Path | str) -> None:
        """Put a saved adapter into the network: a folder of peft's two files, or its weights' path.

        UserError for a file that is missing or no LoRA adapter of this network, which then stays
        as it was.
        """
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        from peft import set_peft_model_state_dict as set_weights
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.refuse_adapter("load_lora_weights")
        folder = Path(source)
        if folder.name == WEIGHTS:
            folder = folder.parent
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no {name}: give the folder of a LoRA adapter saved by peft, "
                    f"with {CONFIG} and {WEIGHTS}."
                )
        unfit = f"{folder} holds no LoRA adapter of this network"
        remedy = "give an adapter that was trained on this model."
        try:
            config = LoraConfig.from_pretrained(str(folder))
            weights = load_file(folder / WEIGHTS)
            adapter = get_peft_model(self.transformer, config)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"{unfit} ({str(error).splitlines()[0]}): {remedy}") from error
        here = {k: v.shape for k, v in get_peft_model_state_dict(adapter).items()}
        there = {k: v.shape for k, v in weights.items()}
        if here != there:
            adapter.unload()
            wrong = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            raise UserError(f"{unfit} ({len(wrong)} weights differ, as {wrong[0]}): {remedy}")
        set_weights(adapter, weights)
        adapter.requires_grad_(False)
        self.adapter = adapter

    def unload_lora_weights(self) -> None:
        """Take the adapter out; the network is as it was before. Nothing happens without one."""
        if self.adapter is not None:
            self.adapter.unload()
            self._without()

    def fuse_lora(self) -> None:
        """Merge the adapter into the network's weights for good. UserError without one."""
        self._adapter("fuse_lora").merge_and_unload()
        self._without()

    def disable_lora(self) -> None:
        """Draw without the adapter until `enable_lora`. UserError without one."""
        self._adapter("disable_lora").base_model.disable_adapter_layers()

    def enable_lora(self) -> None:
        """Draw with the adapter again. UserError without one."""
        self._adapter("enable_lora").base_model.enable_adapter_layers()

    def refuse_adapter(self, what: str) -> None:
        """UserError for `what`, which does not go while an adapter is in the network."""
        if self.adapter is not None:
            raise UserError(
                f"{what}: the pipeline has a LoRA adapter; call fuse_lora() to keep it in the "
                "weights or unload_lora_weights() to take it out first."
            )

    def _adapter(self, what: str) -> Any:  # a PeftModel, whose annotations hide its methods
        if self.adapter is None:
            raise UserError(f"{what}: the pipeline has no LoRA adapter; load or add one first.")
        return self.adapter

    def _without(self) -> None:
        # peft froze the network when the adapter came.
        self.transformer.requires_grad_(True)
        self.adapter = None
