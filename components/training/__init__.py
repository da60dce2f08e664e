"""Losses, optimiser, checkpoints, phases and preference optimisation."""
