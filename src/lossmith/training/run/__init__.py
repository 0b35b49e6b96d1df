"""A run: the story (`runner`), the loop (`trainer`), the folder, what is shown and what is written down."""
