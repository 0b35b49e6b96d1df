"""Parts of composed objectives: each a module that brings a per-token term or a scalar. One file each."""
