"""Which logits predict a label: as in the model's own loss, whatever model it is and whoever computes it."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from huggingface_models import D, T, V, assert_same, batch, gradients, make, mean_nll, shifted
from huggingface_trainers import LR, arguments, parameters, rows
from special_models import IDS, aligned, bart

import lossmith
from lossmith.integrations.huggingface import LossTrainer, attach, compute_loss_func

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BERT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert(kind: str, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options
    )
    return getattr(transformers, f"BertFor{kind}")(config)


# ── attach ────────────────────────────────────────────────────────────────────────────────────────


def test_a_decoder_whose_own_loss_does_not_shift_is_followed():
    """Bart's: its logits[t] are judged by labels[t]."""
    model, inputs = bart().train(), aligned(batch())
    expected = model(**inputs).loss
    expected.backward()
    by_model = gradients(model)
    for shift in (None, False, 0):
        attach(model, lossmith.CrossEntropyLoss(shift=shift))
        found = model(**inputs)
        found.loss.backward()
        torch.testing.assert_close(found.loss, expected)
        assert found.logits is None
        assert_same(gradients(model), by_model, **CLOSE)


def test_the_trainer_counts_what_such_a_decoder_is_trained_on(tmp_path):
    """Its class is called ForCausalLM, by which transformers takes position 0 for one without a target."""
    inputs = batch(8)
    inputs["labels"][:, 0] = 5
    num_targets = (inputs["labels"] != -100).sum()
    ours = LossTrainer(loss=lossmith.CrossEntropyLoss(), model=bart(), args=arguments(tmp_path))
    plain = transformers.Trainer(attach(bart(), lossmith.CrossEntropyLoss()), arguments(tmp_path))
    for trainer in (ours, plain):
        assert trainer._get_num_items_in_batch([inputs], trainer.args.device) == num_targets


@pytest.mark.parametrize("shift", [True, 2])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_shift_that_the_objective_asks_for_is_made(name, shift):
    """Two tokens ahead; or the next one, where the model's own loss wants labels that are shifted already."""
    model, inputs = bart() if name == "bart" else make(name), batch()
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    targets = shifted(inputs["labels"], int(shift))
    found = attach(model, lossmith.UnifiedLoss(V, shift=shift))(**inputs).loss
    torch.testing.assert_close(found, mean_nll(logits, targets, (targets != -100).sum()))


def test_labels_that_are_the_inputs_are_pointed_out_where_nothing_shifts():
    inputs = batch()
    model = attach(bart(), lossmith.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="teaches the model to copy"):
        model(inputs["input_ids"], labels=inputs["input_ids"])


class TwoAhead(transformers.LlamaForCausalLM):
    """A model whose own loss is of another convention still, with more in it than the labels' likelihood."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        output = super().forward(input_ids, attention_mask, **inputs)
        if labels is not None:
            targets = shifted(labels, 2)
            nll = mean_nll(output.logits, targets, (targets != -100).sum(), label_smoothing=0.1)
            output["loss"] = 3 * nll + 0.01 * output.logits.logsumexp(-1).square().mean()
        return output


def test_a_loss_of_any_kind_shows_which_logits_predict_a_label():
    """By its gradient: label smoothing, a z-loss and a factor do not hide it."""
    config = make("llama").config
    model, inputs = TwoAhead(config), batch()
    targets = shifted(inputs["labels"], 2)
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    for shift in (None, 2):
        attach(model, lossmith.CrossEntropyLoss(shift=shift))
        torch.testing.assert_close(model(**inputs).loss, mean_nll(logits, targets, (targets != -100).sum()))


class Silent(transformers.LlamaForCausalLM):
    """A model that takes labels and makes nothing of them."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        return super().forward(input_ids, attention_mask, **inputs)


def test_a_model_without_a_loss_predicts_the_next_token_unless_the_objective_says_more():
    inputs, config = aligned(batch()), make("llama").config
    torch.manual_seed(0)
    models = [Silent(config) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"predict labels\[t \+ 1\]. Make the objective with shift="):
        attach(models[0], lossmith.CrossEntropyLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(models[1], lossmith.CrossEntropyLoss(shift=0))
    for model, shift in zip(models, (1, 0), strict=True):
        with torch.no_grad():
            logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        targets = shifted(inputs["labels"], shift)
        torch.testing.assert_close(model(**inputs).loss, mean_nll(logits, targets, (targets != -100).sum()))


# ── compute_loss_func ─────────────────────────────────────────────────────────────────────────────


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, **IDS
    )
    return transformers.T5ForConditionalGeneration(config)


def with_decoder_inputs(model, inputs):
    return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(inputs["labels"])}


def classes(inputs, shape):
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(3, shape, generator=rng)
    return {
        **inputs,
        "labels": labels.masked_fill(inputs["labels"] == -100, -100) if len(shape) > 1 else labels,
    }


