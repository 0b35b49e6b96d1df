"""What a run reads: a text, its tokens, blocks of them, and what is done to a block."""
