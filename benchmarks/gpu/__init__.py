"""Figures on one GPU: python -m benchmarks.gpu --help."""

import os

# Read when torch is imported. Batches of many shapes: without it memory falls into pieces too
# small for any.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
