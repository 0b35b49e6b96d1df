"""Judges from folders and files: what is taken, and what is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lossmith.integrations.judge import SequenceJudge, load_judge
from lossmith.modifiers.tokens.judge import SequenceScoringJudgeWeightModifier

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def scorer(num_labels: int = 1, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, num_labels=num_labels, **options)
    return transformers.BertForSequenceClassification(config).eval()


def pt_file(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "judge.pt"
    torch.save(content, path)
    return path


IDS = torch.arange(20).reshape(2, 10)


def test_a_folder(tmp_path):
    model = scorer(cls_token_id=7)
    model.save_pretrained(tmp_path)
    judge = load_judge(tmp_path)
    expected = model(IDS, attention_mask=torch.ones_like(IDS)).logits.squeeze(-1).sigmoid()
    torch.testing.assert_close(judge(IDS), expected.detach())
    assert (judge.cls_token_id, judge.block_size, judge.vocab_size) == (7, 12, 40)
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_a_decoder_judges_the_whole_sequence(tmp_path):
    """It has no padding token, or one that is drawn: the last token is the last token."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    for pad in (None, 19):
        config = transformers.LlamaConfig(**sizes, num_labels=1, pad_token_id=pad)
        model = transformers.LlamaForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path)
        expected = model.score(model.model(IDS).last_hidden_state[:, -1]).squeeze(-1).sigmoid()
        torch.testing.assert_close(load_judge(tmp_path)(IDS), expected.detach())


@pytest.mark.parametrize("names", [("model", "config"), ("state_dict", "model_args")])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_file_of_weights_and_configuration(names, prefix, tmp_path):
    model = scorer()
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    path = pt_file(tmp_path, {names[0]: weights, names[1]: model.config.to_dict(), "iter_num": 5})
    torch.testing.assert_close(load_judge(path)(IDS), model(IDS).logits.squeeze(-1).sigmoid().detach())


def test_dtype_and_the_modifier(tmp_path):
    scorer().save_pretrained(tmp_path)
    modifier = SequenceScoringJudgeWeightModifier(
        {"checkpoint": str(tmp_path), "dtype": "bfloat16", "device": "cpu"}
    )
    judge = modifier.judge
    assert {parameter.dtype for parameter in judge.parameters()} == {torch.bfloat16}
    assert judge(IDS).dtype == torch.float32
    modifier.modify_loss(torch.randn(2, 6, 40), torch.randint(40, (2, 6)))
    assert 0 < modifier.get_metrics()["mean_wrongness"] < 1
    for dtype in ("auto", None, torch.float32):
        parameters = load_judge(tmp_path, dtype=dtype, device="auto").parameters()
        assert {p.dtype for p in parameters} == {torch.float32}
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_judge(tmp_path, dtype="int8")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


