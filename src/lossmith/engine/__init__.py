"""The only room that sees the vocabulary axis.

``sweep`` turns logits into the statistics that ``stats`` names, one block of rows at a
time, and has the one backward; ``torch_rows`` is the arithmetic on a block.
"""
