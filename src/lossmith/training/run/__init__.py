"""A run: the story (`runner`), the loop (`trainer`), its folder, and what it shows and logs."""
