"""Options: each signature declares their types, ranges and meanings; messages name mistakes."""

from lossmith.options.kinds import Kind, kind_of, option
from lossmith.options.mappings import check_order, read_options
from lossmith.options.matching import did_you_mean, is_misspelt, nearest, unknown_option
from lossmith.options.signatures import Declared, options_of, strict_options

__all__ = [
    "Declared",
    "Kind",
    "check_order",
    "did_you_mean",
    "is_misspelt",
    "kind_of",
    "nearest",
    "option",
    "options_of",
    "read_options",
    "strict_options",
    "unknown_option",
]
