"""Runs of the pipeline beside one another: `djepa compare`."""
