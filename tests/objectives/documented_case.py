"""Stand-ins for what code written for the losses of docs/migration.md expects around it, and its runner."""

from types import SimpleNamespace

import torch

import lossmith

EOS, PAD = 2, 1
# Three of four tokens come again and go on otherwise, and two tokens are alike: there is what to penalise.
TEXT = [5, 6, 7, 8, 5, 6, 7, 9, 9, 3, *range(10, 24)]
T, WIDTH, NUM_EXPERTS = len(TEXT), 8, 8
FULL, SMALL = 50257, 64
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def run(code: str, **names) -> SimpleNamespace:
    """What a block leaves behind, with stand-ins for what it does not define itself."""
    namespace = {"torch": torch, "UnifiedLoss": lossmith.UnifiedLoss, "tokenizer": TOKENIZER, **names}
    exec(compile(code, "<documented>", "exec"), namespace)
    return SimpleNamespace(**{k: v for k, v in namespace.items() if not k.startswith("__")})


def small(code: str) -> str:
    """The block with a small vocabulary, where it makes heads of 768 by 50257."""
    assert str(FULL) in code
    return code.replace(str(FULL), str(SMALL))


class Model(torch.nn.Module):
    """What the blocks want of a model, and no more."""

    def __init__(self, vocab_size: int = FULL, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.gate = torch.nn.Linear(width, NUM_EXPERTS)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.head = torch.nn.Linear(width, vocab_size)
        self.saves_memory = False

    def forward(self, input_ids, labels=None, attention_mask=None, output_hidden_states=False):
        hidden = self.embed(input_ids)
        gate_logits = self.gate(hidden)
        outputs = torch.stack([expert(hidden) for expert in self.experts], -2)
        weights, indices = gate_logits.softmax(-1).topk(2)
        last = hidden + (weights.unsqueeze(-1) * outputs).sum(-2)
        return SimpleNamespace(
            logits=self.head(last),
            hidden_states=(hidden, last) if output_hidden_states else None,
            gate_logits=gate_logits,
            expert_indices=indices,
            expert_outputs=outputs,
        )

    def gradient_checkpointing_enable(self) -> None:
        self.saves_memory = True


def batch() -> dict:
    """Two rows, one of them padded; labels are aligned with the inputs, logits[t] predict labels[t]."""
    text = torch.tensor([TEXT, TEXT])
    mask = torch.ones_like(text)
    mask[1, -4:] = 0
    inputs = text.roll(1, -1)
    inputs[:, 0] = 4
    return {"input_ids": inputs, "labels": text.masked_fill(mask == 0, -100), "attention_mask": mask}


def tensors(vocab_size: int, width: int = WIDTH) -> dict:
    """What any component may read, each with a gradient."""
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=rng).requires_grad_()

    return {
        "logits": tensor(1, T, vocab_size),
        "hidden_states": tensor(1, T, width),
        "gate_logits": tensor(1, T, NUM_EXPERTS),
        "expert_outputs": tensor(1, T, 2, WIDTH),
        "additional_logits": tensor(2, 1, T, vocab_size),
        "confidence_scores": torch.rand(1, T, generator=rng).requires_grad_(),
    }


# The input that a part has its gradient to, if not the logits.
READS = {
    "mtp_loss": "hidden_states",
    "confidence_loss": "confidence_scores",
    "moe_balance_loss": "gate_logits",
    "diversity_loss": "expert_outputs",
    "contrastive_loss": "hidden_states",
}


def check_parts(loss_fn, expected: list[str], given: dict, reads: dict = READS) -> None:
    """These parts and no others, finite, summing to the loss, each with a gradient."""
    wanted = {reads[name]: given[reads[name]] for name in expected if name in reads}
    parts = loss_fn(given["logits"], torch.tensor([TEXT]), return_detailed=True, **wanted)
    assert set(parts) == {"main_loss", *expected, "total_loss"}
    total = parts.pop("total_loss")
    assert total.isfinite()
    torch.testing.assert_close(sum(parts.values()), total)
    for name, part in parts.items():
        (gradient,) = torch.autograd.grad(part, given[reads.get(name, "logits")], retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any(), name
