"""Whatever a public function is given, it answers with a result or a clear error: no crash, no silent NaN.

``FUZZ_EXAMPLES=100000 pytest tests/test_fuzz.py`` tries as many cases of each; the number is in the log.
"""

import collections
import dataclasses
import warnings

import pytest
import torch

import lossmith
from fuzzing import VALUES, batches, fuzz, judged, one_of, options, predicted
from lossmith.engine.statistics.stats import STATISTIC_NAMES

pytestmark = pytest.mark.filterwarnings("ignore")

READING = {"temperature": (0.3, 2.5), "softcap": (None, 3.0)}
COUNTING = {
    "reduction": ("mean", "token_mean", "sequence_mean", "sum", "none"),
    "empty": ("zero",),
}
FORMULA = {
    "label_smoothing": (0.0, 0.1, 0.9),
    "smoothing_mode": ("uniform", "exclude_target"),
    "z_loss": (0.0, 1e-4, 0.1),
    "focal_gamma": (0.0, 0.5, 2.0),
    "confidence_penalty": (0.0, 0.1),
}
PER_BATCH = {"denominator": (3, torch.tensor(5), 2.5)}


@pytest.fixture
def cases(record_property):
    """Counts cases by what came of them; a test whose cases were all refused shows nothing."""
    found = collections.Counter()
    yield found
    record_property("fuzz_cases", sum(found.values()))
    assert not found["refused without a word"], found
    assert found["finite"] > sum(found.values()) / 20, found


@fuzz(batch=batches(), how=options(**READING, **COUNTING, **FORMULA), also=options(**PER_BATCH))
def test_cross_entropy(cases, batch, how, also):
    made = {**batch.how, **how}
    cases[
        judged(
            lambda: lossmith.cross_entropy(batch.values, batch.targets, **made, **tokens(batch), **also),
            batch,
        )
    ] += 1


def tokens(batch, *names):
    return {n: v for n, v in batch.others.items() if n in ("mask", "token_weight", *names)}


@fuzz(
    batch=batches(sizes=(1, 3, 5), kinds=VALUES[:2]),
    num_classes=one_of(1, 2, 9, 33),
    how=options(
        **READING, **COUNTING, **FORMULA, strategy=("auto", "one_sweep", "two_sweep"),
        memory_budget=(64, 4096), skip_ignored=(None, True, False), logits_dtype=("wide", "input"),
        skip_small_gradients=(0.0, 0.02, 0.4),
    ),
    has_bias=one_of(False, True),
)  # fmt: skip
def test_linear_cross_entropy(cases, batch, num_classes, how, has_bias):
    weight, bias = head_of(batch, num_classes)
    made = {**batch.how, "bias": bias if has_bias else None, **how}
    targets = of_classes(batch, num_classes)
    cases[
        judged(
            lambda: lossmith.linear_cross_entropy(batch.values, weight, targets, **made, **tokens(batch)),
            batch, weight, bias,
        )
    ] += 1  # fmt: skip


def head_of(batch, num_classes):
    rng = torch.Generator().manual_seed(num_classes)
    shape = (num_classes, batch.values.shape[-1])
    weight, bias = torch.randn(shape, generator=rng), torch.randn(num_classes, generator=rng)
    large = batch.values[batch.values.isfinite()].abs().amax() if batch.values.isfinite().any() else 1
    scale = min(1.0, 100 / max(float(large), 1.0))  # logits that fit the dtype
    return [(t * scale).to(batch.values.dtype).requires_grad_() for t in (weight, bias)]


def of_classes(batch, num_classes):
    ids = batch.targets.long()
    return torch.where(ids == batch.how["ignore_index"], ids, ids % num_classes)


