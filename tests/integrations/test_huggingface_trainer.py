"""The Trainer with an objective: the same update however a batch is split, and a resumed run is the same."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from huggingface_models import V, assert_same, batch, gradients, make, shifted
from huggingface_trainers import LR, arguments, mtp, parameters, rows, split

import lossmith
from lossmith.integrations.huggingface import LossTrainer, attach, compute_loss_func

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def by_samples() -> lossmith.LossModifierPipeline:
    return lossmith.LossModifierPipeline([lossmith.MaskRatioWeightModifier({})], base=mtp())


LOSSES = {
    "plain": lossmith.CrossEntropyLoss,
    "parts": mtp,
    "samples": by_samples,
    "class_weight": lambda: lossmith.CrossEntropyLoss(class_weight=torch.linspace(1, 3, V)),
}


def one_step_by_hand(name: str, loss: lossmith.Objective) -> dict[str, torch.Tensor]:
    """The parameters of the model and the loss after a step of the whole batch at once."""
    model = attach(make(name), loss)
    model(**batch(8)).loss.backward()
    found = gradients(model)
    return {n: p.detach() - LR * found.get(n, 0) for n, p in model.named_parameters()}


# ── what the loss is divided by ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_micro_batches_make_no_difference(name, loss, tmp_path):
    """Each has another number of targets; nothing is divided by the number of micro-batches again."""
    expected = one_step_by_hand(name, LOSSES[loss]())
    for rows_each in (8, 4, 2):
        trainer = LossTrainer(
            loss=LOSSES[loss](),
            model=make(name),
            args=arguments(tmp_path, **split(rows_each)),
            train_dataset=rows(),
        )
        trainer.train()
        assert_same(parameters(trainer), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attach_is_enough_for_the_plain_trainer(name, tmp_path):
    expected = one_step_by_hand(name, mtp())
    for rows_each in (8, 2):
        trainer = transformers.Trainer(
            attach(make(name), mtp()), arguments(tmp_path, **split(rows_each)), train_dataset=rows()
        )
        trainer.train()
        assert_same(parameters(trainer), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_trainers_compute_loss_func(name, tmp_path):
    loss = lossmith.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.01)
    expected = one_step_by_hand(name, loss)
    for rows_each in (8, 2):
        model = make(name)
        model.loss_type = "ForCausalLM"  # GPT-2 has none, and the Trainer would count position 0
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path, **split(rows_each)),
            train_dataset=rows(),
            compute_loss_func=compute_loss_func(loss),
        )
        trainer.train()
        found = parameters(trainer)
        assert_same(found, {name: expected[name] for name in found}, **CLOSE)


def test_gpt2_counts_what_it_is_trained_on(tmp_path):
    inputs = batch(8)
    inputs["labels"][:, 0] = 5
    targets = (shifted(inputs["labels"]) != -100).sum()
    plain = transformers.Trainer(make("gpt2"), arguments(tmp_path))
    assert plain._get_num_items_in_batch([inputs], plain.args.device) == targets + 8  # the trap
    attached = transformers.Trainer(attach(make("gpt2"), mtp()), arguments(tmp_path))
    assert attached._get_num_items_in_batch([inputs], attached.args.device) == targets
    ours = LossTrainer(loss=mtp(), model=make("gpt2"), args=arguments(tmp_path))
    assert ours._get_num_items_in_batch([inputs], ours.args.device) == targets
    assert ours._get_num_items_in_batch([inputs, inputs], ours.args.device) == 2 * targets


def test_what_is_counted_is_the_objectives_own(tmp_path):
    inputs = batch(8)
    inputs["labels"] = inputs["input_ids"].clone()  # padding has labels; the mask leaves it out
    device = torch.device("cpu")
    kept = inputs["attention_mask"][:, 1:].sum()
    ours = LossTrainer(loss=mtp(), model=make("llama"), args=arguments(tmp_path))
    assert ours._get_num_items_in_batch([inputs], device) == kept
    ours = LossTrainer(loss=by_samples(), model=make("llama"), args=arguments(tmp_path))
    assert ours._get_num_items_in_batch([inputs, inputs], device) == 16
    del inputs["labels"]
    assert ours._get_num_items_in_batch([inputs], device) is None
    assert ours._get_num_items_in_batch([], device) is None


def test_compute_loss_func_of_an_output():
    """Tuples as well; what the output has of other components' inputs is handed over."""
    inputs, model = batch(), make("mixtral")
    moe = {"use_moe_balancing": True, "num_experts": 4, "moe_top_k": 2}
    loss = lossmith.UnifiedLoss(V, use_contrastive_loss=True, **moe)
    labels = inputs.pop("labels")
    expected = attach(make("mixtral"), loss)(inputs["input_ids"], labels=labels).loss
    output = model(inputs["input_ids"], output_router_logits=True, output_hidden_states=True)
    torch.testing.assert_close(compute_loss_func(loss)(output, labels), expected)
    plain = compute_loss_func(lossmith.CrossEntropyLoss())
    torch.testing.assert_close(plain((output.logits,), labels), plain(output, labels))
    n = (shifted(labels) != -100).sum()
    torch.testing.assert_close(plain(output, labels, num_items_in_batch=2 * n), plain(output, labels) / 2)


