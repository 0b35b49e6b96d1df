"""``load_judge``: a trained sequence scorer, to be asked how wrong sequences are.

Weights are read from safetensors, or from a `.pt` that loads without running code from it; nothing is
ever unpickled.
"""

from __future__ import annotations

import contextlib
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "pip install 'lossmith[train]'"
WEIGHT_NAMES = ("model", "state_dict", "model_state_dict")
TRIAL_LENGTH = 8
LONGEST_REASON = 300  # characters of a library's message
CONFIG_NAMES = ("config", "model_config", "model_args")
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


class SequenceJudge(nn.Module):
    """A sequence classifier of one label, read as a judge: ids [B, L] -> wrongness [B] in [0, 1].

    Args:
        model: the classifier, a Hugging Face model; it is put into evaluation mode.
        cls_token_id: the token that a sequence begins with, unless the model's configuration says.
        block_size: the longest sequence, that token included; None for any.

    Attributes:
        vocab_size: how many tokens it knows.
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
        # No attention mask: there is no padding, and models look into a mask, which waits for the device.
        scores = self.model(input_ids=ids).logits  # [B, 1]
        return scores.float().squeeze(-1).sigmoid()


def load_judge(checkpoint: str | Path, *, device: Any = None, dtype: Any = None) -> SequenceJudge:
    """Load a sequence scorer.

    Args:
        checkpoint: a folder that `save_pretrained` wrote, of a model for sequence classification with one
            label; or a `.pt` with a dictionary of its ``model`` (the state dict) and ``config`` (a
            dictionary with the ``model_type``).
        device: where to run; without it (or ``auto``) where the ids are.
        dtype: of the weights, a ``torch.dtype`` or its name; float32 without it (or ``auto``).

    Raises:
        ValueError: the checkpoint is no such thing; the message names it and says what is wrong.
        FileNotFoundError: there is nothing at that path.
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"loading the judge {checkpoint} needs transformers; {REMEDY}")
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"judge checkpoint {path} does not exist. Pass the folder of a trained sequence scorer"
        )
    model, cls_token_id = _from_folder(path) if path.is_dir() else _from_file(path)
    # A model that looks for the last token before the padding must not take a token for padding.
    model.config.pad_token_id = -1  # type: ignore[union-attr]
    model = model.requires_grad_(False).to(_dtype(dtype, path))
    judge = SequenceJudge(model, cls_token_id=cls_token_id)
    if judge.cls_token_id is not None and not 0 <= judge.cls_token_id < judge.vocab_size:
        raise ValueError(
            f"judge checkpoint {path} has cls_token_id={judge.cls_token_id}, outside its vocabulary of "
            f"{judge.vocab_size}"
        )
    with _explained(path):
        judge.block_size = _longest(judge)
        if device is not None and str(device) != "auto":
            judge = judge.to(device)
    return judge


def _longest(judge: SequenceJudge) -> int | None:
    """The longest sequence that the model really takes, found by trying; None where it states no length."""
    stated = getattr(judge.model.config, "max_position_embeddings", None) or 0
    if stated <= 0:
        judge(torch.zeros(1, TRIAL_LENGTH, dtype=torch.long))
        return None
    # Some architectures count positions from 2.
    for length in (stated, stated - 2):
        try:
            judge(torch.zeros(1, length, dtype=torch.long))
        except (IndexError, RuntimeError):  # past the end of a table of positions
            continue
        return length
    raise ValueError(f"it takes neither {stated} tokens, which its configuration states, nor {stated - 2}")


def _from_folder(path: Path) -> tuple[nn.Module, int | None]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not (path / "config.json").is_file():
        inside = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
        hint = f"It holds checkpoints; pass {inside[-1]}" if inside else "Pass what save_pretrained wrote"
        raise ValueError(f"judge checkpoint {path} has no config.json. {hint}")
    with _explained(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    _require_scorer(config, path)
    with _explained(path):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ValueError(
            f"judge checkpoint {path} lacks {_some(lacking)}: it is not a trained sequence scorer"
        )
    return model, _cls_of_tokenizer(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the libraries, with the checkpoint's name and at a readable length."""
    try:
        yield
    except Exception as error:  # the libraries' errors are many
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"judge checkpoint {path} cannot be loaded: {reason}") from error


def _require_scorer(config: Any, path: Path) -> None:
    architecture = (config.architectures or ["model for sequence classification"])[0]
    if config.architectures and not architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"judge checkpoint {path} is a {architecture}; expected a model for sequence classification "
            "(trained with --mode=sequence_scorer)"
        )
    if config.num_labels != 1:
        raise ValueError(
            f"judge checkpoint {path} has {config.num_labels} labels; expected 1, the score of a sequence"
        )


def _cls_of_tokenizer(path: Path) -> int | None:
    from transformers import AutoTokenizer

    if not (path / "tokenizer_config.json").is_file():
        return None
    with _explained(path):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return tokenizer.cls_token_id


def _from_file(path: Path) -> tuple[nn.Module, int | None]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(
            f"judge checkpoint {path} cannot be read without running code from it, which is refused, or is "
            "damaged. Save it again as torch.save({'model': model.state_dict(), "
            "'config': model.config.to_dict()}, path), or with model.save_pretrained(folder)"
        ) from error
    if not isinstance(saved, Mapping):
        raise ValueError(f"judge checkpoint {path} holds a {type(saved).__name__}; expected a dictionary")
    weights = next((saved[name] for name in WEIGHT_NAMES if name in saved), None)
    config = next((saved[name] for name in CONFIG_NAMES if name in saved), None)
    if weights is None or not isinstance(config, Mapping) or "model_type" not in config:
        raise ValueError(
            f"judge checkpoint {path} holds {_some(map(str, saved))}; expected 'model', a state dict, "
            "and 'config', the dictionary of a Hugging Face configuration with its 'model_type'"
        )
    with _explained(path):
        built = AutoConfig.for_model(**config)
    _require_scorer(built, path)
    with _explained(path):
        model = AutoModelForSequenceClassification.from_config(built, trust_remote_code=False)
        model.load_state_dict({_unwrapped(name): value for name, value in weights.items()})
    return model, None


def _some(names: Iterable[str]) -> str:
    """The first few of the names."""
    names = list(names)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of the model put before it."""
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _dtype(dtype: Any, path: Path) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.float32
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"judge checkpoint {path} cannot be loaded as dtype={dtype!r}; try 'float32'")
    return named
