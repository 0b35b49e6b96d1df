"""A run says before it trains which modifiers cannot act on its data."""

import pytest

pytest.importorskip("transformers")

from every_mode import MODES
from running import go

SWITCHES = ["--loss_modifiers_enabled", "--entropy_modifier_enabled", "--target_smoothing_enabled"]
ALIKE = "\nwarning: MaskRatioWeightModifier weighs all samples alike: "
NO_ENTROPY = "\nwarning: EntropyModifier has no effect: with 2 classes "


@pytest.mark.parametrize(
    ("mode", "enabled", "told"),
    [
        ("causal", "EntropyModifier, TargetSmoothingModifier", [ALIKE]),
        ("classifier", "TargetSmoothingModifier", [ALIKE, NO_ENTROPY]),
        ("masked", "EntropyModifier, TargetSmoothingModifier, MaskRatioWeightModifier", []),
    ],
)
def test_what_is_announced_acts(mode: str, enabled: str, told: list[str], tiny: list[str]):
    flags = [*tiny, *MODES[mode], *SWITCHES, "--mask_ratio_weight_enabled", "--max_iters=2", "--batch_size=1"]
    shown = go(flags)[1]
    assert f"\nEnabled loss modifiers: {enabled}\n" in shown
    assert [text for text in (ALIKE, NO_ENTROPY) if text in shown] == told
    assert shown.count("odifier weighs all") + shown.count("odifier has no effect") == len(told)
