"""State that steps: at whose step it advances, and how often."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lossmith import AdaptiveTemperature, ComposedLoss, CrossEntropyLoss, MoEBalance
from lossmith.core.stepping import PATIENCE, Stepped

V, D = 5, 4
TARGETS = torch.ones(2, 3, dtype=torch.long)


def adaptive() -> CrossEntropyLoss:
    return CrossEntropyLoss(temperature=AdaptiveTemperature())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V))


def steps_of(criterion) -> int:
    return int(criterion.temperature.num_steps)


def backward(criterion, net) -> None:
    criterion(net(torch.ones(2, 3, D)), TARGETS).backward()


def optimizer_of(net, make=torch.optim.SGD, **options) -> torch.optim.Optimizer:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return make(net.parameters(), **{"lr": 0.0, **options})


def test_the_optimizer_of_another_model_does_not_advance_it():
    criterion, net, other = adaptive(), model(), model()
    own, theirs = optimizer_of(net), optimizer_of(other)
    for _ in range(3):
        backward(criterion, net)
        theirs.step()
        assert steps_of(criterion) == 0
    own.step()
    assert steps_of(criterion) == 1
    # in turns, as a model and its judge are trained, with micro-batches on both sides
    for step in range(2, 5):
        for _ in range(2):
            backward(criterion, net)
            theirs.step()
        own.step()
        theirs.step()
        assert steps_of(criterion) == step


def test_each_loss_follows_its_own_model():
    pairs = [(adaptive(), model()) for _ in range(2)]
    optimizers = [optimizer_of(net) for _, net in pairs]
    for pair in pairs:
        backward(*pair)
    optimizers[1].step()
    assert [steps_of(criterion) for criterion, _ in pairs] == [0, 1]
    optimizers[0].step()
    assert [steps_of(criterion) for criterion, _ in pairs] == [1, 1]


def test_the_bias_of_experts_too():
    net, other = model(), model()
    balance = MoEBalance(2, mode="bias", bias_update_rate=1.0)
    criterion = ComposedLoss(CrossEntropyLoss(), {"balance": balance})
    own, theirs = optimizer_of(net), optimizer_of(other)
    gates = torch.tensor([1.0, 0.0]).expand(2, 3, 2)
    criterion(net(torch.ones(2, 3, D)), TARGETS, gate_logits=gates).backward()
    theirs.step()
    assert not balance.expert_bias.any()
    own.step()
    assert balance.expert_bias.tolist() == [-1, 1]


def test_every_batch_since_the_last_step_counts():
    """The step of whom the first of them trained is no less this loss's than that of the last."""
    for which in range(2):
        criterion, nets = adaptive(), [model(), model()]
        for net in nets:
            backward(criterion, net)
        optimizer_of(nets[which]).step()
        assert steps_of(criterion) == 1


def test_an_optimizer_that_has_dtensors_in_their_place_counts():
    """As FSDP2 makes them: they are not the tensors that the loss was computed from."""

    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    criterion, net = adaptive(), model()
    backward(criterion, net)
    part = torch.zeros(3).as_subclass(Sharded).requires_grad_()
    torch.optim.SGD([part], lr=0.0).step()
    assert steps_of(criterion) == 1


def test_several_optimizers_of_one_model_are_one_step():
    criterion, net = adaptive(), model()
    parts = optimizer_of(net[0]), optimizer_of(net[2], torch.optim.AdamW)
    for step in range(1, 4):
        backward(criterion, net)
        for optimizer in parts:
            optimizer.step()
        assert steps_of(criterion) == step


def test_the_losses_own_parameters_count():
    criterion, net = adaptive(), model()
    extra = nn.Parameter(torch.zeros(V))
    loss = criterion(net(torch.ones(2, 3, D)).detach() + extra, TARGETS)
    loss.backward()
    optimizer_of(net).step()
    assert steps_of(criterion) == 0
    torch.optim.SGD([extra], lr=0.0).step()
    assert steps_of(criterion) == 1


