"""``load_judge``: loads a trained sequence scorer, which says how wrong sequences are.

It reads weights from safetensors, or from a `.pt` in a way that runs no code from it; nothing is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_NAMES = ("model", "state_dict", "model_state_dict")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
CONFIG_NAMES = ("config", "model_config", "model_args")
OF_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # DistributedDataParallel's and torch.compile's
TRIAL_LENGTH = 8
LONGEST_REASON = 300  # characters of a library's message


class SequenceJudge(nn.Module):
    """A sequence classifier with one label, used as a judge: ids [B, L] -> wrongness [B] in [0, 1].

    Args:
        model: the classifier, a Hugging Face model; it is put into evaluation mode.
        cls_token_id: the token that begins a sequence, unless the model's configuration has one.
        block_size: the longest sequence, including that token; None for any length.

    Attributes:
        vocab_size: the size of its vocabulary.
    """

    def __init__(
        self, model: nn.Module, *, cls_token_id: int | None = None, block_size: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        own = getattr(config, "cls_token_id", None)
        self.cls_token_id = cls_token_id if own is None else own
        self.block_size = block_size
        self.vocab_size: int = config.vocab_size
        self.eval()

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        if next(self.model.parameters()).device != ids.device:
            self.model.to(ids.device)
        # No attention mask: there is no padding, and models inspect a mask, which waits for the device.
        scores = self.model(input_ids=ids).logits  # [B, 1]
        return scores.float().squeeze(-1).sigmoid()


def load_judge(checkpoint: str | Path, *, device: Any = None, dtype: Any = None) -> SequenceJudge:
    """Load a sequence scorer.

    Args:
        checkpoint: a folder that `save_pretrained` wrote, of a sequence classification model with one label;
            or a `.pt` holding a dictionary with ``model`` (the state dict) and ``config`` (a dictionary with
            the ``model_type``).
        device: where to run; by default (or with ``auto``) on the device of the ids.
        dtype: of the weights, a ``torch.dtype`` or its name; by default (or with ``auto``) float32.

    Raises:
        ValueError: not such a checkpoint; the message names it and says what is wrong.
        FileNotFoundError: there is nothing at that path.
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"loading the judge {checkpoint} needs transformers; pip install 'lossmith[train]'")
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"judge checkpoint {path} does not exist. Pass the folder of a trained sequence scorer"
        )
    try:
        return _load(path, device, dtype)
    except _Refused as refused:
        raise ValueError(f"judge checkpoint {path} {refused}") from refused.__cause__
    except Exception as error:  # the libraries raise many errors, with long messages
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"judge checkpoint {path} cannot be loaded: {reason}") from error


class _Refused(Exception):
    """What is wrong with a checkpoint, in words that follow its name."""


def _load(path: Path, device: Any, dtype: Any) -> SequenceJudge:
    """The judge from an existing checkpoint."""
    model, cls = _from_folder(path) if path.is_dir() else (_from_file(path), None)
    # A model that looks for the last token before the padding must not take a token for padding.
    model.config.pad_token_id = -1  # type: ignore[union-attr]
    judge = SequenceJudge(model.requires_grad_(False).to(_dtype(dtype)), cls_token_id=cls)
    cls, size = judge.cls_token_id, judge.vocab_size
    if cls is not None and not 0 <= cls < size:
        raise _Refused(f"has cls_token_id={cls}, outside its vocabulary of {size}")
    judge.block_size = _longest(judge)
    return judge if device is None or str(device) == "auto" else judge.to(device)


def _longest(judge: SequenceJudge) -> int | None:
    """The longest sequence that the model really accepts, found by trying; None if it states no length."""
    stated = getattr(judge.model.config, "max_position_embeddings", None) or 0
    if stated <= 0:
        judge(torch.zeros(1, TRIAL_LENGTH, dtype=torch.long))
        return None
    for length in (stated, stated - 2):  # some architectures count positions from 2
        with contextlib.suppress(IndexError, RuntimeError):  # past the end of the position embeddings
            judge(torch.zeros(1, length, dtype=torch.long))
            return length
    raise ValueError(f"it takes neither {stated} tokens, which its configuration states, nor {stated - 2}")


def _from_folder(path: Path) -> tuple[nn.Module, int | None]:
    """The model that `save_pretrained` wrote, and its tokenizer's id of the token that begins a sequence."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if not (path / "config.json").is_file():
        inside = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
        hint = f"It holds checkpoints; pass {inside[-1]}" if inside else "Pass what save_pretrained wrote"
        raise _Refused(f"has no config.json. {hint}")
    _require_scorer(AutoConfig.from_pretrained(path, **LOCAL))
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, **LOCAL
    )
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise _Refused(f"lacks {_some(lacking)}: it is not a trained sequence scorer")
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(path, **LOCAL).cls_token_id if has_tokenizer else None


def _from_file(path: Path) -> nn.Module:
    """The model of a `.pt`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise _Refused(
            "cannot be read without running code from it, which is refused, or is damaged. Save it again as "
            "torch.save({'model': model.state_dict(), 'config': model.config.to_dict()}, path), or with "
            "model.save_pretrained(folder)"
        ) from error
    if not isinstance(saved, Mapping):
        raise _Refused(f"holds a {type(saved).__name__}; expected a dictionary")
    weights = next((saved[name] for name in WEIGHT_NAMES if name in saved), None)
    config = next((saved[name] for name in CONFIG_NAMES if name in saved), None)
    if weights is None or not isinstance(config, Mapping) or "model_type" not in config:
        raise _Refused(
            f"holds {_some(map(str, saved))}; expected 'model', a state dict, and 'config', the dictionary "
            "of a Hugging Face configuration with its 'model_type'"
        )
    built = AutoConfig.for_model(**config)
    _require_scorer(built)
    model = AutoModelForSequenceClassification.from_config(built, trust_remote_code=False)
    model.load_state_dict({OF_WRAPPERS.sub("", name): value for name, value in weights.items()})
    return model


def _require_scorer(config: Any) -> None:
    """Refuse the configuration of a model that is not a classifier with one label."""
    architecture = (config.architectures or ["model for sequence classification"])[0]
    if config.architectures and not architecture.endswith("ForSequenceClassification"):
        raise _Refused(
            f"is a {architecture}; expected a model for sequence classification "
            "(trained with --mode=sequence_scorer)"
        )
    if config.num_labels != 1:
        raise _Refused(f"has {config.num_labels} labels; expected 1, the score of a sequence")


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _dtype(dtype: Any) -> torch.dtype:
    """The requested dtype."""
    if dtype is None or dtype == "auto":
        return torch.float32
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise _Refused(f"cannot be loaded as dtype={dtype!r}; try 'float32'")
    return named
