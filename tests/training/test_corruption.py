"""Masked tokens, replaced tokens: how many, which, and that the block's number decides it."""

import pytest
import torch

pytest.importorskip("transformers")

from lossmith.training.data.blocks import RandomBlocks
from lossmith.training.data.corruption import (
    Corrupted,
    Replacement,
    choose,
    draw_number,
    generator_of,
    mask_tokens,
)
from lossmith.training.errors import UserError

TEXT = torch.tensor([3] * 50 + [4] * 30 + [5] * 15 + [6] * 5 + [0] * 40)  # 0 is a special token
REPLACE = Replacement(TEXT, 10, never=[0, 1, 2])


def test_a_number_of_positions_is_chosen_each_as_often_as_another():
    generator = generator_of("positions")
    times = torch.zeros(10)
    for _ in range(3000):
        chosen = choose(10, 3, generator)
        assert chosen.sum() == 3
        times += chosen
    assert (times / 3000 - 0.3).abs().max() < 0.04
    assert choose(10, 0, generator).sum() == 0
    assert choose(10, 10, generator).all()


def test_every_number_is_as_likely():
    generator = generator_of("numbers")
    drawn = torch.tensor([draw_number(1, 4, generator) for _ in range(4000)])
    assert torch.bincount(drawn).tolist()[0] == 0
    assert (torch.bincount(drawn)[1:] / 4000 - 0.25).abs().max() < 0.03


def test_masked_tokens():
    block = torch.arange(10, 30)
    ids, masked = mask_tokens(block, 1, 7, generator_of("mask"))
    assert masked.sum() == 7
    assert (ids[masked] == 1).all()
    assert torch.equal(ids[~masked], block[~masked])
    assert torch.equal(block, torch.arange(10, 30))  # it is a view of the text


@pytest.mark.parametrize("own", [0, 3, 4, 5, 6, 7])
def test_a_replacement_is_another_token_as_frequent_as_in_the_text(own: int):
    """7 does not occur in the text, and 0 is never drawn."""
    block = torch.full((20_000,), own)
    ids, replaced = REPLACE(block, len(block), generator_of(f"replace {own}"))
    assert replaced.all()
    expected = torch.tensor([0, 0, 0, 50, 30, 15, 5, 0, 0, 0.0])
    expected[own] = 0
    found = torch.bincount(ids, minlength=10) / len(block)
    assert torch.equal(found == 0, expected == 0)
    assert (found - expected / expected.sum()).abs().max() < 0.02


def test_what_is_not_replaced_stays():
    block = TEXT[torch.randperm(len(TEXT), generator=generator_of("order"))]
    ids, replaced = REPLACE(block, 30, generator_of("some"))
    assert replaced.sum() == 30
    assert torch.equal(ids != block, replaced)


def test_a_text_of_one_kind_of_token():
    with pytest.raises(UserError, match="the training text repeats one token"):
        Replacement(torch.tensor([0, 3, 3, 3]), 10, never=[0, 1, 2])


def test_the_block_s_number_decides_and_nothing_else():
    tokens = torch.arange(1000)

    def corrupt(block: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"input_ids": mask_tokens(block, -1, draw_number(1, 8, generator), generator)[0]}

    def of(num_blocks: int, stream: str) -> Corrupted:
        return Corrupted(RandomBlocks(tokens, 8, num_blocks, seed=1), corrupt, stream)

    few, many, other = of(5, "a"), of(500, "a"), of(5, "b")
    torch.manual_seed(3)  # nor the global random numbers
    forwards = [few[i]["input_ids"] for i in range(5)]
    backwards = [many[i]["input_ids"] for i in reversed(range(5))][::-1]
    assert all(map(torch.equal, forwards, backwards))
    assert not all(torch.equal(forwards[i], other[i]["input_ids"]) for i in range(5))
    assert len({tuple((block == -1).tolist()) for block in forwards}) == 5
    assert len(many) == 500
