"""Runs, metrics and artifacts. The only file that knows MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """What a stage reports. This base class keeps nothing; see `MlflowTracker`."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings, flattened with dots."""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, images: int | None = None
    ) -> None:
        """Record figures at a training step and at a number of images seen."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file or folder beside the run."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
