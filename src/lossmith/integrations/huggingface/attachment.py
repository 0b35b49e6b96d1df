"""``attach``: puts an objective inside a causal language model's forward; ``detach`` takes it out again."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, TypeVar

from torch import nn

from lossmith.components.moe import MoEBalance
from lossmith.components.mtp import MTP
from lossmith.engine.head.plan import (
    HeadOptions,
    LogitsDtype,
    MemoryBudget,
    SkipIgnored,
    SkipSmallGradients,
    Strategy,
)
from lossmith.equation.batch import num_steps
from lossmith.integrations.huggingface.attached_loss import NAME, PER_BATCH, SHIFTED, AttachedLoss
from lossmith.integrations.huggingface.fused_head import FusedHead, unembedding_of
from lossmith.integrations.huggingface.labels import NEXT_TOKEN, check_objective
from lossmith.integrations.huggingface.trial import Trial, steps_of_loss_function, try_out
from lossmith.objectives.objective import Objective

Model = TypeVar("Model", bound=nn.Module)
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
# Inputs that models take through ``**kwargs``, so that no signature shows them.
TAKEN_BY_ALL = {"return_dict", "output_hidden_states", "output_attentions", "use_cache", "cache_position"}
OTHER_TASKS = ("MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")


def attach(
    model: Model,
    loss: Objective,
    *,
    materialize_logits: bool | None = None,
    strategy: Strategy = "auto",
    memory_budget: MemoryBudget = None,
    skip_ignored: SkipIgnored = None,
    logits_dtype: LogitsDtype = "wide",
    skip_small_gradients: SkipSmallGradients = 0.0,
) -> Model:
    """Let ``model(input_ids, ..., labels=...)`` return ``loss``; without labels it works as before.

    The output is the model's own with ``.loss`` in it. In training its logits are None: they never exist all
    at once (see :func:`lossmith.linear_cross_entropy`), unless the head is not a plain linear layer. Labels
    are Hugging Face's: -100 marks a token without one, and they are shifted as in the model's own loss, or by
    the objective's ``shift`` if that is more than 0. The objective gets those of the following that it takes:
    ``input_ids``; ``attention_mask``, as the mask of the labels; ``segment_ids``, which change where
    ``position_ids`` restart; ``denominator=`` or, if it divides by tokens, ``num_items_in_batch``;
    ``hidden_states``, the input of the model's head; ``lm_head_weight``; ``gate_logits`` of a mixture of
    experts, whose own auxiliary loss is not added; and any other of its ``input_names`` that the caller
    passes, with ``token_weight``, ``segment_ids`` and ``sequence``. ``shift_labels`` that the caller has
    aligned with the logits (-100 at padding) replace the labels.

    The loss becomes a submodule: its parameters are among ``model.parameters()``, so make the optimizer and
    wrap the model (DDP, FSDP, ``torch.compile``) afterwards. ``state_dict`` and ``save_pretrained`` work as
    before; ``loss.state_dict()`` has the loss's own state. A loss attached earlier is replaced.

    The model runs once on a few tokens, which shows how its own loss reads labels and what it does to its
    logits; this leaves no trace. With a process group, every rank must attach.

    Args:
        model: a causal language model of transformers, or one inside a PEFT model.
        loss: the objective; it moves to the device of the model's head.
        materialize_logits: True: compute all the logits as the model does, and the loss from them. False:
            never where there are labels. None: in evaluation, where a trainer's metrics may read them.
        strategy, memory_budget, skip_ignored, logits_dtype, skip_small_gradients: see
            :func:`lossmith.linear_cross_entropy`.

    Returns:
        The same model.

    Raises:
        TypeError: not such a model, or not an objective.
        ValueError: a model and an objective that cannot be combined.

    Example:
        >>> import torch, transformers, lossmith
        >>> from lossmith.integrations.huggingface import attach
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = attach(transformers.LlamaForCausalLM(config), lossmith.CrossEntropyLoss(z_loss=1e-4))
        >>> ids = torch.randint(50, (2, 8))
        >>> model(ids, labels=ids).loss.backward()
    """
    check_objective(loss)
    base = _causal_model(model)
    _check_experts(base, loss)
    detach(model)
    trial = try_out(base)
    shift = _steps_of(base, loss, trial)
    options = HeadOptions(
        strategy=strategy,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        logits_dtype=logits_dtype,
        skip_small_gradients=skip_small_gradients,
    )
    fused = FusedHead(base, trial, options, materialize=materialize_logits)
    attached = AttachedLoss(loss, _known_inputs(base), fused, shift)
    head = base.get_output_embeddings()
    loss.to(next((head or base).parameters()).device)
    attached.handles = [base.register_forward_hook(attached.after_forward, with_kwargs=True)]
    fused.watch(base)
    attached.frozen = [] if unembedding_of(head) is None else _unused(loss)
    for parameter in attached.frozen:
        parameter.requires_grad_(False)
    # The Trainer reads this to know whether position 0 has a target. GPT-2 does not have it, and the one of
    # Bart's decoder is wrong.
    attached.loss_type = vars(base).get("loss_type")
    base.loss_type = "ForCausalLM" if shift else None
    attached.inner = vars(base).pop("forward", None)
    own = inspect.signature(type(base).forward).parameters
    extras = dict.fromkeys(name for name in (*PER_BATCH, *loss.input_names) if name not in own)
    base.__class__ = _with_loss(type(base), tuple(extras))
    base.add_module(NAME, attached)
    for module in {id(module): module for module in (base, model)}.values():
        _hide_buffers_from_ddp(module, attached)
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach`, if it was called.

    Args:
        model: the model that was given to it.

    Returns:
        The same model.
    """
    base = _inside(model)
    attached = attached_to(model)
    if attached is None:
        return model
    for handle in attached.handles:
        handle.remove()
    attached.fused.unwatch()
    for parameter in attached.frozen:
        parameter.requires_grad_(True)
    for module in (base, model):
        _show_buffers_to_ddp(module)
    base.loss_type = attached.loss_type
    delattr(base, NAME)
    if attached.inner is not None and "forward" not in vars(base):
        base.forward = attached.inner
    original = vars(type(base)).get("without_loss")
    if original is not None:  # else something else replaced the class, as FSDP does
        base.__class__ = original
    return model


