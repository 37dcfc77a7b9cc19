"""Training: learning, schedules, forms of data, leaving things as they were, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from prunekern.errors import InputError, ModelError, UnknownName
from prunekern.train import accuracy, evaluate
from tests.training import blobs, figures, network, same, train

# --- learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "sgd", "lr": 0.05, "nesterov": True, "schedule": "step"},
        {"optimizer": "adamw", "lr": 0.01, "schedule": "constant"},
    ],
    ids=str,
)
def test_it_learns(options: dict[str, Any]) -> None:
    model, test = network(), blobs(300, seed=5)
    before = accuracy(model, test)
    history = train(model, validate=test, epochs=6, **options)
    assert before < 0.6
    assert accuracy(model, test) > 0.9
    assert history.epochs[-1].loss < history.epochs[0].loss / 2
    assert history.epochs[-1].validation_accuracy == accuracy(model, test)
    assert history.epochs[-1].train_accuracy > history.epochs[0].train_accuracy


def test_one_step_is_the_textbook_update() -> None:
    model = nn.Linear(8, 3)
    x, y = blobs(12)
    weight = model.weight.detach().clone().requires_grad_()
    bias = model.bias.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
    loss.backward()
    expected = weight - 0.1 * (weight.grad + 0.01 * weight)
    history = train(model, (x, y), epochs=1, lr=0.1, batch_size=12, weight_decay=0.01, schedule="constant")
    torch.testing.assert_close(model.weight, expected)
    assert history.epochs[0].loss == pytest.approx(loss.item(), rel=1e-6)
    share = float(((x @ weight.T + bias).argmax(1) == y).float().mean())
    assert history.epochs[0].train_accuracy == pytest.approx(share)


def test_uneven_last_batch_is_weighted_by_its_size() -> None:
    model = network().eval()
    x, y = blobs(50)
    whole = nn.functional.cross_entropy(model(x), y)
    found = evaluate(model, (x, y), batch_size=32)
    assert found.loss == pytest.approx(whole.item(), rel=1e-5)
    assert found.accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


def rates(schedule: str, data: Any = None, **options: Any) -> list[float]:
    """The rate at every step."""
    seen: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Spy)
        train(network(), data, schedule=schedule, epochs=4, lr=1e-3, batch_size=48, **options)
    return seen


def test_schedules() -> None:
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates("constant") == pytest.approx([1e-3] * 8)
    assert rates("step") == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 2)
    assert rates("step", milestones=(0.25,), gamma=0.5) == pytest.approx([1e-3] * 2 + [5e-4] * 6)


def test_schedule_moves_by_epochs_where_the_length_is_unknown() -> None:
    x, y = blobs(96)
    endless = lambda: ((x[i : i + 48], y[i : i + 48]) for i in (0, 48))  # noqa: E731
    by_epoch = [1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(2)]
    assert rates("cosine", endless) == pytest.approx(by_epoch)


def test_early_stopping_restores_the_best_weights() -> None:
    model, test = network(dropout=0.0), blobs(60, seed=5)
    seen: list[dict[str, Tensor]] = []

    def validate() -> tuple[Tensor, Tensor]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        # From the third epoch on the labels are wrong, so validation gets worse.
        return (test[0], test[1] if len(seen) <= 2 else (test[1] + 1) % 3)

    history = train(model, validate=validate, epochs=20, patience=3)
    best = max(range(2), key=lambda i: (history.epochs[i].validation_accuracy, -i))
    assert history.best == best
    assert len(history) == best + 1 + 3
    assert history.stopped_early
    assert history.restored
    assert history.final is history.epochs[best]
    assert all(torch.equal(v, seen[best][k]) for k, v in model.state_dict().items())


def test_best_can_be_restored_without_stopping() -> None:
    model, test = network(), blobs(60, seed=5)
    history = train(model, validate=test, epochs=5, lr=0.5, restore_best=True)
    assert len(history) == 5
    assert not history.stopped_early
    best = max(epoch.validation_accuracy for epoch in history)
    assert accuracy(model, test) == best == history.final.validation_accuracy


def test_regulariser_and_hook() -> None:
    plain, pulled, halted = network(), network(), network()
    train(plain, weight_decay=0.0)
    history = train(pulled, weight_decay=0.0, regularise=lambda m: 0.1 * sum(p.abs().sum() for p in m.parameters()))
    assert pulled[0].weight.abs().sum() < 0.7 * plain[0].weight.abs().sum()
    assert history.epochs[0].loss < 10  # the reported loss is without the penalty
    grads: list[float] = []

    def stop(model: nn.Module) -> None:
        grads.append(float(model[0].weight.grad.abs().sum()))
        for parameter in model.parameters():
            parameter.grad = None

    train(halted, before_step=stop, regularise=lambda model: None)
    assert min(grads) > 0
    assert torch.equal(halted[0].weight, network()[0].weight)


def test_own_loss_and_regression() -> None:
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    history = train(model, (x, y), (x, y), epochs=20, lr=0.05, loss=nn.functional.mse_loss)
    assert history.epochs[-1].validation_loss < 0.05 * history.epochs[0].loss
    assert history.epochs[-1].train_accuracy is None
    assert history.epochs[-1].validation_accuracy is None
    assert json.loads(history.to_json())["epochs"][0]["train_accuracy"] is None
    with pytest.raises(InputError, match="class targets"):
        accuracy(model, (x, y))
    with pytest.raises(InputError, match="class targets"):
        train(model, (x, y), (x, y), patience=1, loss=nn.functional.mse_loss)


# --- forms of data ----------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*blobs(), strict=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: TensorDataset(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), 16, shuffle=True),
        lambda x, y: [(x[:48], y[:48]), (x[48:], y[48:])],
        lambda x, y: lambda: iter([(x, y)]),
        lambda x, y: lambda: (x, y),
        lambda x, y: Stream(),
        lambda x, y: list(zip(x.split(16), y.split(16), strict=True)),
    ],
)
def test_every_form_of_data(make: Callable[[Tensor, Tensor], Any]) -> None:
    x, y = blobs()
    model = network()
    history = train(model, make(x, y), make(x, y), epochs=15)
    assert len(history) == 15
    assert history.epochs[-1].train_accuracy > 0.6
    assert accuracy(model, make(x, y)) == accuracy(model, (x, y)) > 0.9


def test_inputs_may_be_tuples_or_dicts_and_outputs_structured() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
            return self.layer(a + b), None

    x, y = blobs()
    model = Two()
    train(model, [((x, x), y)], epochs=20, lr=0.1)
    assert accuracy(model, [({"b": x, "a": x}, y)]) > 0.9
    with pytest.raises(InputError, match="several inputs"):
        train(model, ((x, x), y))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((torch.zeros(4, 8), torch.zeros(3).long()), "4 inputs and 3 labels"),
        ((torch.zeros(0, 8), torch.zeros(0).long()), "0 inputs and 0 labels"),
        (7, "int"),
        ([], "no batch"),
        ([torch.zeros(4, 8)], "batch 0 is a Tensor"),
        ([(torch.zeros(4, 8), torch.zeros(4), 1)], "tuple of 3"),
        ([(torch.zeros(4, 8), [0, 1])], "tuple of 2"),
        (nn.Linear(8, 3), "Linear"),
    ],
)
def test_bad_data_is_told(data: Any, said: str) -> None:
    model, before = network(), network()
    with pytest.raises(InputError, match=said):
        train(model, data)
    assert same(model, before)


def test_a_used_up_generator_is_told() -> None:
    with pytest.raises(InputError, match="once only"):
        train(network(), iter([blobs()]))


def test_output_without_scores_is_told() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": super().forward(x)}

    with pytest.raises(InputError, match="no class scores"):
        train(Odd(8, 3))


# --- leaving things as they were --------------------------------------------------------------------------


def test_modes_are_left_as_found_also_after_an_error() -> None:
    model = network().eval()
    model[3].train()
    modes = [module.training for module in model.modules()]
    states: list[bool] = []
    train(model, validate=blobs(), before_step=lambda m: states.append(m[1].training))
    assert all(states)
    assert [module.training for module in model.modules()] == modes
    accuracy(model.train(), blobs())
    assert model.training
    assert model[1].training

    def fail(model: nn.Module) -> None:
        raise KeyError("the user's own error")

    model.eval()
    with pytest.raises(KeyError, match="own error"):
        train(model, before_step=fail)
    assert not model.training


def test_evaluation_is_in_eval_mode_without_gradients() -> None:
    model = network().train()
    states: list[tuple[bool, bool]] = []
    model[1].register_forward_hook(lambda m, i, o: states.append((m.training, torch.is_grad_enabled())))
    running = model[1].running_mean.clone()
    evaluate(model, blobs())
    assert states == [(False, False)]
    assert torch.equal(model[1].running_mean, running)


def test_a_plain_function_can_be_evaluated() -> None:
    x, y = blobs()
    assert accuracy(lambda value: nn.functional.one_hot(y, 3).float(), (x, y)) == 1.0


def test_no_global_generator_is_disturbed() -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    train(network())
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_same_seed_same_result_whatever_the_global_state() -> None:
    a, b, c = network(), network(), network()
    torch.manual_seed(1)
    first = train(a, validate=blobs(30, 2), seed=3)
    torch.manual_seed(2)
    second = train(b, validate=blobs(30, 2), seed=3)
    assert same(a, b)
    assert figures(first) == figures(second)
    train(c, validate=blobs(30, 2), seed=4)
    assert not same(a, c)


def orders(seed: int) -> list[list[int]]:
    """The order of the samples in each epoch."""
    x, y = blobs(40)
    model, seen = network(dropout=0.0), []
    where = {bytes(row.numpy()): index for index, row in enumerate(x)}
    model[0].register_forward_hook(lambda m, i, o: seen.extend(where[bytes(row.numpy())] for row in i[0]))
    train(model, (x, y), epochs=2, seed=seed)
    return [seen[:40], seen[40:]]


def test_every_epoch_has_an_order_of_its_own_that_follows_the_seed() -> None:
    first, second = orders(3)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first != list(range(40))
    assert orders(3) == [first, second]
    assert orders(4)[0] != first


def test_frozen_parameters_stay() -> None:
    model, before = network(), network()
    model[0].weight.requires_grad_(False)
    train(model)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_diverging_puts_the_weights_back() -> None:
    model, before = network(), network()
    with pytest.raises(ModelError, match=r"loss became .* in epoch .*lr=1e\+30"):
        train(model, lr=1e30)
    assert same(model, before)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"optimizer": "adamx"}, UnknownName, "adamw, sgd"),
        ({"schedule": "linear"}, UnknownName, "constant, cosine, step"),
        ({"lr": 0.0}, InputError, "lr=0.0"),
        ({"lr": float("nan")}, InputError, "lr=nan"),
        ({"epochs": -1}, InputError, "epochs=-1"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"patience": 2}, InputError, "validate"),
        ({"restore_best": True}, InputError, "validate"),
        ({"amp": True}, InputError, "CUDA only"),
        ({"milestones": (2.0,)}, InputError, "milestones"),
    ],
)
def test_bad_settings_are_told(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        train(network(), **options)


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(ModelError, match="requires_grad"):
        train(network().requires_grad_(False))
    with pytest.raises(ModelError, match=r"not a torch\.nn\.Module"):
        train(len)


def test_no_epochs_change_nothing() -> None:
    model, before = network(), network()
    history = train(model, epochs=0)
    assert (len(history), history.final, history.best) == (0, None, None)
    assert same(model, before)
