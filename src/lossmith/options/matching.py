"""``nearest``: the name that a misspelt one was meant to be, for the library and the trainer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of the same things in other libraries.
SYNONYMS = {
    "input": "logits",
    "target": "targets",
    "labels": "targets",
    "weight": "class_weight",
    "weights": "token_weight",
    "attention_mask": "mask",
    "num_items_in_batch": "denominator",
    "z_loss_coefficient": "z_loss",
    "lse_square_scale": "z_loss",
    "gamma": "focal_gamma",
}
# The similarity, from 0 to 1, above which a name is suggested. Below, a guess misleads more than it helps.
ALIKE = 0.72
# The similarity above which a name is taken for a misspelling.
SURELY = 0.86


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, or None: better no guess than a bad one.

    It is another library's name for the same thing, the name with these initials (``lr``), the one name that
    has all its words (``eos_id``), or one that is spelled almost alike.

    Example:
        >>> from lossmith.options import nearest
        >>> known = ["learning_rate", "eos_token_id", "min_sequence_length", "targets"]
        >>> nearest("labels", known), nearest("lr", known), nearest("eos_id", known)
        ('targets', 'learning_rate', 'eos_token_id')
        >>> nearest("confidence_reg_strength", known) is None
        True
    """
    known = list(known)
    name = name.lower().replace("-", "_")
    if SYNONYMS.get(name) in known:
        return SYNONYMS[name]
    for is_meant in (_are_initials, _are_words):
        found = [candidate for candidate in known if is_meant(name, candidate)]
        if len(found) == 1:
            return found[0]
    found = difflib.get_close_matches(name, known, n=1, cutoff=ALIKE)
    return found[0] if found else None


def is_misspelt(name: str, known: Iterable[str]) -> bool:
    """Whether ``name`` can hardly be anything but a misspelling of a known name."""
    return bool(difflib.get_close_matches(name, list(known), n=1, cutoff=SURELY))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the nearest one, or all known names if none is near."""
    known = sorted(known)
    guess = nearest(name, known)
    return f"Did you mean {guess!r}?" if guess else f"It has {', '.join(known)}"


def unknown_option(owner: str, name: str, known: Iterable[str]) -> str:
    """The message for an option that ``owner`` does not have."""
    return f"{owner} has no option {name!r}. {did_you_mean(name, known)}"


def _are_initials(name: str, candidate: str) -> bool:
    return len(name) > 1 and "".join(word[:1] for word in candidate.split("_")) == name


def _are_words(name: str, candidate: str) -> bool:
    """Whether the words of ``name`` are some of the candidate's, in the same order."""
    rest = iter(candidate.split("_"))
    return all(word in rest for word in name.split("_"))
