"""Fine-tune with TRL's SFTTrainer and an objective of several parts.

    pip install trl && python examples/trl_sft.py

Takes half a minute on a CPU and downloads nothing: the conversations are made here, the model is a small
Llama with random weights.
"""

import sys
import tempfile

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lossmith
from lossmith.integrations.huggingface import LossTrainer

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f"this example needs TRL, and {error}; run: pip install trl")

COLOURS = ["red", "green", "blue", "white", "black"]
THINGS = ["house", "river", "stone", "bird", "boat", "tree"]
STEPS = 60


class LossSFTTrainer(LossTrainer, SFTTrainer):
    """SFTTrainer prepares the data, LossTrainer computes the loss.

    Recent releases of SFTTrainer do not take the loss that the model's forward returns, so that
    ``attach(model, loss)`` alone would not do.
    """


def make_data() -> Dataset:
    """Questions and answers; only the answers are learned."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    return Dataset.from_list(
        [
            {
                "prompt": f"what colour is the {colour} {thing} ? ",
                "completion": f"the {thing} is {colour} .",
            }
            for colour, thing in pairs
        ]
    )


def make_tokenizer(data: Dataset) -> transformers.PreTrainedTokenizerFast:
    """A token a word."""
    words = sorted({word for row in data for text in row.values() for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def main() -> None:
    transformers.set_seed(0)
    data = make_data()
    tokenizer = make_tokenizer(data)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    loss = lossmith.UnifiedLoss(
        vocab_size=len(tokenizer),
        label_smoothing=0.05,
        use_immediate_repetition_penalty=True,
        use_ngram_penalty=True,
        ngram_size=3,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = LossSFTTrainer(
            loss=loss,
            model=model,
            args=SFTConfig(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=10,
                learning_rate=5e-3,
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
                bf16=False,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
    question = tokenizer("what colour is the blue boat ?", return_tensors="pt")["input_ids"]
    answer = model.eval().generate(question, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
