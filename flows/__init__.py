"""Prefect flows, one file a job. Nothing here imports torch."""
