"""The embedded world: scenes with captions and exact ground truth."""
