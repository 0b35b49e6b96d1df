"""Weights of a checkpoint that have other names than the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_renamed(model: Any, folder: str | Path) -> bool:
    """Load a checkpoint whose weights are not under the model's names, and say whether it was one: others,
    and models that are wrapped or have adapters, are left to the Trainer.

    Transformers saves mixtures of experts under the names they were published with, Mixtral's experts one by
    one. ``from_pretrained`` reads them. The Trainer looks for the model's own names instead, and leaves the
    experts as they were made.

    Raises:
        ValueError: the checkpoint lacks weights of the model.
    """
    if not isinstance(model, PreTrainedModel) or names_in(Path(folder)) <= model.state_dict().keys():
        return False
    original: Any = getattr(type(model), "without_loss", type(model))
    saved, found = original.from_pretrained(folder, config=model.config, output_loading_info=True)
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(names)} weights of this {type(model).__name__}, {names[0]} for one, which "
            "would begin anew in the middle of a run. Resume with the model that was trained there"
        )
    # Copied: they lie in memory as they did, and sums come out the same to the last bit.
    model.load_state_dict(saved.state_dict())
    return True


def names_in(folder: Path) -> set[str]:
    """The names of the weights that a checkpoint has as safetensors."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else set()
