"""``try_out``: one forward that shows how a model reads labels and what it does to its logits."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.core.distributed import num_ranks

ROWS, LENGTH = 2, 8
LABELLED = 4  # the one position of a row that has a label
KEPT_BUFFER = 2**20  # elements; larger buffers are the weights of quantised layers
LONGEST_REASON = 160  # characters of another library's message
SPREAD = 8.0  # made-up logits reach to +-sinh(8): soft caps show at the ends, scales in the middle
GOLDEN = 0.6180339887498949  # its multiples spread evenly, and neighbours differ
TINY, HUGE = 2.0**-40, 2.0**20  # a soft cap leaves the first alone and flattens the second
TOLERANCE = 64  # of the dtype's eps, relative to each logit


@dataclass(frozen=True)
class AfterHead:
    """Logits from the head's output z: softcap * tanh(scale * z / softcap), or scale * z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @classmethod
    @torch.no_grad()
    def seen(cls, given: Tensor, made: Tensor) -> AfterHead | None:
        """What a model did to ``given``, the logits put in place of its head's (see :func:`made_up_logits`),
        when it returned ``made``; None if a scale and a cap do not explain it."""
        if made.shape != given.shape or not _depends_on(made, given):
            return None
        z, found = given.double().flatten(), made.double().flatten()
        if torch.finfo(made.dtype).bits < 32:  # too coarse to measure, but fine to see no change
            return cls() if torch.equal(given.to(made.dtype), made) else None
        scale, end = float(found[0] / z[0]), abs(float(found[1]))
        if not 0 < abs(scale) < torch.inf or not 0 < end < torch.inf:
            return None
        after = cls(scale, end if end < abs(scale * HUGE) / 2 else None)
        error, eps = (found - after(z)).abs(), torch.finfo(made.dtype).eps
        return after if bool((error <= TOLERANCE * eps * found.abs()).all()) else None


@dataclass(frozen=True)
class Trial:
    """What the trial showed of a model."""

    shift: int | None = None  # how many steps ahead logits predict in its own loss, if it shows
    after: AfterHead | None = None  # what it does after its head, if that is a scale and a cap
    why_not: str | None = None  # why no forward could run


def try_out(model: Any) -> Trial:
    """Run a model of transformers once, and leave its mode, its buffers and the random state unchanged.

    Made-up logits replace the head's output, so that the steps after it show for any weights. All ranks reach
    the same conclusion, so each must call this.

    Args:
        model: without a loss of ours attached.
    """
    why_not = _cannot_run(model)
    trial = Trial(why_not=why_not)
    if why_not is None:
        try:
            with _left_as_it_was(model):
                trial = _run(model)
        except Exception as error:  # multimodal models fail in many ways without images
            reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
            trial = Trial(why_not=f"{type(error).__name__}: {reason}")
    return agreed(trial)


def agreed(mine: Trial) -> Trial:
    """The ranks' common result: ranks without a trial follow; what two ranks saw differently is unknown."""
    if num_ranks() == 1:
        return mine
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, mine)
    looked = [trial for trial in found if trial.why_not is None]
    if not looked:
        return mine
    shifts, afters = {trial.shift for trial in looked}, {trial.after for trial in looked}
    return Trial(
        shifts.pop() if len(shifts) == 1 else None,
        afters.pop() if len(afters) == 1 else None,
    )


# ── the forward ───────────────────────────────────────────────────────────────────────────────────


