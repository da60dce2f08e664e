"""Data feedback (paper, section 3): statistical-analysis sampling, references, critic."""