def test_a_closure_is_evaluated_often_and_is_one_step():
    criterion, net = adaptive(), model()
    optimizer = optimizer_of(net, torch.optim.LBFGS, lr=0.1, max_iter=4)
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(loss := criterion(net(torch.ones(2, 3, D)), TARGETS))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert steps_of(criterion) == 1


def test_a_step_that_is_left_out_is_none():
    criterion, net = adaptive(), model()
    optimizer = optimizer_of(net)
    scaler = torch.amp.GradScaler("cpu")
    for size in (torch.inf, 1.0):
        loss = criterion(net(torch.ones(2, 3, D)), TARGETS)
        scaler.scale(loss * size).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert steps_of(criterion) == (size == 1.0)


def test_where_the_parameters_do_not_show_any_step_counts():
    """Reentrant checkpoints hide them, and a compiled loss is not looked into."""
    criterion, net = adaptive(), model()
    hidden = torch.ones(2, 3, D, requires_grad=True)
    criterion(checkpoint(net, hidden, use_reentrant=True), TARGETS).backward()
    optimizer_of(net).step()
    assert steps_of(criterion) == 1
    torch._dynamo.reset()
    whole = torch.compile(lambda x: criterion(net(x), TARGETS), fullgraph=True, backend="aot_eager")
    for number in (2, 3):
        for _ in range(2):
            whole(torch.ones(2, 3, D)).backward()
        optimizer_of(net).step()
        assert steps_of(criterion) == number
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", ["model", "optimizer"])
def test_a_compiled_model_and_a_compiled_optimizer(compiled):
    torch._dynamo.reset()
    criterion, net, other = adaptive(), model(), model()
    own, theirs = optimizer_of(net), optimizer_of(other)
    called, step = net, own.step
    if compiled == "model":
        called = torch.compile(net, backend="aot_eager")
    else:
        step = torch.compile(own.step, backend="eager")
    for number in range(1, 3):
        backward(criterion, called)
        theirs.step()
        assert steps_of(criterion) == number - 1
        step()
        assert steps_of(criterion) == number
    torch._dynamo.reset()


def test_a_copy_follows_the_copy_of_its_model():
    criterion, net = adaptive(), model()
    backward(criterion, net)
    twin, twin_net = copy.deepcopy((criterion, net))
    backward(twin, twin_net)
    optimizer_of(twin_net).step()
    assert (steps_of(criterion), steps_of(twin)) == (0, 1)
    backward(twin, twin_net)
    optimizer_of(net).step()
    assert (steps_of(criterion), steps_of(twin)) == (1, 1)


def test_what_sets_has_news_alone_advances_at_any_step():
    class Counted(Stepped):
        number = 0

        def advance(self) -> None:
            self.number += 1

    counted = Counted()
    counted.has_news = True
    optimizer_of(model()).step()
    optimizer_of(model()).step()
    assert counted.number == 1


class Waiting(Stepped):
    def advance(self) -> None:
        raise AssertionError


def test_one_that_waits_for_ever_says_so_once():
    """As where DeepSpeed's optimizer has flat copies of the parameters in their place."""
    waiting, net = Waiting(), model()
    loss, copies = net(torch.ones(D)).sum(), optimizer_of(model())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(PATIENCE + 3):
            waiting.take_note(loss)
            copies.step()
    assert [str(warning.message) for warning in said] == [
        f"Waiting waits for the step of an optimizer that has a parameter of the loss's graph, and after "
        f"{PATIENCE} batches only others have stepped; call the objective's on_optimizer_step() after each "
        "step, as DeepSpeed needs it"
    ]


def test_one_that_is_done_with_says_nothing():
    """A loss whose last batch nobody stepped for, while other models are trained."""
    waiting, net, other = Waiting(), model(), optimizer_of(model())
    waiting.take_note(net(torch.ones(D)).sum())
    for _ in range(PATIENCE + 3):
        other.step()