def test_nothing_is_ever_unpickled(tmp_path):
    path = pt_file(tmp_path, {"model": Bomb(), "config": {}})
    with pytest.raises(ValueError, match=r"without running code from it.*save_pretrained"):
        load_judge(path)
    folder = tmp_path / "folder"
    model = scorer()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(folder)
    torch.save({"bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_judge(folder)


def test_what_is_refused(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_judge(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 700

    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "no config.json")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-100").mkdir()
    refused(tmp_path, "It holds checkpoints; pass .*checkpoint-100")
    language_model = tmp_path / "lm"
    transformers.BertForMaskedLM(scorer().config).save_pretrained(language_model)
    refused(language_model, "is a BertForMaskedLM; expected a model for sequence classification")
    two = tmp_path / "two"
    scorer(num_labels=2).save_pretrained(two)
    refused(two, "has 2 labels; expected 1")
    bare = tmp_path / "bare"
    transformers.BertModel(scorer().config).save_pretrained(bare)
    config = scorer().config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(bare)
    refused(bare, "lacks classifier.bias, classifier.weight")

    state = scorer().state_dict()
    refused(pt_file(tmp_path, {"model": state}), "holds model; expected 'model', a state dict, and 'config'")
    refused(pt_file(tmp_path, [1, 2]), "holds a list; expected a dictionary")
    wrong = {"model": state, "config": {"model_type": "no such thing"}}
    refused(pt_file(tmp_path, wrong), "cannot be loaded: Unrecognized model")
    other = {"model": state, "config": {**scorer().config.to_dict(), "hidden_size": 8}}
    refused(pt_file(tmp_path, other), "cannot be loaded: Error.* in loading state_dict")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"not a checkpoint")
    refused(damaged, "or is damaged")


def test_a_judge_never_waits_for_the_device(tmp_path):
    from unittest import mock

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this waits for the device")

    for name in ("Bert", "ModernBert"):
        config = getattr(transformers, f"{name}Config")(
            **SMALL,
            num_labels=1,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        )
        getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(tmp_path)
        judge = load_judge(tmp_path)
        with mock.patch.multiple(torch.Tensor, item=refuse, tolist=refuse, __bool__=refuse):
            wrongness = judge(IDS)
        assert wrongness.shape == (2,)


def test_code_in_a_folder_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('the checkpoint ran code')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_judge(tmp_path)


EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import ViTConfig, ViTForImageClassification
class Evil(ViTForImageClassification):
    config_class = ViTConfig
"""


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("how", ["file", "folder"])
def test_code_that_a_configuration_points_to_is_not_run_and_nobody_is_asked(kind, how, tmp_path, monkeypatch):
    """Neither of a type of model that has no sequence classifier of its own, nor of one that has."""
    mark, asked, code = tmp_path / "ran", [], tmp_path / "code"
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code.mkdir()
    (code / "evil.py").write_text(EVIL.format(mark=str(mark)))
    (code / "config.json").write_text("{}")
    names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    config = {
        **(scorer().config.to_dict() if kind == "bert" else {"model_type": "vit", "num_labels": 1}),
        "architectures": ["EvilForSequenceClassification"],
        "auto_map": dict.fromkeys(names, f"{code}--evil.Evil"),
        "_name_or_path": str(code),
    }
    if how == "file":
        path = pt_file(tmp_path, {"model": scorer().state_dict(), "config": config})
    else:
        path = tmp_path / "folder"
        scorer().save_pretrained(path)
        (path / "config.json").write_text(json.dumps(config))
    if kind == "bert":
        load_judge(path)(IDS)  # transformers' own class
    else:
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_judge(path)
    assert not asked
    assert not mark.exists()


def test_a_folder_that_is_damaged(tmp_path):
    model = scorer()

    def refused(change, message: str) -> None:
        folder = tmp_path / message.replace(" ", "_")
        model.save_pretrained(folder)
        change(folder)
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            load_judge(folder)
        assert str(folder) in str(caught.value)

    refused(lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "weights")
    refused(lambda f: (f / "config.json").write_text('{"model_type": "bert", "hidden_size": "x"}'), "sizes")
    refused(lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer")
    folder = tmp_path / "fine"
    model.save_pretrained(folder)
    for device in ("banana", "cuda" if not torch.cuda.is_available() else "banana"):
        with pytest.raises(ValueError, match=f"{folder} cannot be loaded"):
            load_judge(folder, device=device)


def test_the_length_that_a_model_really_takes(tmp_path):
    config = transformers.RobertaConfig(**SMALL, num_labels=1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    judge = load_judge(tmp_path)
    assert judge.block_size == 10  # of 12, as its positions begin at 2
    judge(torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize(("of_config", "expected"), [(None, 3), (7, 7), (0, 0)])
def test_what_a_sequence_begins_with_is_what_the_configuration_says_or_else_the_tokenizer(
    of_config, expected, tmp_path
):
    model = scorer(cls_token_id=of_config)
    model.save_pretrained(tmp_path)
    tokens = WordLevel({"a": 0, "b": 1, "[UNK]": 2, "[CLS]": 3}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokens), cls_token="[CLS]")
    tokenizer.save_pretrained(tmp_path)
    assert load_judge(tmp_path).cls_token_id == expected
    assert SequenceJudge(model, cls_token_id=3).cls_token_id == expected
    assert SequenceJudge(model).cls_token_id == of_config


def test_a_cls_token_outside_the_vocabulary(tmp_path):
    scorer(cls_token_id=400).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls_token_id=400, outside its vocabulary of 40"):
        load_judge(tmp_path)
