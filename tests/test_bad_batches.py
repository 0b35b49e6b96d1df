"""One bad batch spoils no running mean, whichever loss keeps it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lossmith

V, D, E = 11, 6, 4


def losses() -> Iterator[tuple[str, lossmith.Objective]]:
    """Every objective and modifier that has a state which moves by itself."""
    adaptive = lossmith.AdaptiveTemperature()
    yield "temperature", lossmith.CrossEntropyLoss(temperature=adaptive)
    bias = lossmith.MoEBalance(E, mode="bias", top_k=2)
    yield "experts' bias", lossmith.ComposedLoss(lossmith.CrossEntropyLoss(), components={"moe": bias})
    yield (
        "statistics",
        lossmith.UnifiedLoss(V, hidden_size=D, adaptive_temperature=True, use_ngram_penalty=True),
    )
    collector = lossmith.MetricsCollectorModifier({})
    yield "metrics", lossmith.LossModifierPipeline([collector], model_mode="sequence_scorer")


def evaluated(loss: lossmith.Objective, bad: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(loss, lossmith.LossModifierPipeline):
        scores = torch.rand(3, generator=generator, requires_grad=True)
        return loss.evaluate(scores if bad is None else scores + bad, torch.ones(3)).total
    logits = torch.randn(2, 3, V, generator=generator, requires_grad=True)
    gate = torch.randn(2, 3, E, generator=generator, requires_grad=True)
    inputs: dict[str, Tensor] = {"gate_logits": gate} if "gate_logits" in loss.input_names else {}
    if bad is not None:
        logits = logits + bad
        inputs = {name: value + bad for name, value in inputs.items()}
    ids = torch.randint(V, (2, 3), generator=generator)
    return loss.evaluate(logits, ids, input_ids=ids.roll(1, -1), **inputs).total


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name, _ in losses()])
def test_the_state_is_that_without_the_bad_batch(name: str, bad: float):
    found = []
    for batches in ((None, None), (None, bad, None)):
        loss = dict(losses())[name]
        for value in batches:
            evaluated(loss, value)
            loss.on_optimizer_step()
        found.append(dict(loss.state_dict()))
    assert found[0]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=f"{name}: {key}")
