"""Constructors that were written for the losses of docs/migration.md, with only the import changed."""

# What a block makes, and the parts that it must have.
CONSTRUCTORS = {
    "standard": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="standard",
    label_smoothing=0.0  # Optional smoothing
)
""",
    ),
    "deepseek": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",
    initial_temperature=1.0,
    adaptive_temperature=True,
    label_smoothing=0.1,
    eos_penalty_weight=0.05
)
""",
    ),
    "adaptive_mtp": (
        ["confidence_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    primary_loss_type="adaptive_mtp",
    adaptive_threshold=0.7,
    adaptive_weight_range=(0.5, 1.5)
)
""",
    ),
    "mtp": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    use_mtp=True,
    num_future_tokens=3,      # Predict 1-3 tokens ahead
    mtp_type="deepseek",       # or "adaptive"
    mtp_weight=0.1             # Weight relative to main loss
)
""",
    ),
    "ngram": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_size=4,                  # Check 4-grams
    ngram_penalty_weight=0.1,      # Penalty strength
    ngram_window_size=50           # Look-back window
)
""",
    ),
    "immediate": (
        ["immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5,
    immediate_repetition_threshold=2  # Trigger after 2 repeats
)
""",
    ),
    "early_eos": (
        ["eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    eos_token_id=50256,
    min_sequence_length=20,        # Don't allow EOS before position 20
    eos_penalty_weight=0.05
)
""",
    ),
    "moe": (
        ["moe_balance_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    num_experts=8,
    use_moe_balancing=True,
    gradient_balance_weight=0.1,
    target_expert_usage=0.125  # 1/8 for 8 experts
)
""",
    ),
    "advanced": (
        ["focal_loss", "diversity_loss", "contrastive_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_focal_loss=True,
    focal_gamma=2.0,              # Focus factor
    use_diversity_loss=True,
    diversity_weight=0.05,
    use_contrastive_loss=True,
    contrastive_temperature=0.07
)
""",
    ),
    "standard_training": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
from lossmith import UnifiedLoss

loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",      # ⭐ Recommended

    # Temperature & smoothing
    initial_temperature=1.0,
    adaptive_temperature=True,
    label_smoothing=0.1,

    # Repetition prevention
    use_ngram_penalty=True,
    ngram_penalty_weight=0.1,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5,

    # EOS handling
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    min_sequence_length=20,
    eos_penalty_weight=0.05
)
""",
    ),
    "anti_repetition": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",

    # Strong repetition penalties
    use_ngram_penalty=True,
    ngram_size=4,
    ngram_penalty_weight=0.2,        # Higher weight
    ngram_window_size=100,

    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.0,  # Much higher
    immediate_repetition_threshold=2,

    # Prevent early EOS
    eos_token_id=tokenizer.eos_token_id,
    min_sequence_length=30,           # Longer minimum
    eos_penalty_weight=0.1,

    # Temperature control
    initial_temperature=1.2,          # Slightly higher
    adaptive_temperature=True
)
""",
    ),
    "temperature_bounds": (
        [],
        """
# Use safe temperature bounds
loss_fn = UnifiedLoss(
    vocab_size=50257,
    initial_temperature=1.0,  # Start at 1.0
    temperature_bounds=(0.7, 1.5)  # Narrow bounds
)
""",
    ),
    "more_components": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="deepseek",  # Switch to DeepSeek
    label_smoothing=0.1,            # Add smoothing
    use_ngram_penalty=True,         # Add penalties
    adaptive_temperature=True       # Enable adaptation
)
""",
    ),
    "penalty_weights": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    ngram_penalty_weight=0.2,        # Increase from 0.1
    immediate_repetition_weight=1.0  # Increase from 0.5
)
""",
    ),
    "without_mtp": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=False  # Saves 5-10% memory
)
""",
    ),
    "fewer_future_tokens": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=True,
    num_future_tokens=2,  # Reduce from 3 to 2
    shared_projection=True  # Share projection heads
)
""",
    ),
    "without_expensive": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_mtp=False,           # Disable MTP (8% speedup)
    use_focal_loss=False,    # Disable focal loss
    use_diversity_loss=False # Disable diversity loss
)
""",
    ),
    "smaller_window": (
        ["ngram_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_window_size=30  # Reduce from 50
)
""",
    ),
    "fastest": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    primary_loss_type="standard",  # Fastest option
    use_ngram_penalty=True,        # Keep only cheap penalties
    use_immediate_repetition_penalty=True
)
""",
    ),
    "stronger_penalties": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_ngram_penalty=True,
    ngram_penalty_weight=0.3,        # Much higher
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.5, # Much higher
    eos_penalty_weight=0.15          # Prevent early exit
)
""",
    ),
    "longer_sequences": (
        [],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    min_sequence_length=50,  # Longer sequences
    eos_penalty_weight=0.1
)
""",
    ),
    "diversity": (
        ["diversity_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_diversity_loss=True,
    diversity_weight=0.1  # Encourage varied outputs
)
""",
    ),
    "mtp_again": (
        ["mtp_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    hidden_size=768,
    use_mtp=True,
    num_future_tokens=3,
    mtp_type="deepseek"  # or "adaptive"
)
""",
    ),
    "repetition_again": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    # N-gram repetition (prevents "the the the")
    use_ngram_penalty=True,
    ngram_size=4,
    ngram_penalty_weight=0.1,
    # Immediate repetition (prevents "time time time")
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=0.5
)
""",
    ),
    "eos_again": (
        ["eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    eos_token_id=50256,
    min_sequence_length=20,
    eos_penalty_weight=0.05
)
""",
    ),
    "moe_again": (
        ["moe_balance_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    num_experts=8,
    use_moe_balancing=True,
    gradient_balance_weight=0.1
)
""",
    ),
    "advanced_again": (
        ["focal_loss", "diversity_loss", "auxiliary_loss"],
        """
loss_fn = UnifiedLoss(
    vocab_size=50257,
    use_focal_loss=True,
    use_diversity_loss=True,
    use_auxiliary_loss=True
)
""",
    ),
    "standard_again": (
        ["ngram_penalty", "immediate_repetition_penalty", "eos_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    primary_loss_type="deepseek",
    label_smoothing=0.1,
    use_ngram_penalty=True,
    use_immediate_repetition_penalty=True,
    eos_token_id=tokenizer.eos_token_id
)
""",
    ),
    "anti_repetition_again": (
        ["ngram_penalty", "immediate_repetition_penalty"],
        """
loss_fn = UnifiedLoss(
    vocab_size=vocab_size,
    primary_loss_type="deepseek",
    # Stronger penalties
    use_ngram_penalty=True,
    ngram_penalty_weight=0.2,
    use_immediate_repetition_penalty=True,
    immediate_repetition_weight=1.0,
    eos_penalty_weight=0.1,
    min_sequence_length=30
)
""",
    ),
}
