"""The Trainer without logits: in training, and in evaluation where nobody asks for them."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from huggingface_models import D, batch, make
from huggingface_trainers import arguments
from special_models import Largest

import lossmith
from lossmith.integrations.huggingface import LossTrainer

VOCABULARY, ROWS = 500, 8
BUDGET = 20 * VOCABULARY * 4  # 20 rows of logits; the weights have less


def data() -> list[dict]:
    columns = batch(ROWS)
    return [{name: column[i] for name, column in columns.items()} for i in range(ROWS)]


def make_trainer(folder, kind="unified", make_model=None, **options) -> LossTrainer:
    losses = {
        "plain": lambda: lossmith.CrossEntropyLoss(label_smoothing=0.1),
        "nvamp": lambda: lossmith.NVAMPLoss(gamma=0.1),
        "unified": lambda: lossmith.UnifiedLoss(VOCABULARY, D, use_mtp=True, use_ngram_penalty=True),
    }
    own = {name: options.pop(name) for name in list(options) if name in ("max_steps", "logging_steps")}
    torch.manual_seed(1)
    return LossTrainer(
        loss=losses[kind](),
        args=arguments(
            folder,
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=ROWS,
            learning_rate=0.1,
            **own,
        ),
        train_dataset=data(),
        eval_dataset=data(),
        **({"model": make("llama", vocab_size=VOCABULARY)} if make_model is None else make_model),
        **options,
    )


def largest_of(call) -> int:
    with Largest() as largest:
        call()
    return largest.elements


def seen_by_head(trainer: LossTrainer) -> list[int]:
    """The number of positions that the model's head computes logits of, a number each time."""
    found: list[int] = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: found.append(output[..., 0].numel()))
    return found


@pytest.mark.parametrize("how", ["model", "model_init"])
def test_training_and_evaluation_make_no_tensor_of_all_logits(how, tmp_path):
    num_logits = batch(ROWS)["labels"].numel() * VOCABULARY
    model = make("llama", vocab_size=VOCABULARY)
    given = {"model": model} if how == "model" else {"model_init": lambda: model}
    for materialize in (False, True):
        trainer = make_trainer(
            tmp_path, make_model=given, max_steps=2, memory_budget=BUDGET, materialize_logits=materialize
        )
        for call in (trainer.train, trainer.evaluate):
            elements = largest_of(call)
            assert elements >= num_logits if materialize else elements <= BUDGET // 4 < num_logits


@pytest.mark.parametrize("kind", ["plain", "nvamp", "unified"])
def test_the_losses_are_the_same(kind, tmp_path):
    found = []
    for options in ({"materialize_logits": True}, {}, {"memory_budget": BUDGET, "strategy": "two_sweep"}):
        trainer = make_trainer(tmp_path, kind, max_steps=5, logging_steps=1, **options)
        trainer.train()
        history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append([*history, trainer.evaluate()["eval_loss"]])
    assert len(found[0]) == 6
    assert found[0][4] < found[0][0]
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-5)


def test_what_asks_for_logits_gets_them(tmp_path):
    """`predict`, metrics, and callbacks that call the model."""
    labels, whole = batch(ROWS)["labels"], []
    trainer = make_trainer(tmp_path, max_steps=1)
    expected = make_trainer(tmp_path, materialize_logits=True).predict(data())
    heads = seen_by_head(trainer)
    predicted = trainer.predict(data())
    assert heads == [labels.numel()]
    torch.testing.assert_close(*(torch.as_tensor(p.predictions) for p in (predicted, expected)))
    assert predicted.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)

    trainer.compute_metrics = lambda made: {"classes": made.predictions.shape[-1]}
    assert trainer.evaluate()["eval_classes"] == VOCABULARY
    trainer.preprocess_logits_for_metrics = lambda logits, _: whole.append(logits.shape) or logits.argmax(-1)
    trainer.compute_metrics = lambda made: {"right": float((made.predictions == made.label_ids).mean())}
    assert 0 <= trainer.evaluate()["eval_right"] <= 1
    assert whole == [(*labels.shape, VOCABULARY)]
    trainer.compute_metrics = None
    heads.clear()
    trainer.evaluate()
    assert sum(heads) <= 1


class Generates(transformers.TrainerCallback):
    """Looks at samples between the steps."""

    def on_step_end(self, args, state, control, model=None, **_):
        ids = batch(ROWS)["input_ids"]
        self.logits = model(ids).logits
        model.eval()
        self.labelled = model(ids, labels=ids).logits
        self.text = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        model.train()

    on_prediction_step = on_step_end


def test_callbacks_that_generate(tmp_path):
    callback = Generates()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[callback])
    shape = batch(ROWS)["labels"].shape
    for call in (trainer.train, trainer.evaluate):
        call()
        assert callback.logits.shape == callback.labelled.shape == (*shape, VOCABULARY)
        assert callback.text.shape == (1, shape[1] + 3)


def test_evaluation_with_ligers_kernels(tmp_path):
    """The Trainer tells Liger's forward to leave out the logits; the loss is computed in ours."""
    trainer = make_trainer(tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    trainer.args.use_liger_kernel = True
    assert trainer.evaluate()["eval_loss"] == expected


def test_the_arguments_are_looked_at_before_anything_else(tmp_path):
    with pytest.raises(ValueError, match="strategy must be one of"):
        make_trainer(tmp_path, strategy="three_sweep")
    with pytest.raises(ValueError, match="memory_budget must be a whole number > 0"):
        make_trainer(tmp_path, memory_budget=0)
