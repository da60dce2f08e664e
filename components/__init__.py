"""The library: plain Python and PyTorch, no Prefect."""

import os

# Nothing here reports home. Set before any library is imported; DVC's switch is in .dvc/config.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)
