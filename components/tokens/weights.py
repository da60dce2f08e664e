"""Frozen weights that others trained: found in a folder, in the hub's cache or on the hub."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import UserError

COPIED_BELOW = 100_000_000  # bytes; smaller frozen weights are copied into a saved model
HUB_SECONDS = 5.0  # the hub is asked once; without an answer by then it counts as unreachable


@dataclass(frozen=True)
class FrozenWeights:
    """Where weights come from, and what to tell a user who does not have them.

    id: a repository of the Hugging Face hub or a local folder. revision: the hub's commit, tag or
    branch. subfolders: those needed of it, the first one with config.json and the weights; ""
    is the top. setting: the parameter that holds the id. instead: what to choose without them.
    """

    id: str
    revision: str
    subfolders: tuple[str, ...]
    setting: str
    instead: str

    def __str__(self) -> str:
        parts = " and ".join(name for name in self.subfolders if name)
        return f"{self.id} (revision {self.revision}{', ' + parts if parts else ''})"

    @property
    def is_local(self) -> bool:
        """Whether the id can only be, or is, a folder of this machine."""
        return (
            self.id.startswith((".", "/", "~"))
            or self.id.count("/") > 1
            or Path(self.id).expanduser().is_dir()
        )

    def folder(self) -> Path:
        """The local folder with the subfolders, fetched from the hub if it is not here yet.

        The order is: local folder, hub cache, hub. Raises UserError when there is no such place
        or it lacks a file.
        """
        if self.is_local:
            folder = Path(self.id).expanduser()
            lacking = _lacking(folder, self.subfolders)
            if lacking:
                raise self.refusal("cannot be loaded", f"{folder} has no {lacking}")
            return folder
        from huggingface_hub import snapshot_download

        wanted = [f"{name}/*" if name else "*" for name in self.subfolders]
        try:
            cached = Path(
                snapshot_download(
                    self.id, revision=self.revision, allow_patterns=wanted, local_files_only=True
                )
            )
            if not _lacking(cached, self.subfolders):
                return cached
        # The cache's errors share no class; each means that the hub has to be asked.
        except Exception:
            pass
        return self._from_hub(wanted)

    def _from_hub(self, wanted: Sequence[str]) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        try:
            # One question with a short limit, because a download tries each file for minutes.
            HfApi().model_info(self.id, revision=self.revision, timeout=HUB_SECONDS)
            folder = Path(
                snapshot_download(
                    self.id,
                    revision=self.revision,
                    allow_patterns=list(wanted),
                    ignore_patterns=["*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.h5"],
                )
            )
        # Connection, proxy, permission and name errors share no class but this one.
        except Exception as error:
            reason = f"the hub gives no answer to it: {_first_line(error)}"
            raise self.refusal("are not on this machine", reason) from error
        lacking = _lacking(folder, self.subfolders)
        if lacking:
            raise self.refusal("cannot be loaded", f"the repository has no {lacking}")
        return folder

    def refusal(self, what: str, reason: str) -> UserError:
        """The one sentence that names the weights and the ways to get them."""
        include = "".join(f' --include "{name}/*"' for name in self.subfolders if name)
        fetch = "" if self.is_local else f" --revision {self.revision}"
        name = "ID" if self.is_local else self.id
        return UserError(
            f"The weights {self} {what} ({reason}): fetch them with "
            f"`hf download {name}{fetch}{include}` where the hub can be reached, or set "
            f"{self.setting} to a local folder that holds them, or choose {self.instead}."
        )

    def config(self, folder: Path) -> dict[str, Any]:
        """The JSON beside the weights. UserError when it is none."""
        path = folder / self.subfolders[0] / "config.json"
        try:
            config = json.loads(path.read_text())
            if isinstance(config, dict):
                return config
            reason = "not an object"
        except (OSError, ValueError) as error:
            reason = _first_line(error)
        raise self.refusal("cannot be loaded", f"{path} cannot be read: {reason}")

    def load(self, model: Any, logging: Any, folder: Path, **options: Any) -> Any:
        """`model.from_pretrained` of diffusers or transformers, frozen, on the CPU.

        logging: the library's own, silenced, because the refusal is to be the only sentence.
        Raises UserError for weights that are damaged or of another shape.
        """
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            loaded, info = model.from_pretrained(
                folder,
                subfolder=self.subfolders[0],
                use_safetensors=True,  # nothing is unpickled
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (ImportError, MemoryError):
            raise
        # Libraries answer a wrong folder with a dozen kinds of errors that mean the same here.
        except Exception as error:
            raise self.refusal("cannot be loaded", _first_line(error)) from error
        finally:
            logging.set_verbosity(before)
        unfit = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if unfit:
            raise self.refusal("cannot be loaded", f"{len(unfit)} tensors do not fit: {unfit[0]}")
        return loaded.requires_grad_(False).eval()


def _lacking(folder: Path, subfolders: Sequence[str]) -> str:
    """The first file that is not in `folder`, or an empty string.

    The first subfolder needs config.json and all its safetensors, the others only be there.
    """
    first = folder / subfolders[0]
    if not (first / "config.json").is_file():
        return str(Path(subfolders[0]) / "config.json")
    needed = {"*.safetensors"}
    for index in first.glob("*.safetensors.index.json"):
        try:
            needed = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"readable {Path(subfolders[0]) / index.name}"
    for pattern in sorted(needed):
        if not any(first.glob(pattern)):
            return str(Path(subfolders[0]) / pattern)
    return next((name for name in subfolders[1:] if not (folder / name).is_dir()), "")


def _first_line(error: BaseException) -> str:
    """The error's class and its first line, without a full stop."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}, {lines[0].strip().rstrip('.')}"
