"""A batch with all that a UnifiedLoss may want."""

import torch

IGNORE, B, T, V, D, E = -100, 2, 24, 11, 6, 4


def inputs() -> dict:
    rng = torch.Generator().manual_seed(7)

    def tensor(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)

    targets = torch.randint(V, (B, T), generator=rng)
    targets[:, 5:12] = 3
    targets[0, 20:] = IGNORE
    return {
        "logits": tensor(B, T, V),
        "targets": targets,
        "input_ids": torch.randint(3, (B, T), generator=rng),
        "hidden_states": tensor(B, T, D),
        "gate_logits": tensor(B, T, E),
        "expert_outputs": tensor(B, T, E, D),
        "contrastive_pairs": (tensor(4, D), tensor(4, D)),
        "confidence_scores": torch.rand(B, T, generator=rng, dtype=torch.float64, requires_grad=True),
    }