@fuzz(
    batch=batches(),
    how=options(**READING),
    name=one_of(*sorted(STATISTIC_NAMES)),
    of_unscaled=one_of(False, True),
)
def test_token_stats(cases, batch, how, name, of_unscaled):
    def read():
        ignored, shift = batch.how.values()
        targets = predicted(batch.targets.long(), ignored, shift)
        ids = targets.clamp(0, batch.values.shape[-1] - 1).unsqueeze(-1)
        stats = lossmith.token_stats(batch.values, targets, ignore_index=ignored, candidates=ids, **how)
        value = getattr(stats.unscaled if of_unscaled else stats, name)
        # -inf is the logarithm of nothing: a statement, not an accident
        return torch.where(value.isinf(), 0.0, value) if value.is_floating_point() else value

    cases[judged(read, batch)] += 1


@fuzz(
    batch=batches(),
    how=options(
        **READING, **COUNTING, alpha=(0.0, 1.0, -0.5), beta=(0.0, 0.02), gamma=(0.0, 1.0),
        top_k=(1, 3, 100), eps=(1e-6, 1.0), legacy=(False, True),
    ),
)  # fmt: skip
def test_nvamp(cases, batch, how):
    made = {**batch.how, **how}
    cases[
        judged(lambda: lossmith.NVAMPLoss(**made)(batch.values, batch.targets, **tokens(batch)), batch)
    ] += 1


UNIFIED = {
    "primary_loss_type": ("standard", "deepseek", "adaptive_mtp"),
    "adaptive_temperature": (False, True),
    "initial_temperature": (0.7, 1.0),
    "use_ngram_penalty": (False, True),
    "ngram_size": (1, 2, 4),
    "ngram_window_size": (4, 50),
    "use_immediate_repetition_penalty": (False, True),
    "immediate_repetition_threshold": (1, 2),
    "eos_token_id": (None, 0),
    "pad_token_id": (None, 0),
    "use_focal_loss": (False, True),
    "focal_mode": ("add", "replace"),
    "use_auxiliary_loss": (False, True),
    "use_moe_balancing": (False, True),
    "num_experts": (None, 3),
    "router_z_loss_weight": (0.0, 0.1),
    "use_mtp": (False, True),
    "num_future_tokens": (1, 3),
    "use_contrastive_loss": (False, True),
    "use_diversity_loss": (False, True),
    "z_loss": (0.0, 1e-4),
    "label_smoothing": (0.0, 0.1),
}


@fuzz(batch=batches(), how=options(**UNIFIED, **COUNTING), seed=one_of(*range(10)))
def test_unified(cases, batch, how, seed):
    rng, shape = torch.Generator().manual_seed(seed), tuple(batch.targets.shape)
    heads = torch.randn(how.get("num_future_tokens", 3), *batch.values.shape, generator=rng)
    of_parts = {
        "gate_logits": torch.randn(*shape, 3, generator=rng),
        "additional_logits": heads.to(batch.values.dtype),
        "hidden_states": torch.randn(*shape, 4, generator=rng),
        "expert_outputs": torch.randn(*shape, 3, 4, generator=rng),
    }
    if how.get("use_mtp") and not batch.values.isfinite().all():
        # further heads predict, and look at the model's confidence, where the model itself has no target
        batch = dataclasses.replace(batch, is_spoilt=True)
    made = {**batch.how, **how}
    given_ids = tokens(batch, "input_ids", "segment_ids")
    if seed == 9:
        of_parts.popitem()

    def loss():
        criterion = lossmith.UnifiedLoss(batch.values.shape[-1], **made)
        return criterion(batch.values, batch.targets, **given_ids, **of_parts)

    cases[judged(loss, batch)] += 1


MODIFIERS = {
    "entropy_modifier_enabled": (True, False),
    "entropy_modifier_weight": (0.5, 1.0),
    "entropy_modifier_use_for_weighting": (True, False),
    "entropy_modifier_direction": ("concentrated", "uniform"),
    "mask_ratio_weight_enabled": (True, False),
    "mask_ratio_weight_power": (0.5, 1.0),
    "target_smoothing_enabled": (True, False),
    "target_smoothing_factor": (0.1, 0.4),
    "metrics_collector_enabled": (True, False),
}


