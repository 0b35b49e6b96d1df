"""The data of a run: text, tokens, blocks, and corrupted blocks."""
