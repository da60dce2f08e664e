"""The network, its sampler and the pipeline that a user loads."""

from components.model.pipeline import DJEPAPipeline

__all__ = ["DJEPAPipeline"]
