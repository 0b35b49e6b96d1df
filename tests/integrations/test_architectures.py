"""The loss and the gradients of ``attach`` are the model's own, on architectures that are each special in
some way. ``scripts/architectures`` tries every one that there is."""

import pytest

pytest.importorskip("transformers")

import transformers
from tiny_architectures import compare, names

# By what is special. None: nothing is.
EXACT = {
    "LlamaForCausalLM": None,
    "GPT2LMHeadModel": None,
    "Gemma2ForCausalLM": None,  # a soft cap
    "CohereForCausalLM": None,  # a scale
    "AyaVisionForConditionalGeneration": None,  # a scale in the configuration that is not applied
    "Cohere2VisionForConditionalGeneration": None,  # the same
    "Gemma3ForConditionalGeneration": None,  # a soft cap that is not applied
    "MiniCPM3ForCausalLM": None,  # a scale that is applied before the head
    "MuseGlimmerForConditionalGeneration": None,  # a scale and a soft cap
    "ChameleonForConditionalGeneration": "all logits",  # tokens of images are masked out
    "BartForCausalLM": "labels at their own positions",
    "CpmAntForCausalLM": "labels at their own positions",
    "ProphetNetForCausalLM": "labels at their own positions; all logits",  # predicts several tokens
    "WhisperForCausalLM": "labels at their own positions",
    "XLMWithLMHeadModel": "labels at their own positions",
    "XLNetLMHeadModel": "labels at their own positions",
    "Kosmos2ForConditionalGeneration": "the first batch is looked at",  # does not do without pictures
}
REFUSED = ("T5Gemma2ForConditionalGeneration", "VisionEncoderDecoderModel", "DiffusionGemmaForBlockDiffusion")


def of(name: str):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    return compare(name)


@pytest.mark.parametrize("name", EXACT)
def test_the_loss_is_the_models_own(name):
    outcome = of(name)
    assert outcome.kind == "exact", outcome
    assert (EXACT[name] or "") in outcome.note
    assert bool(EXACT[name]) == bool(outcome.note), outcome


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_labels_of_its_input_is_refused(name):
    assert of(name).kind == "refused"


def test_every_architecture_has_a_name():
    assert len(names()) > 100
