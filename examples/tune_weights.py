"""Tune the weights of the repetition penalties with Optuna: python examples/tune_weights.py [--trials 8]

Each trial trains a small model for a few steps on Python's own documentation and is judged by two figures at
once: the perplexity of held-out text and how much greedy continuations repeat themselves. Needs
`pip install 'lossmith[train]' optuna`; about ten seconds a trial on 2 cores.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor

import lossmith
from lossmith.training.config.keys import TrainConfig
from lossmith.training.data.blocks import RandomBlocks
from lossmith.training.data.corpus import load_corpus
from lossmith.training.data.tokenizer import encode, train_tokenizer
from lossmith.training.tasks.models import make_language_model

CONFIG = TrainConfig(vocab_size=512, block_size=64, n_layer=2, n_embd=96)
STEPS, BATCH_SIZE, PROMPT, CONTINUATION = 150, 16, 16, 48


def train(loss_fn: lossmith.UnifiedLoss, tokens: Tensor) -> torch.nn.Module:
    """A small model, the same start and the same blocks for every loss."""
    transformers.set_seed(0)
    model = make_language_model(CONFIG, end_of_text=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    blocks = RandomBlocks(tokens, CONFIG.block_size, STEPS * BATCH_SIZE, seed=0)
    for step in range(STEPS):
        rows = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        ids = torch.stack([blocks[row]["input_ids"] for row in rows])
        loss_fn(model(input_ids=ids).logits, ids, input_ids=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measure(model: torch.nn.Module, held_out: Tensor) -> tuple[float, float]:
    """Perplexity of the held-out text; share of the tokens of a continuation that it has used before."""
    perplexity = lossmith.Perplexity(shift=True)
    rows = held_out[: len(held_out) // CONFIG.block_size * CONFIG.block_size].view(-1, CONFIG.block_size)
    for ids in rows[:64].split(16):
        perplexity.update(model(input_ids=ids).logits, ids)
    ids = rows[:32, :PROMPT]
    for _ in range(CONTINUATION):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], -1)
    distinct = [len(set(row)) / CONTINUATION for row in ids[:, PROMPT:].tolist()]
    return perplexity.compute(), 1 - sum(distinct) / len(distinct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args()
    try:
        import optuna
    except ModuleNotFoundError:
        raise SystemExit("this example needs Optuna: pip install optuna") from None
    transformers.logging.set_verbosity_error()
    corpus = load_corpus("pydoc")
    tokenizer = train_tokenizer(corpus, CONFIG.vocab_size)
    tokens, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        loss_fn = lossmith.UnifiedLoss(
            CONFIG.vocab_size,
            shift=True,
            use_ngram_penalty=True,
            ngram_size=1,
            ngram_penalty_weight=trial.suggest_float("ngram_penalty_weight", 0.05, 4.0, log=True),
            use_immediate_repetition_penalty=True,
            immediate_repetition_weight=trial.suggest_float("immediate_repetition_weight", 0.2, 1.5),
        )
        return measure(train(loss_fn, tokens), held_out)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0)
    )
    study.optimize(objective, n_trials=options.trials)
    best = {trial.number for trial in study.best_trials}
    print(f"{'n-gram':>8}{'immediate':>11}{'perplexity':>12}{'repeated':>10}   (* none is better in both)")
    for trial in sorted(study.trials, key=lambda trial: trial.values[0]):
        ngram, immediate = trial.params.values()
        perplexity, repeated = trial.values
        mark = " *" if trial.number in best else ""
        print(f"{ngram:8.2f}{immediate:11.2f}{perplexity:12.1f}{repeated:10.1%}{mark}")


if __name__ == "__main__":
    main()
