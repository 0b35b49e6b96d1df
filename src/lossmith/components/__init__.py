"""Parts of composed objectives: modules that contribute a per-token term or a scalar. One file each."""