# ── parameters, checkpoints, the log ──────────────────────────────────────────────────────────────


def test_heads_decay_like_the_model(tmp_path):
    trainer = LossTrainer(
        loss=mtp(shared_projection=True),
        model=make("llama"),
        args=arguments(tmp_path, weight_decay=0.1, optim="adamw_torch"),
    )
    decays = {
        id(p): group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    heads = trainer.loss.components["mtp_loss"].component.heads
    assert {decays[id(head.weight)] for head in heads} == {0.1}
    assert {decays[id(head.bias)] for head in heads} == {0.0}
    assert len(decays) == len([p for p in trainer.model.parameters() if p.requires_grad])


def state_of(trainer) -> dict[str, torch.Tensor]:
    found = {**trainer.model.state_dict(), **{f"loss.{k}": v for k, v in trainer.loss.state_dict().items()}}
    return {name: value.clone() for name, value in found.items()}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Heads, their moments, and the temperature with its history."""

    def make_trainer(**options):
        loss = mtp(adaptive_temperature=True)
        loss.base.temperature.history = torch.zeros(2)  # moves from the second step on
        args = arguments(
            tmp_path,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            optim="adamw_torch",
            learning_rate=0.01,
            lr_scheduler_type="linear",
            **split(4),
            **options,
        )
        return LossTrainer(loss=loss, model=make("llama"), args=args, train_dataset=rows(32))

    whole = make_trainer()
    whole.train()
    assert whole.loss.base.temperature.value != 1
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state_of(resumed), state_of(whole), rtol=0, atol=0)
    assert resumed.state.global_step == 6

    kept = type(make("llama")).from_pretrained(tmp_path / "checkpoint-6")
    assert_same(kept.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    (tmp_path / "checkpoint-3" / "lossmith_loss.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no lossmith_loss.pt.*begin anew"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_model_comes_back_with_its_loss(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=50.0,
        load_best_model_at_end=True,
        save_total_limit=3,
    )
    trainer = LossTrainer(
        loss=mtp(), model=make("llama"), args=args, train_dataset=rows(), eval_dataset=rows()
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-3")
    saved = torch.load(f"{best}/lossmith_loss.pt", weights_only=True)
    assert_same(dict(trainer.loss.state_dict()), saved)


def test_a_loss_without_state_leaves_no_file(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = LossTrainer(
        loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=args, train_dataset=rows()
    )
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not list(tmp_path.rglob("lossmith_loss.pt"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_log_shows_the_parts_and_what_modifiers_measure(tmp_path):
    pipeline = lossmith.LossModifierPipeline(
        [lossmith.TargetSmoothingModifier({"factor": 0.1}), lossmith.MetricsCollectorModifier({})],
        base=mtp(),
    )
    for loss in (mtp(), pipeline):
        args = arguments(tmp_path, max_steps=4, logging_steps=2, **split(4))
        trainer = LossTrainer(loss=loss, model=make("llama"), args=args, train_dataset=rows(32))
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert len(lines) == 2
        for line in lines:
            parts = {name: value for name, value in line.items() if name.startswith("loss/")}
            assert {"loss/mtp_loss", "loss/ngram_penalty"} < set(parts)
            assert sum(parts.values()) == pytest.approx(line["loss"], rel=1e-5)
            measured = [name for name in line if name.startswith("loss_modifiers/")]
            assert bool(measured) is (loss is pipeline)
            assert all(isinstance(line[name], float) for name in measured)


def test_every_part_is_logged_apart_by_its_own_name(tmp_path):
    """Cross-entropy, z-loss and each component, whichever objective they are parts of."""
    names = {"cross_entropy", "z_loss", "mtp_loss", "ngram_penalty"}
    for loss in (mtp(z_loss=0.1), lossmith.LossModifierPipeline(base=mtp(z_loss=0.1))):
        args = arguments(tmp_path, logging_steps=1)
        trainer = LossTrainer(loss=loss, model=make("llama"), args=args, train_dataset=rows())
        trainer.train()
        assert {n for n in trainer.state.log_history[0] if "/" in n} == {f"loss/{name}" for name in names}


def test_evaluation_and_predictions(tmp_path):
    trainer = LossTrainer(loss=mtp(), model=make("llama"), args=arguments(tmp_path), eval_dataset=rows(8))
    expected = attach(make("llama"), mtp()).eval()(**batch(8))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predicted = trainer.predict(rows(8))
    assert predicted.predictions[0].shape[-1] == V
    assert "loss/main_loss" not in trainer.state.log_history[-1]


def test_columns_of_the_loss_are_kept(tmp_path):
    scores = torch.rand(8, batch(8)["labels"].shape[1])
    loss = lossmith.UnifiedLoss(V, primary_loss_type="adaptive_mtp")
    seen = []
    evaluate = loss.evaluate
    loss.evaluate = lambda *args, **inputs: seen.append(inputs) or evaluate(*args, **inputs)  # type: ignore
    trainer = LossTrainer(
        loss=loss,
        model=make("llama"),
        args=arguments(tmp_path, per_device_train_batch_size=8),
        train_dataset=rows(confidence_scores=scores, remarks=scores),
    )
    trainer.train()
    assert seen[0]["confidence_scores"].shape == scores.shape


def test_a_model_made_anew_has_its_loss_as_it_was(tmp_path):
    loss = mtp()
    before = copy.deepcopy(loss.state_dict())
    trainer = LossTrainer(
        loss=loss,
        model_init=lambda: make("llama"),
        args=arguments(tmp_path, **split(8)),
        train_dataset=rows(),
    )
    expected = one_step_by_hand("llama", mtp())
    for _ in range(2):
        trainer.train()
        assert_same(parameters(trainer), expected, **CLOSE)
    assert not torch.equal(next(iter(before.values())), next(iter(loss.state_dict().values())))


def test_mixed_precision_of_accelerate(tmp_path):
    args = arguments(tmp_path, bf16=True, **split(4))
    trainer = LossTrainer(loss=mtp(), model=make("llama"), args=args, train_dataset=rows())
    trainer.train()
    expected = one_step_by_hand("llama", mtp())
    assert_same(parameters(trainer), expected, rtol=0.05, atol=0.05)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


def test_arguments_that_would_make_another_loss(tmp_path):
    def refused(message, loss=mtp, **options):
        own = {n: options.pop(n) for n in ("compute_loss_func",) if n in options}
        with pytest.raises((TypeError, ValueError), match=message):
            LossTrainer(loss=loss(), model=make("llama"), args=arguments(tmp_path, **options), **own)

    refused("label_smoothing_factor makes a loss of its own", label_smoothing_factor=0.1)
    refused("has a loss already", compute_loss_func=print)
    refused("must be a lossmith.Objective", loss=torch.nn.CrossEntropyLoss)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_data_parallel_is_refused(num, tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = num
    if num > 1:
        with pytest.raises(ValueError, match=r"DataParallel copies the model.*torchrun"):
            LossTrainer(loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=args)
    else:
        LossTrainer(loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=args)


@pytest.mark.parametrize("how", ["get_cp_size", "get_sp_size"])
def test_rows_that_are_cut_into_pieces_are_refused(how, tmp_path, monkeypatch):
    monkeypatch.setattr(LossTrainer, how, lambda self: 2)
    with pytest.raises(ValueError, match="parallelism cut rows into pieces"):
        LossTrainer(loss=mtp(), model=make("llama"), args=arguments(tmp_path))


def test_a_model_that_is_filled_without_the_loss_is_refused(tmp_path, monkeypatch):
    """A loss without a state has none to be left out."""
    settings = SimpleNamespace(cpu_ram_efficient_loading=True, fsdp_version=2)
    monkeypatch.setattr(LossTrainer, "_fsdp", settings)
    with pytest.raises(ValueError, match=r"cpu_ram_efficient_loading .* leaves out that of a UnifiedLoss"):
        LossTrainer(loss=mtp(), model=make("llama"), args=arguments(tmp_path))
    LossTrainer(loss=lossmith.CrossEntropyLoss(), model=make("llama"), args=arguments(tmp_path))


def test_a_second_model_for_a_loss_in_parts_is_refused(tmp_path):
    loss = mtp()
    trainer = LossTrainer(loss=loss, model_init=lambda: make("llama"), args=arguments(tmp_path))
    trainer.call_model_init()
    next(loss.parameters()).ds_id = 0  # as under ZeRO-3
    with pytest.raises(ValueError, match=r"the parameters of the UnifiedLoss in parts.*make a new trainer"):
        trainer.call_model_init()


@pytest.mark.parametrize("given", [None, "others", "list"])
def test_fsdp1_is_kept_from_buffers_of_modules_without_parameters(given, tmp_path, monkeypatch):
    other = torch.nn.Linear(1, 1)
    ignored = [other] if given == "list" else given
    settings = SimpleNamespace(cpu_ram_efficient_loading=False, fsdp_version=1, ignored_modules=ignored)
    monkeypatch.setattr(LossTrainer, "_fsdp", settings)
    loss, model = mtp(adaptive_temperature=True), make("llama")
    LossTrainer(loss=loss, model=model, args=arguments(tmp_path))
    if given == "others":  # a pattern of names, as accelerate reads it
        names = [name for name, _ in model.named_modules() if re.fullmatch(settings.ignored_modules, name)]
        assert names == ["attached_loss.objective.base", "attached_loss.objective.base.temperature"]
        assert re.fullmatch(settings.ignored_modules, "others")
    else:
        own = [loss.base, loss.base.temperature]
        assert settings.ignored_modules == ([other, *own] if given else own)


def test_losses_that_compute_loss_func_cannot_serve():
    with pytest.raises(ValueError, match="would neither train, nor synchronise, nor save"):
        compute_loss_func(mtp())
    with pytest.raises(ValueError, match="divides by samples"):
        compute_loss_func(lossmith.CrossEntropyLoss(reduction="sequence_mean"))