OTHERS = {
    "masked": lambda: (bert("MaskedLM"), batch()),
    "token classifier": lambda: (bert("TokenClassification", num_labels=3), classes(batch(), (4, T))),
    "sequence classifier": lambda: (bert("SequenceClassification", num_labels=3), classes(batch(), (4,))),
    "encoder-decoder": lambda: (model := t5(), with_decoder_inputs(model, batch())),
    "causal": lambda: (make("llama"), batch()),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_loss_of_other_models_is_their_own(kind):
    model, inputs = OTHERS[kind]()
    num_items = {"num_items_in_batch": torch.tensor(17)}
    own = 0 if kind != "causal" else 1
    labels = inputs["labels"]
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    for shift in (None, own, bool(own)):
        function = compute_loss_func(lossmith.CrossEntropyLoss(shift=shift))
        torch.testing.assert_close(function(outputs, labels), model(**inputs).loss)
    n = (labels != -100).sum() if own == 0 else (shifted(labels) != -100).sum()
    torch.testing.assert_close(function(outputs, labels, **num_items), function(outputs, labels) * n / 17)


@pytest.mark.parametrize("kind", ["masked", "token classifier", "sequence classifier", "encoder-decoder"])
def test_a_trainer_of_other_models_makes_the_step_of_their_own_loss(kind, tmp_path):
    """Over micro-batches, each with another number of labels."""
    own, inputs = OTHERS[kind]()
    own(**inputs).loss.backward()
    found = gradients(own)
    expected = {n: p.detach() - LR * found.get(n, 0) for n, p in own.named_parameters()}
    data = [{name: column[i] for name, column in inputs.items()} for i in range(4)]
    for rows_each in (4, 1):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=rows_each,
            gradient_accumulation_steps=4 // rows_each,
            remove_unused_columns=False,
        )
        trainer = transformers.Trainer(
            OTHERS[kind]()[0],
            args,
            train_dataset=data,
            compute_loss_func=compute_loss_func(lossmith.CrossEntropyLoss()),
        )
        trainer.train()
        assert_same(parameters(trainer), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [False, True, 2])
def test_an_objective_that_says_its_shift_is_obeyed(shift):
    outputs, labels = {"logits": torch.randn(2, T, V)}, torch.randint(V, (2, T))
    expected = lossmith.cross_entropy(outputs["logits"], labels, shift=shift)
    for loss in (lossmith.CrossEntropyLoss(shift=shift), lossmith.UnifiedLoss(V, shift=shift)):
        torch.testing.assert_close(compute_loss_func(loss)(outputs, labels), expected)
        torch.testing.assert_close(compute_loss_func(loss)((outputs["logits"],), labels), expected)


def test_a_sample_is_never_given_the_next_ones_class():
    function = compute_loss_func(lossmith.CrossEntropyLoss(shift=True))
    with pytest.raises(ValueError, match=r"labels of shape \[4\] are one a sample, and shift=True"):
        function({"logits": torch.randn(4, 3)}, torch.tensor([0, 1, 2, 0]))


def test_labels_that_are_no_ids_are_refused():
    function = compute_loss_func(lossmith.CrossEntropyLoss())
    for labels, came in ((torch.rand(4), "float32"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"labels must be ids.*got .*{came}"):
            function({"logits": torch.randn(4, 1)}, labels)


def test_a_pipeline_for_token_classifiers_serves_them():
    model, inputs = OTHERS["token classifier"]()
    pipeline = lossmith.LossModifierPipeline(
        [lossmith.TargetSmoothingModifier({})],
        model_mode="TOKEN_CLASSIFIER",
        base=lossmith.CrossEntropyLoss(),
    )
    outputs = model(**inputs)
    expected = pipeline(outputs.logits, inputs["labels"])
    torch.testing.assert_close(compute_loss_func(pipeline)(outputs, inputs["labels"]), expected)
    with pytest.raises(ValueError, match="model_mode=LANGUAGE_MODEL; got TOKEN_CLASSIFIER"):
        attach(make("llama"), pipeline)


# ── a Trainer that computes another loss ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_keeps_the_labels_to_itself_is_refused(how, tmp_path):
    """The objective that is attached would never be computed."""
    smooths = how == "label_smoothing_factor"
    options = (
        {}
        if smooths
        else {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs["logits"].sum()}
    )
    trainer = transformers.Trainer(
        attach(make("llama"), lossmith.CrossEntropyLoss()),
        arguments(tmp_path, label_smoothing_factor=0.1 if smooths else 0.0),
        train_dataset=rows(),
        eval_dataset=rows(),
        **options,
    )
    message = r"CrossEntropyLoss attached: the Trainer keeps .* label_smoothing_factor .* compute_loss_func"
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            call()


def test_another_loss_that_arguments_ask_for_is_refused(tmp_path):
    """TRL's trainers have it; LossTrainer stands before them and goes past their losses."""
    for other in ("dft", ["sigmoid"]):
        args = arguments(tmp_path)
        args.loss_type = other
        with pytest.raises(ValueError, match="asks for another loss than the objective"):
            LossTrainer(loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=args)
    args.loss_type = "nll"
    LossTrainer(loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=args)


# ── ids ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_another_dtype(dtype):
    loss = lossmith.UnifiedLoss(V, D, use_mtp=True, use_ngram_penalty=True, ngram_size=1)
    model, inputs = attach(make("llama"), loss), batch()
    expected = model(**inputs).loss
    torch.testing.assert_close(model(**{**inputs, "labels": inputs["labels"].to(dtype)}).loss, expected)


def test_ids_of_another_dtype():
    loss = lossmith.UnifiedLoss(V, D, use_mtp=True)
    model, inputs = attach(make("llama"), loss), batch()
    expected = model(**inputs).loss
    narrow = {name: value.int() for name, value in inputs.items()}
    torch.testing.assert_close(model(**narrow).loss, expected)
