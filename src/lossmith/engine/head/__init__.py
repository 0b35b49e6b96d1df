"""A linear head in place of logits: chunks of tokens, matrix products, one sweep or two."""
