"""What users bring a network in: wrappers taken off, adapters merged, copies of what cannot be copied, refusals."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern import Target, prune
from prunekern.errors import ModelError
from prunekern.graph.parts import Parts, copied
from tests.weights import randomise_

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = Target(layers={"*": 0.5})


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3),
                                        nn.ReLU(), nn.Flatten(), nn.Linear(192, 3))).eval()


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled_in_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(torch.compile(model)).eval()      # type: ignore[arg-type]


# ---- wrappers ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("wrap", "words"), [
    (nn.DataParallel, ["DataParallel"]), (distributed, ["DistributedDataParallel"]),
    (torch.compile, ["torch.compile"]), (compiled_in_parallel, ["DataParallel", "torch.compile"])])
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module], words: list[str], tmp_path: Path) -> None:
    inner = net()
    result = pk.compress(wrap(inner).eval(), X, HALF)
    assert type(result.model) is nn.Sequential
    assert result.form == "class"
    assert all(any(word in note for note in result.notes) for word in words)
    assert torch.equal(result.model(X), prune(inner, X, HALF).model(X))
    result.save(tmp_path)
    assert torch.equal(pk.load(tmp_path, model=wrap(net()).eval()).model(X), result.model(X))


def test_a_model_compiled_in_place_and_compiled_layers() -> None:
    model = net()
    model[3] = torch.compile(model[3])                       # type: ignore[assignment]
    model.compile()
    result = prune(model, X, HALF)
    assert type(result.model) is nn.Sequential
    with torch.no_grad():
        assert result.model[3]._orig_mod.weight.shape == (6, 4, 3, 3)


# ---- adapters ------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """What is needed of a PEFT model: settings, and a method that merges in place and gives the base model."""

    def __init__(self, base: nn.Sequential) -> None:
        super().__init__()
        self.base, self.peft_config = base, {"default": None}
        self.down, self.up = nn.Parameter(torch.randn(2, 192)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.base[:6](x) @ self.down.t() @ self.up.t()

    def merge_and_unload(self) -> nn.Module:
        if not isinstance(self.base[6], nn.Linear):
            raise TypeError("cannot merge this layer")
        self.base[6].weight += self.up @ self.down
        return self.base


def test_adapters_are_merged_into_a_copy() -> None:
    model = Adapted(net()).eval()
    before, wanted = copy.deepcopy(model.state_dict()), model(X)
    whole = prune(model, X, Target(macs=1.0))
    assert type(whole.model) is nn.Sequential
    assert torch.allclose(whole.model(X), wanted, atol=1e-5)
    assert any("adapters of Adapted were merged" in note for note in whole.notes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert prune(model, X, HALF).model[0].out_channels == 4


def test_adapters_that_cannot_be_merged() -> None:
    model = Adapted(net()).eval()
    model.base[6] = nn.Sequential(model.base[6])
    with pytest.raises(ModelError, match=r"Adapted cannot be merged \(TypeError: cannot merge this layer\)"):
        prune(model, X, HALF)


def test_lora_of_the_peft_library() -> None:
    try:
        import peft
    except Exception as error:      # it drags in torchvision, which may not fit this torch
        pytest.skip(f"peft: {error}")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["3", "6"], r=2))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    wanted = model(X)
    assert torch.allclose(prune(model, X, Target(macs=1.0)).model(X), wanted, atol=1e-5)
    assert prune(model, X, HALF).model[3].weight.shape == (6, 4, 3, 3)
    assert any("lora" in name for name, _ in model.named_parameters())


# ---- copies --------------------------------------------------------------------------------------------------------


class Locked(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def locked() -> nn.Module:
    return nn.Sequential(Locked(*net()[:3]), *net()[3:]).eval()


def test_what_cannot_be_copied_comes_as_a_graph(tmp_path: Path) -> None:
    result = pk.compress(locked(), X, HALF)
    assert result.form == "graph"
    assert any("Sequential cannot be copied (TypeError" in note and "lock" in note for note in result.notes)
    assert result.model.get_submodule("0.0").out_channels == 4
    assert torch.equal(result.model(X), prune(net(), X, HALF).model(X))
    result.save(tmp_path)
    assert torch.equal(pk.load(tmp_path, model=locked()).model(X), result.model(X))


def test_parts_keep_what_can_be_copied() -> None:
    model = locked()
    model[3].weight = model[0][0].weight                     # tied across the part that comes apart
    whole, parts = copied(net(), {}), copied(model, {})
    assert type(whole) is nn.Sequential
    assert isinstance(parts, Parts)
    assert isinstance(parts.get_submodule("0"), Parts)
    assert type(parts.get_submodule("0.1")) is nn.BatchNorm2d
    assert parts.get_parameter("3.weight") is parts.get_parameter("0.0.weight") is not model[3].weight
    assert parts.state_dict().keys() == model.state_dict().keys()
    assert not parts.training


def test_activations_left_on_a_module_do_not_hinder() -> None:
    model = net()
    model.features = [model[0](X)]
    assert prune(model, X, HALF).proof.form == "class"
    assert model.features[0].grad_fn is not None


def test_gradients_hooks_and_buffers_stay() -> None:
    model = net()
    calls: list[int] = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    model(X).sum().backward()
    before = [(p.grad.clone(), dict(m._forward_hooks)) for m in model.modules() for p in m.parameters(recurse=False)]
    state = torch.get_rng_state()
    result = prune(model, X, HALF)
    after = [(p.grad, dict(m._forward_hooks)) for m in model.modules() for p in m.parameters(recurse=False)]
    assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(result.model[3]._forward_hooks) == 1
    assert all(p.grad is None for p in result.model.parameters())


class FrozenNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d: all four vectors are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_batch_norm_shrinks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenNorm(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    result = prune(model, X, HALF)
    assert result.proof.form == "class"
    assert {tuple(buffer.shape) for buffer in result.model[1].buffers()} == {(4,)}


# ---- refusals ------------------------------------------------------------------------------------------------------


def scripted_child() -> nn.Module:
    model = net()
    model[3] = torch.jit.script(model[3])
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3)).eval()


def aware() -> nn.Module:
    model = net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model).eval()


def observed() -> nn.Module:
    model = net()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    return torch.ao.quantization.prepare(model)


def exported() -> nn.Module:
    return torch.export.export(net(), (X,)).module()


def sharded() -> nn.Module:
    return type("Wrapped", (nn.Sequential,), {"__module__": "torch.distributed.fsdp.fully_sharded"})(*net()).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "words"), [
    (scripted_child, ["'3' is scripted", "original nn.Module"]), (lazy, ["'0.weight' is lazy", "run the model once"]),
    (aware, ["quantised", "prune the float model"]), (observed, ["quantised", "prune the float model"]),
    (exported, ["exported", "original nn.Module"]), (sharded, ["sharded", "gather the full state dict"])])
def test_what_is_no_float_network_of_plain_tensors(build: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        pk.compress(build(), X)
    assert all(word in str(caught.value) for word in words)
