"""Training objectives of language models in PyTorch."""
