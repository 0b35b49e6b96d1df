"""Two processes with two micro-batches each train as one process does, in every engine, with every loss."""

import functools
import importlib.util

import pytest
import torch
import trainers
from engine_list import ENGINES, PAGE, page_with_table
from engines_case import LOSSES, expected

from ranks import free_port, like_torchrun, on_two_ranks

# Two processes that each import an engine take this long.
OTHERS = [pytest.param(name, marks=() if name == "FSDP2" else pytest.mark.slow) for name in ENGINES]


def run_of(rank: int, name: str, port: int) -> dict:
    like_torchrun(rank, port)
    return dict(ENGINES[name].run(rank))


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    """What each of two ranks found in an engine, which is started once, even if it fails."""

    @functools.cache
    def start(name: str) -> list[dict] | Exception:
        try:
            return on_two_ranks(run_of, tmp_path_factory.mktemp("ranks"), name, free_port())
        except Exception as error:
            return error

    def run(name: str) -> list[dict]:
        for module in ENGINES[name].needs:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not there")
        found = start(name)
        if isinstance(found, Exception):
            raise found
        return found

    return run


@functools.cache
def expected_of(name: str, loss: str) -> list[dict]:
    engine = ENGINES[name]
    return trainers.expected(loss) if engine.of_model is None else expected(loss, **engine.of_model)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OTHERS)
def test_two_ranks_train_as_one_process(name, loss, found_by):
    engine = ENGINES[name]
    ranks = [rank[loss] for rank in found_by(name)]
    if loss in engine.refuses:
        assert all(engine.refuses[loss] in said for said in ranks)
        return
    close = {"rtol": engine.tolerance, "atol": engine.tolerance}
    for number, truth in enumerate(expected_of(name, loss)):
        of_ranks = [rank[number] for rank in ranks]
        total = sum(step["loss"] for step in of_ranks)
        torch.testing.assert_close(total, truth["loss"], check_dtype=False, **close)
        for step in of_ranks:
            assert step["gradients"].keys() == truth["gradients"].keys()
            for parameter, gradient in truth["gradients"].items():
                found = step["gradients"][parameter]
                torch.testing.assert_close(
                    found, gradient, check_dtype=False, **close, msg=lambda said, p=parameter: f"{p}: {said}"
                )


def test_the_page_says_what_is_tested():
    """If not: python tests/engines/engine_list.py"""
    assert PAGE.read_text() == page_with_table(PAGE.read_text())
