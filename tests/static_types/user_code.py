"""The calls of the documentation, as a user writes them. It is read by a type checker, and never run."""

import torch

import lossmith
from lossmith.analysis import hardest, joined, loss_by_position, reliability, token_table
from lossmith.integrations.huggingface import attach, compute_loss_func
from lossmith.report import read_runs
from lossmith.testing import check_objective, check_term

logits = torch.randn(2, 8, 100, requires_grad=True)
targets = torch.randint(100, (2, 8))
hidden, weight = torch.randn(2, 8, 32), torch.randn(100, 32)

loss = lossmith.cross_entropy(logits, targets, shift=True, label_smoothing=0.1, z_loss=1e-4)
loss, stats = lossmith.cross_entropy(logits, targets, reduction="none", return_stats=True)
fused = lossmith.linear_cross_entropy(hidden, weight, targets, shift=True)
plan = lossmith.linear_cross_entropy.explain(hidden, weight, targets, shift=True)
chunks = plan.num_chunks
stats_again = lossmith.token_stats(logits, targets)
fused_stats = lossmith.linear_token_stats(hidden, weight, targets).compute("nll", "target_prob")
focal = (stats_again.nll * (1 - stats_again.target_prob) ** 2).mean()
unscaled = stats_again.unscaled
one_batch = lossmith.perplexity(logits, targets)
perplexity = lossmith.Perplexity(shift=True)
perplexity.update(logits, targets)
of_corpus = perplexity.compute()
num_tokens = perplexity.num_tokens
rank = lossmith.ranking_loss(torch.rand(3), torch.rand(3), margin=1.0)

criterion = lossmith.UnifiedLoss(vocab_size=100, shift=True, use_ngram_penalty=True)
parts = criterion(logits, targets, input_ids=targets, return_detailed=True)
total = criterion(logits, targets, input_ids=targets)
called = criterion.forward(logits, targets)
statistics = criterion.get_loss_statistics()
weighted = criterion.components["ngram_penalty"]
criterion.components["ngram_penalty"].weight = 0.05
base = criterion.base
count = criterion.count(targets)
output = criterion.evaluate(logits, targets)
nll = output.metrics["nll"]
numbers = output.metrics.to_dict()
out_parts = output.parts
out_stats = output.stats
pulls = output.pull(logits)
for name, (norm, cosine) in pulls.items():
    print(name, norm, cosine)
planned = criterion.plan(targets=targets, hidden_states=hidden, lm_head_weight=weight)
made = lossmith.create_unified_loss({"vocab_size": 100})

margin = lossmith.Term(
    "margin",
    lambda stats, batch: (stats.top_wrong_logit - stats.target_logit + 1).relu(),
    coefficient=0.1,
    reads=("top_wrong_logit", "target_logit"),
    scope="token",
)
hard = lossmith.Term(
    "hard", lambda stats, batch: stats.nll, token_weight=lambda stats, batch: stats.nll / 2, reads=("nll",)
)
objective = lossmith.Objective([margin, hard], shift=True)
value = objective(logits, targets)
check_term(margin)
check_objective(objective)
composed = lossmith.ComposedLoss(
    lossmith.CrossEntropyLoss(), components={"focal": lossmith.Weighted(lossmith.Focal(gamma=2.0), 0.2)}
)
of_composed = composed(logits, targets)
nvamp = lossmith.NVAMPLoss(alpha=1.0)
of_nvamp = nvamp(logits, targets)

pipeline = lossmith.create_loss_modifier_pipeline(
    {"loss_modifiers_enabled": True, "entropy_modifier_enabled": True}
)
modified = pipeline.modify_loss(logits, targets)
metrics = pipeline.get_all_metrics()
names = pipeline.get_enabled_modifier_names()
with pipeline.temporarily_disabled() as disabled:
    inside = pipeline(logits, targets)
modifiers = pipeline.modifiers
entropy = lossmith.EntropyModifier({"threshold": 0.1})
ratio = lossmith.MaskRatioWeightModifier(power=0.5)
settings = entropy.settings
threshold = entropy.settings.threshold
measured = entropy.get_metrics()
pipeline2 = lossmith.LossModifierPipeline([entropy, ratio], base=lossmith.CrossEntropyLoss(shift=True))

table = joined([token_table(stats_again)])
hard_tokens = hardest(table.nll, 3)
by_position = loss_by_position(table.nll, table.position, max_bands=4).loss
ece = reliability(table.confidence, table.correct).ece

model = attach(torch.nn.Linear(2, 2), criterion)
func = compute_loss_func(lossmith.CrossEntropyLoss(z_loss=1e-4))
shards = lossmith.VocabShards.even(1000)
sharded = lossmith.ShardedHead(hidden, weight, shards)
of_shards = criterion(sharded, targets)
temperature = lossmith.AdaptiveTemperature(1.0)
temperature_now = temperature.value
at_temperature = lossmith.CrossEntropyLoss(temperature=temperature)


class Margin(lossmith.Component):
    """The target's logit should be the largest by a margin."""

    def term(self) -> lossmith.Term:
        return margin


runs = read_runs([])
