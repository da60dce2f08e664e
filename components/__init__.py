"""The library: plain Python and PyTorch, no Prefect."""