@fuzz(
    batch=batches(),
    keys=options(**MODIFIERS),
    how=options(reduction=("auto", *COUNTING["reduction"])),
)
def test_pipelines_from_keys(cases, batch, keys, how):
    def loss():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = lossmith.create_loss_modifier_pipeline({"loss_modifiers_enabled": True, **keys})
            return pipeline.modify_loss(
                batch.values,
                batch.targets,
                **batch.how,
                **tokens(batch, "segment_ids"),
                **how,
            )

    cases[judged(loss, batch)] += 1


@fuzz(
    batch=batches([(1,), (2,), (5,)], sizes=(1,), kinds=VALUES[:4]),
    keys=options(
        sequence_variance_enabled=(True, False), sequence_variance_scale=(1.0, 2.0),
        sequence_correlation_enabled=(True, False), sequence_correlation_alpha=(1.0, 4.0),
    ),
    seed=one_of(*range(100)),
)  # fmt: skip
def test_sequence_scorers(cases, batch, keys, seed):
    targets = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(seed))

    def loss():
        pipeline = lossmith.create_loss_modifier_pipeline(
            {"loss_modifiers_enabled": True, **keys}, model_mode="SEQUENCE_SCORER"
        )
        scores = batch.values.squeeze(-1).float().nan_to_num(0.0, 0.0, 0.0).sigmoid()
        return pipeline.modify_loss(scores, targets, mask=batch.others.get("mask"))

    cases[judged(loss, batch)] += 1


@fuzz(
    batch=batches(),
    how=options(margin=(0.0, 1.0), reduction=("mean", "sum", "none"), denominator=(None, 3)),
)
def test_ranking_loss(cases, batch, how):
    if not batch.values.isfinite().all():
        batch = dataclasses.replace(batch, is_spoilt=True)
    worse, better = batch.values[..., 0], batch.values[..., -1]
    cases[
        judged(lambda: lossmith.ranking_loss(better, worse, mask=batch.others.get("mask"), **how), batch)
    ] += 1


COMPONENTS = {
    "experts": (lambda: lossmith.MoEBalance(3, top_k=2), "gate_logits"),
    "router_z": (lambda: lossmith.RouterZLoss(), "gate_logits"),
    "contrastive": (lambda: lossmith.Contrastive(), "hidden_states"),
    "diversity": (lambda: lossmith.ExpertDiversity(), "expert_outputs"),
}


@fuzz(
    batch=batches([(1, 1), (2, 3), (3, 1), (4,), (1, 2)], sizes=(1, 2, 3), kinds=VALUES[:4]),
    name=one_of(*sorted(COMPONENTS)),
)
def test_components(cases, batch, name):
    make, given_as = COMPONENTS[name]
    shape = batch.targets.shape
    values = batch.values if name != "diversity" else batch.values.unsqueeze(-1)
    values = values.nan_to_num(0.0, 0.0, 0.0)
    logits, targets = torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.long)

    def loss():
        criterion = lossmith.ComposedLoss(lossmith.CrossEntropyLoss(), {name: make()})
        return criterion(logits, targets, attention_mask=batch.others.get("mask"), **{given_as: values})

    cases[judged(loss, batch)] += 1


@fuzz(
    share=10,
    batch=batches(),
    how=options(**COUNTING),
    wrong=one_of("targets", "mask", "logits", "weight", "ids"),
)
def test_what_does_not_fit_is_refused(record_property, batch, how, wrong):
    values, targets, more = batch.values.detach(), batch.targets, {}
    if wrong == "targets":
        targets = targets.float()
    elif wrong == "mask":
        more = {"mask": torch.ones(9, 9)}
    elif wrong == "logits":
        values = values.long()
    elif wrong == "weight":
        more = {"token_weight": "1"}
    else:
        targets = torch.full_like(targets.long(), values.shape[-1] + 300)
        how = {**how, "shift": 0}
    with pytest.raises((TypeError, ValueError)) as caught:
        lossmith.cross_entropy(values, targets, **{**batch.how, **how}, **more)
    assert len(str(caught.value)) > 20