def attached_to(model: Any) -> AttachedLoss | None:
    """The loss that :func:`attach` put into a model, or None."""
    attached = getattr(_inside(model), NAME, None)
    return attached if isinstance(attached, AttachedLoss) else None


def _inside(model: Any) -> Any:
    """The model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ── the model's class ─────────────────────────────────────────────────────────────────────────────


@functools.cache
def _with_loss(original: type, extras: tuple[str, ...]) -> type:
    """The class ``original`` with a loss in its forward, under the same name.

    A class rather than an attribute of the model, so that copies and replicas of the model call their own.
    """
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        attached: AttachedLoss | None = getattr(self, NAME, None)
        if attached is None:  # detached, but a wrapper still holds this function
            return original.forward(self, *args, **inputs)
        plain = functools.partial(original.forward, self) if attached.inner is None else attached.inner
        inputs.update(zip(names, args, strict=False))
        given = {name: inputs.pop(name) for name in (*extras, SHIFTED) if name in inputs}
        if inputs.get("labels") is not None:
            return attached.run(self, plain, inputs, given)
        if inputs.pop("num_items_in_batch", None) is not None:
            raise ValueError(
                "num_items_in_batch came without labels to a model that has a "
                f"{type(attached.objective).__name__} attached: the Trainer keeps them for a loss of its "
                "own, and the objective would never be computed. Leave out its label_smoothing_factor (make "
                "the objective with label_smoothing=) and compute_loss_func"
            )
        return plain(**inputs)

    forward.__signature__ = _signature(original, extras)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    forward.__qualname__ = f"{original.__qualname__}.forward"

    def reduce(self: Any, protocol: Any) -> Any:
        make, args, *rest = super(made, self).__reduce_ex__(protocol)
        return _restore, (make, original, extras, args[1:]), *rest

    body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": forward, "without_loss": original, "__reduce_ex__": reduce}
    body["accepts_loss_kwargs"] = True  # the Trainer checks this before it passes num_items_in_batch
    made = type(original.__name__, (original,), body)
    return made


def _restore(make: Any, original: type, extras: tuple[str, ...], args: tuple[Any, ...]) -> Any:
    """An empty instance, for copies and pickles: no module holds the class under its name."""
    return make(_with_loss(original, extras), *args)


def _signature(original: type, extras: tuple[str, ...]) -> inspect.Signature:
    """The model's signature plus the loss's inputs: the Trainer keeps the dataset columns it finds there."""
    own = inspect.signature(original.forward)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in extras]
    # by kind, since **kwargs come last; sorting is stable
    return own.replace(parameters=sorted([*own.parameters.values(), *more], key=lambda p: p.kind))


# ── what fits together ────────────────────────────────────────────────────────────────────────────


def _causal_model(model: Any) -> Any:
    """The causal language model that ``model`` is or contains."""
    from transformers import PreTrainedModel

    base = _inside(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            "attach takes a causal language model of transformers, before anything wraps it; got "
            f"{type(model).__name__}. Of DistributedDataParallel and the like, pass what is inside, and wrap "
            "that afterwards"
        )
    if (
        getattr(base.config, "is_encoder_decoder", False)
        or "labels" not in inspect.signature(type(base).forward).parameters
        or _predicts_something_else(type(base).__name__)
    ):
        raise ValueError(
            f"attach takes causal language models, which have labels of their input; {type(base).__name__} "
            "is none. Trainer(compute_loss_func=compute_loss_func(loss)) trains others"
        )
    return base


def _predicts_something_else(name: str) -> bool:
    """Whether transformers lists the class as one that predicts masked tokens, classes or spans. A masked
    model would otherwise compute a next-token loss without complaint."""
    from transformers.models.auto import modeling_auto

    def does(task: str) -> bool:
        return name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()

    return not does("CAUSAL_LM") and any(map(does, OTHER_TASKS))


def _known_inputs(model: Any) -> frozenset[str]:
    """Names of inputs that the model, or the model without its head, takes."""
    from transformers.utils.generic import TransformersKwargs

    known = TAKEN_BY_ALL | set(TransformersKwargs.__annotations__)
    for module in (model, getattr(model, "base_model", model)):
        known |= set(inspect.signature(type(module).forward).parameters)
    return frozenset(known - {"self", "args", "kwargs"})


def _steps_of(base: Any, loss: Objective, trial: Trial) -> int:
    """How many steps ahead the model's logits predict its labels: the objective's ``shift`` if that is more
    than 0, else that of the model's own loss, else the objective's or one step. Warns of what is unknown."""
    name, assumed = type(base).__name__, ""
    shift = steps_of_loss_function(base) if trial.shift is None else trial.shift
    said = None if loss.shift is None else num_steps(loss.shift)
    if shift is None:
        shift = NEXT_TOKEN if said is None else said
        assumed = f" Its logits[t] are taken to predict labels[t + {shift}]."
    elif said:
        shift = said
    if trial.why_not is not None:
        warnings.warn(
            f"{name} could not be tried on a few tokens ({trial.why_not}): what it does to its logits is "
            "looked at in the first batch, and where that is compiled they are computed as always, all at "
            f"once.{assumed}",
            stacklevel=3,
        )
    elif assumed and loss.shift is None:
        warnings.warn(
            f"the loss of {name} does not show which logits predict a label.{assumed} Make the objective "
            "with shift= to say that you know",
            stacklevel=3,
        )
    return shift


def _check_experts(model: Any, loss: Objective) -> None:
    """Refuse an objective that would count more or fewer experts per token than the model uses."""
    per_token = getattr(model.config, "num_experts_per_tok", None)
    for module in loss.modules() if "gate_logits" in loss.wanted_inputs else ():
        if isinstance(module, MoEBalance) and isinstance(per_token, int) and module.top_k != per_token:
            raise ValueError(
                f"the objective counts {module.top_k} experts a token (top_k), and {type(model).__name__} "
                f"asks {per_token}; make it with top_k={per_token} (of UnifiedLoss moe_top_k={per_token})"
            )


def _unused(loss: Objective) -> list[nn.Parameter]:
    """Unembeddings that the model's own replaces: they get no gradient, and DDP would wait for one."""
    heads = [module for module in loss.modules() if isinstance(module, MTP) and module.shared_projection]
    spare: Any = [head.unembedding.weight for head in heads if head.unembedding is not None]
    return [parameter for parameter in spare if parameter.requires_grad]


def _hide_buffers_from_ddp(module: nn.Module, attached: AttachedLoss) -> None:
    """DDP would overwrite every rank's buffers with the first's, and some hold a rank's own counts."""
    prefix = next(name for name, found in module.named_modules() if found is attached)
    buffers = [f"{prefix}.{name}" for name, _ in attached.named_buffers()]
    if buffers:
        setattr(module, IGNORED_BY_DDP, [*getattr(module, IGNORED_BY_DDP, ()), *buffers])


def _show_buffers_to_ddp(module: nn.Module) -> None:
    """Undo :func:`_hide_buffers_from_ddp`."""
    others = [name for name in vars(module).pop(IGNORED_BY_DDP, ()) if NAME not in name.split(".")]
    if others:
        setattr(module, IGNORED_BY_DDP, others)