def _cannot_run(model: nn.Module) -> str | None:
    """Why this model must not run a trial forward, or None."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            return "its weights are not there yet (meta device)"
        if hasattr(tensor, "ds_id"):
            return "ZeRO-3 has parted its weights"
        if hasattr(tensor, "full_tensor"):
            return "its weights are sharded"
    return None


def _run(model: Any) -> Trial:
    """What one forward shows."""
    ids, label = _made_up_ids(model)
    labels = torch.full_like(ids, -100)
    labels[:, LABELLED] = label
    own = inspect.signature(type(model).forward).parameters
    cacheless = {"use_cache": False} if "use_cache" in own else {}
    given: list[Tensor] = []

    def after_head(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        given.append(made_up_logits(logits, label))
        torch.set_grad_enabled(True)  # from here on, and until the no_grad around it ends
        return given[-1].clone()  # the model may change it in place

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_hook(after_head, prepend=True)
    try:
        with torch.inference_mode(False), torch.no_grad():
            output = model.forward(input_ids=ids, labels=labels, return_dict=True, **cacheless)
            loss, logits = output.get("loss"), output.get("logits")
    finally:
        if handle is not None:
            handle.remove()
    if len(given) != 1:
        return Trial()
    after = AfterHead.seen(given[0], logits) if isinstance(logits, Tensor) else None
    return Trial(_steps_ahead(loss, given[0], label), after)


def _steps_ahead(loss: Any, logits: Tensor, label: int) -> int | None:
    """How many steps before its label the loss raises the label's logit, if at exactly one position.

    Whatever else the loss contains (a balance of experts, a z-loss), it raises a label's own logit only at
    the position that should predict the label.
    """
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    if gradient is None:
        return None
    raised = (gradient[..., label] < 0).reshape(-1, logits.shape[-2]).any(0)
    places = raised.nonzero().flatten().tolist()
    return LABELLED - places[0] if len(places) == 1 and places[0] <= LABELLED else None


def steps_of_loss_function(model: Any) -> int | None:
    """The same from the ``loss_function`` that a model's forward calls, without the forward."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return None
    size = 8
    logits = made_up_logits(torch.zeros(ROWS, LENGTH, size), size - 1)
    labels = torch.full((ROWS, LENGTH), -100)
    labels[:, LABELLED] = size - 1
    try:
        with torch.enable_grad():
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=size)
            return _steps_ahead(loss, logits, size - 1)
    except Exception:  # a custom function, with other arguments
        return None


def _made_up_ids(model: Any) -> tuple[Tensor, int]:
    """Ids [ROWS, LENGTH] of ordinary text tokens, and one more id."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = [getattr(embeddings, "num_embeddings", 0), getattr(head, "out_features", 0)]
    size = min([size for size in sizes if size] or [model.config.get_text_config().vocab_size])
    special = _special_ids(model.config.to_dict())
    ordinary = [i for i in range(min(size, 4096)) if i not in special and i > 1] or [size - 1]
    ids = torch.tensor([ordinary[i % len(ordinary)] for i in range(ROWS * LENGTH)])
    weight = getattr(embeddings, "weight", None)
    device = next(model.parameters()).device if weight is None else weight.device
    return ids.reshape(ROWS, LENGTH).to(device), ordinary[-1]


def _special_ids(config: Any) -> set[int]:
    """Ids that a configuration names: image, end-of-text and padding tokens."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_index")):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {one for one in values if isinstance(one, int)}
    return found


# ── what comes after the head ─────────────────────────────────────────────────────────────────────


def made_up_logits(like: Tensor, label: int | None = None) -> Tensor:
    """Logits of many magnitudes in the shape of ``like``, a leaf that requires a gradient, with ``label``
    improbable at every position. They are in fp64 if the device has it, whatever the model's dtype, so that
    changes to them can be measured."""
    index = torch.arange(like.numel(), dtype=torch.float64)
    z = ((index * GOLDEN % 1) * 2 - 1).mul(SPREAD).sinh().reshape(like.shape)
    if label is not None:
        z[..., label] = -1.0
    z.view(-1)[:2] = torch.tensor([TINY, HUGE], dtype=z.dtype)
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    return z.to(like.device, wide).requires_grad_()


def _depends_on(made: Tensor, given: Tensor) -> bool:
    """Whether ``made`` depends on ``given`` and on no parameter: a learned scale may be 1 only today."""
    leaves, waiting, seen = [], [made.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return len(leaves) == 1 and leaves[0] is given


# ── nothing else changes ──────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, the random state forked; afterwards everything is as before."""
    from transformers.utils import logging

    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone() if buffer.numel() <= KEPT_BUFFER else buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    verbosity = logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        for kind, indices in _accelerators(model).items():
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # not worth compiling
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        model.eval()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, copied in buffers:
                    module._buffers[name] = buffer
                    if buffer is not copied and not torch.equal(buffer, copied):
                        buffer.copy_(copied)


def _accelerators(model: nn.Module) -> dict[str, set[int]]:
    """The indices of the devices that the model is on, by device type, without the CPU."""
    found: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            found.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    return found
