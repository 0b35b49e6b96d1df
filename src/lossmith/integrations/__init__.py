"""What connects lossmith with other frameworks; one file each, imported only when it is used."""
