"""Integrations with other frameworks, one file each, imported only when used."""
