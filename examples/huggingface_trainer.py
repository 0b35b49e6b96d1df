"""Train a language model with Hugging Face's Trainer and an objective of several parts.

    python examples/huggingface_trainer.py

Takes half a minute on a CPU and downloads nothing: the text is CPython's own documentation, the model a small
Llama with random weights. Needs ``pip install 'lossmith[train]'``.
"""

import pydoc_data.topics
import tempfile

import torch
import transformers

import lossmith
from lossmith.integrations.huggingface import LossTrainer

VOCAB_SIZE = 256  # bytes
ROW = 128
STEPS = 60


def rows_of_text() -> list[dict[str, torch.Tensor]]:
    """Rows of bytes; a causal model's labels are its input."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": row, "labels": row} for row in rows[: len(rows) // ROW * ROW].view(-1, ROW)]


def main() -> None:
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=ROW,
        )
    )
    loss = lossmith.UnifiedLoss(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        use_mtp=True,  # heads that look two bytes further; the Trainer trains and saves them
        num_future_tokens=2,
        shared_projection=True,
        use_ngram_penalty=True,
        z_loss=1e-4,
    )
    rows = rows_of_text()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LossTrainer(
            loss=loss,
            model=model,
            args=transformers.TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,  # changes nothing but the memory it takes
                learning_rate=3e-3,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=rows[32:],
            eval_dataset=rows[:32],
        )
        trainer.train()
        print("evaluation:", round(trainer.evaluate()["eval_loss"], 3))
    print("parts of the last line of the log:")
    logged = [line for line in trainer.state.log_history if "loss" in line][-1]
    for name, value in logged.items():
        if name.startswith("loss/"):
            print(f"  {name.removeprefix('loss/')}: {value:.3f}")


if __name__ == "__main__":
    main()
