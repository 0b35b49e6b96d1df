"""`nonfinite-N.safetensors`: a batch that was not finite, saved so that `lossmith replay` computes it again.

Tensors, and plain values as JSON in the file's header. Nothing in it is executed.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lossmith.engine.head.linear_head import LinearHead
from lossmith.engine.head.plan import HEAD_OPTIONS
from lossmith.training.config.keys import TrainConfig
from lossmith.training.errors import UserError
from lossmith.training.run.bad_step import Diagnosis
from lossmith.training.run.folder import delete_room
from lossmith.training.run.loss_call import LossCall
from lossmith.training.untrusted import GIB, MIB, Unreadable, is_moderate, parse_json, shortened

HEADER = "lossmith"  # the key of the JSON text in the file's header
FORMAT = 1
LARGEST_FILE = 16 * GIB
LARGEST_HEADER = 16 * MIB
LARGEST_HEAD = 2 * GIB  # hidden states and unembedding; larger ones are left out
EXPECTED = "a batch that lossmith train saved"
SAME = "same as"  # a tensor that is in the file under another name
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class SavedBatch:
    """The content of a file.

    Attributes:
        step, micro_batch, rank, num_ranks: whose batch it is.
        said: what was found when it was saved.
        checkpoint: the name of the newest checkpoint then, or "".
        config: the run's configuration, unchecked.
        call: what the loss was given; None if that was too large, or is not known.
        why_not: why there is no call.
        state: that of the loss.
        inputs: what the model was given.
        random: the states of the random numbers before its forward.
    """

    step: int
    micro_batch: int
    rank: int
    num_ranks: int
    said: str
    checkpoint: str
    config: dict[str, Any]
    call: LossCall | None
    why_not: str
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    random: dict[str, Tensor]


def name_of(step: int, rank: int = 0, num_ranks: int = 1) -> str:
    """The name of a step's file."""
    return f"nonfinite-{step}{f'-rank-{rank}' if num_ranks > 1 else ''}.safetensors"


def write_batch(
    path: Path,
    found: Diagnosis,
    config: TrainConfig,
    *,
    state: Mapping[str, Tensor],
    checkpoint: Path | None,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Write a micro-batch atomically.

    Raises:
        OSError: it cannot be written.
    """
    assert found.batch is not None
    tensors = {f"inputs.{n}": v for n, v in found.batch.inputs.items() if isinstance(v, Tensor)}
    tensors |= {f"random.{name}": value for name, value in found.batch.random.items()}
    tensors |= {f"state.{name}": value for name, value in state.items()}
    said: dict[str, Any] = {
        "format": FORMAT,
        "step": found.step,
        "micro_batch": found.number,
        "rank": rank,
        "num_ranks": num_ranks,
        "said": found.said,
        "checkpoint": "" if checkpoint is None else checkpoint.name,
        "config": asdict(config),
        "versions": {name: version(name) for name in ("lossmith", "torch", "transformers")},
        "call": None,
        "why_not": "what the loss was given is not known",
    }
    if found.call is not None:
        values, of_call = packed(found.call)
        size = sum(value.numel() * value.element_size() for value in of_call.values())
        if size <= LARGEST_HEAD:
            said |= {"call": values, "why_not": ""}
            tensors |= of_call | {f"random_of_call.{n}": state for n, state in found.call.random.items()}
        else:
            said["why_not"] = f"what the loss was given has {size / GIB:.1f} GiB, above {LARGEST_HEAD // GIB}"
    text = json.dumps(said)
    # In a folder of its own, since safetensors begins with a file whose name nobody can tell as ours.
    room = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    room.mkdir()
    try:
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        fresh = room / path.name
        save_file(whole, fresh, {HEADER: text})
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        delete_room(room)


def packed(call: LossCall) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A call as plain values and tensors; what is neither is left out."""
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}  # what stands there already

    def put(name: str, value: Tensor) -> Any:
        if id(value) in seen:
            return {SAME: seen[id(value)]}
        seen[id(value)] = name
        tensors[name] = value
        return {SAME: name}

    head, given = call.predictions, {}
    if isinstance(head, LinearHead):
        for name, value in head.tensors.items():
            if value is not None:
                put(f"predictions.{name}", value)
        options = {name.removeprefix("lm_head_"): getattr(head, name) for name in ("softcap", *HEAD_OPTIONS)}
    else:
        assert call.source is not None, "predictions that are not looked at"
        put("predictions.logits", call.source)
        options = {}
    for name, value in call.inputs.items():
        if isinstance(value, Tensor):
            given[name] = put(f"given.{name}", value)
        elif isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
            given[name] = [put(f"given.{name}.{k}", v) for k, v in enumerate(value)]
        elif value is None or isinstance(value, bool | int | float | str):
            given[name] = value
    autocast = "" if call.autocast is None else str(call.autocast).removeprefix("torch.")
    return {"given": given, "options": options, "autocast": autocast}, tensors


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def read_batch(path: Path) -> SavedBatch:
    """Read a file that anybody may have written.

    Raises:
        UserError: it cannot be read, is too large, or is no such file.
    """
    with refusing(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("it is not a regular file")
        if found.st_size > LARGEST_FILE:
            raise Unreadable(f"it has {found.st_size:,} bytes, and at most {LARGEST_FILE:,} are read")
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER, "")
            if not text or len(text) > LARGEST_HEADER:
                raise Unreadable("its header has no description of moderate length")
            said = parse_json(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(said, dict) or not is_moderate(said) or said.get("format") != FORMAT:
            raise Unreadable(f"its description is not of format {FORMAT}")
        return SavedBatch(
            **{name: typed(said, name, int) for name in ("step", "micro_batch", "rank", "num_ranks")},
            said=typed(said, "said", str),
            checkpoint=typed(said, "checkpoint", str),
            config=typed(said, "config", dict),
            call=None if said.get("call") is None else unpacked(typed(said, "call", dict), tensors),
            why_not=typed(said, "why_not", str),
            state=below("state.", tensors),
            inputs=below("inputs.", tensors),
            random=below("random.", tensors),
        )


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file into a UserError while entered."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many classes
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as {EXPECTED}: {shortened(reason)}. Name a {name_of(5)} of a run."
        ) from None


def typed(said: Mapping[str, Any], name: str, kind: type) -> Any:
    """A value of the description."""
    value = said.get(name)
    if type(value) is not kind:
        raise Unreadable(f"{name} is no {kind.__name__}")
    return value


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def unpacked(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LossCall:
    """The call that was packed."""

    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[SAME]]
        return [take(each) for each in value] if isinstance(value, list) else value

    given = {str(name): take(value) for name, value in typed(said, "given", dict).items()}
    if not isinstance(given.get("targets"), Tensor):
        raise Unreadable("it has no targets")
    own = below("predictions.", tensors)
    autocast, random = DTYPES.get(typed(said, "autocast", str)), below("random_of_call.", tensors)
    if "logits" in own:
        return LossCall(own["logits"], given, autocast, random)
    call = LossCall(None, given, autocast)
    with call.under_autocast(own["hidden"].device):
        head = LinearHead(own["hidden"], own["weight"], own.get("bias"), **typed(said, "options", dict))
    return LossCall(head, given, autocast, random)
