"""Prefect flows, one file a job. Nothing here imports torch."""

import os

# Read by Prefect when it is first imported; the others' switches are in components/__init__.py.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# The first start of the built-in server makes its database: on a busy machine that takes longer
# than Prefect's own 20 seconds.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
