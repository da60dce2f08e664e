"""Image tokeniser, text encoders and the encoded set."""
