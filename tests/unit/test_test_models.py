"""The networks, counters and limits that the other tests stand on."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests import tolerances
from tests.counters import Count, flopcounter_count, fvcore_count
from tests.interpreter import ACTIVATIONS
from tests.models import ARCHITECTURES, WEIGHTS, make, trained_resnet56, trained_resnet56_or_skip
from tests.networks import LEAVES, NESTED, Block, Case, Residual, Spec, build, networks, random_network
from tests.zoo import ZOO
from tests.zoo.registry import conv_bn_act


def outputs_of(model: nn.Module, args: Any, kwargs: Any = None) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tree_leaves(model(*args, **(kwargs or {}))) if isinstance(t, Tensor)]


def samples(inputs: Any, which: slice) -> Any:
    return tree_map(lambda v: v[which] if isinstance(v, Tensor) else v, inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_published_size(name: str) -> None:
    model, args = make(name)
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES[name].parameters
    (out,) = outputs_of(model, args)
    assert out.shape == (1, 1000 if args[0].shape[-1] == 224 else 10)
    assert not any(module.training for module in model.modules())
    assert 0.1 < out.std() < 100, "activations neither vanish nor explode"


@pytest.mark.parametrize("name", ["fashion", "resnet20", "mobilenet_v2"])
def test_architectures_are_seeded(name: str) -> None:
    before = torch.random.get_rng_state()
    (model, args), (same, same_args), (other, _) = make(name), make(name), make(name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(args[0], same_args[0])
    pairs = zip(
        model.state_dict().items(), same.state_dict().values(), other.state_dict().values(), strict=True
    )
    for (key, a), b, c in pairs:
        assert torch.equal(a, b), key
        assert key.endswith("num_batches_tracked") or not torch.equal(a, c), (
            f"{key} does not depend on the seed"
        )


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "densenet121"])
def test_no_statistic_is_trivial(name: str) -> None:
    model, _ = make(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values.unique().numel() > values.numel() // 2
            assert module.weight.abs().min() >= 0.5
            assert module.running_var.min() > 0


def test_trained_resnet56_loads() -> None:
    model = trained_resnet56_or_skip()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (logits,) = outputs_of(model, ((images - 0.45) / 0.225,))
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES["resnet56"].parameters
    assert logits.shape == (4, 10)
    assert 0.5 < logits.abs().max() < 50, "trained statistics fit trained weights"
    stored = torch.load(WEIGHTS / "resnet56-cifar10.pt", weights_only=True)
    assert stored
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in stored.items())


def test_absent_weights_are_a_skip_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: no trained weights in"):
        trained_resnet56(tmp_path / "absent.pt")
    torch.save({"conv9.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(KeyError, match="conv9"):
        trained_resnet56(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ZOO)
def test_zoo_networks_are_batch_free_and_exportable(name: str) -> None:
    model, args, kwargs = ZOO[name](batch=3)
    assert not any(module.training for module in model.modules())
    whole = outputs_of(model, args, kwargs)
    for which, count in ((slice(1, 3), 2), (slice(0, 1), 1)):
        part_args, part_kwargs = samples((args, kwargs), which)
        for all_rows, rows in zip(whole, outputs_of(model, part_args, part_kwargs), strict=True):
            assert all_rows.shape[0] == 3
            assert rows.shape[0] == count
            torch.testing.assert_close(rows, all_rows[which], rtol=1e-4, atol=1e-5)
    for out in whole:
        assert out.isfinite().all()
        assert (out[0] - out[1]).abs().max() > 0.01 * out.abs().max(), "samples hardly differ"
    program = torch.export.export(model, args, kwargs, strict=False)
    if name == "reserved_names":  # torch captures it, but cannot unlift a layer called meta
        return
    for a, b in zip(outputs_of(program.module(), args, kwargs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_networks_are_seeded_and_small(name: str) -> None:
    model, args, kwargs = ZOO[name](batch=2)
    torch.rand(7)
    before = torch.random.get_rng_state()
    same = ZOO[name](batch=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    state, again = model.state_dict(), same.model.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert all(torch.equal(a, b) for a, b in zip(_tensors((args, kwargs)), _tensors(same[1:]), strict=True))
    assert sum(p.numel() for p in model.parameters()) < 12_000
    assert ZOO[name].__doc__


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def test_zoo_is_a_zoo() -> None:
    assert len(ZOO) >= 45
    kinds = {type(module) for factory in ZOO.values() for module in factory().model.modules()}
    wanted = {
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding, nn.BatchNorm1d,
        nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU,
        nn.MultiheadAttention, nn.LSTM, nn.PixelShuffle, nn.Dropout, nn.ParameterList,
    }  # fmt: skip
    assert wanted <= kinds


def test_random_networks_run_and_vary() -> None:
    seen: set[str] = set()
    dull = 0
    for seed in range(300):
        model, args, spec = random_network(seed)
        outputs = outputs_of(model, args)
        for out in outputs:
            assert out.shape[0] == 2
            assert out.isfinite().all()
        dull += any((out[0] - out[1]).abs().max() <= 1e-2 * out.abs().max() for out in outputs)
        seen |= {type(block).__name__ for block in _walk(spec.blocks)}
        assert max((p.numel() for p in model.parameters()), default=0) < 40_000
    assert seen == {kind.__name__ for kind in LEAVES + NESTED}
    assert dull <= 2, "networks that answer the same to everything prove nothing"


def _walk(blocks: tuple[Block, ...]) -> list[Block]:
    inner = [b for block in blocks for name in ("body", "left", "right") for b in getattr(block, name, ())]
    return [*blocks, *(_walk(tuple(inner)) if inner else [])]


@settings(max_examples=40)
@given(networks(batch=3))
def test_hypothesis_networks_are_batch_free_and_exportable(case: Case) -> None:
    model, args, spec = case
    whole = outputs_of(model, args)
    for all_rows, rows in zip(whole, outputs_of(model, samples(args, slice(1, 3))), strict=True):
        torch.testing.assert_close(rows, all_rows[1:], rtol=1e-3, atol=1e-4)
    exported = torch.export.export(model, args, strict=False).module()
    for a, b in zip(outputs_of(exported, args), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    again = build(eval(repr(spec), _names()), batch=3)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(again.model, again.args), whole, strict=True))


def _names() -> dict[str, type]:
    return {kind.__name__: kind for kind in (Spec, *LEAVES, *NESTED)}


def test_any_block_of_a_spec_can_be_deleted() -> None:
    for seed in range(25):
        spec = random_network(seed).spec
        for i in range(len(spec.blocks)):
            fewer = Spec(**{**vars(spec), "blocks": spec.blocks[:i] + spec.blocks[i + 1 :]})
            case = build(fewer)
            assert outputs_of(case.model, case.args)


def test_shared_blocks_share_their_layers() -> None:
    from tests.networks import Conv, Twice

    conv = Conv(width=3, kernel=3)
    twice, once = build(Spec(blocks=(Twice(body=(conv,)),))), build(Spec(blocks=(conv,)))
    names = [key for key, _ in twice.model.named_parameters()]
    assert len(names) == len(list(once.model.named_parameters()))
    called = [call.target for call in twice.model.calls if isinstance(call.target, str)]
    assert len(called) == len(set(called)) + 1
    nested = build(Spec(blocks=(Twice(body=(Twice(body=(conv,)),)),))).model
    assert [key for key, _ in nested.named_parameters()] == [
        key.replace("shared1", "shared2") for key in names
    ]


def test_in_place_calls_change_nothing_that_is_read_later() -> None:
    pure = {ACTIVATIONS["relu_"]: ACTIVATIONS["relu"], operator.iadd: torch.add}
    replaced = 0
    for seed in range(300):
        model, args, _ = random_network(seed)
        expected = outputs_of(model, args)
        calls = tuple(dataclasses.replace(c, target=pure.get(c.target, c.target)) for c in model.calls)
        replaced += calls != model.calls
        model.calls = calls
        # To the rounding of sums: what is written in place keeps its own strides.
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5)
                   for a, b in zip(outputs_of(model, args), expected, strict=True)), seed
    assert replaced > 50, "in-place calls are common"


def test_residual_shortcut_widens_with_zeros() -> None:
    from tests.networks import Conv

    wide = Residual(shortcut="pad", body=(Conv(width=7, kernel=3),))
    case = build(Spec(channels=3, blocks=(wide,), head="two"))
    features = outputs_of(case.model, case.args)[0]
    assert features.shape[1] == 7


ATTENTION = 3 * 12 * 12 * 6 + 12 * 12 * 6 + 2 * 12 * 6 * 6  # qkv, output projection, scores and their use
FEED_FORWARD = 2 * 12 * 18 * 6


@pytest.mark.parametrize("counter", [fvcore_count, flopcounter_count])
def test_counters_agree_with_the_formula(counter: Any) -> None:
    model = nn.Sequential(
        conv_bn_act(3, 8, stride=2), nn.Conv2d(8, 12, 3, groups=4), nn.Flatten(), nn.Linear(48, 5)
    )
    count: Count = counter(model, (torch.zeros(2, 3, 8, 8),))
    conv1, conv2, linear = 2 * 16 * 8 * 27, 2 * 4 * 12 * 2 * 9, 2 * 48 * 5
    assert count.contractions == conv1 + conv2 + linear
    assert count.by_module["1"] == conv2
    assert count.by_module_and_operator["0.0"] == {next(iter(count.by_module_and_operator["0.0"])): conv1}
    assert count.by_module[""] == count.total == sum(count.by_operator.values())


def test_flopcounter_sees_through_the_attention_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=18, batch_first=True).eval()
    count = flopcounter_count(layer, torch.randn(1, 6, 12))
    assert count.total == ATTENTION + FEED_FORWARD
    assert torch.backends.mha.get_fastpath_enabled()


def test_counters_are_quiet_and_take_any_inputs(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("keyword_inputs", "dict_input", "several_outputs", "tied_embedding", "mha_block", "ghost"):
        model, args, kwargs = ZOO[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            theirs, other = fvcore_count(model, args, kwargs), flopcounter_count(model, args, kwargs)
        assert theirs.contractions == other.total > 0
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("fvcore")]


def test_fvcore_names_what_it_skips() -> None:
    count = fvcore_count(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)), torch.zeros(1, 3, 4, 4))
    assert count.unsupported == {"aten::max_pool2d": 1}
    assert count.total == count.contractions == 16 * 12


def test_a_module_called_twice_counts_twice() -> None:
    model, args, _ = ZOO["shared_twice"](batch=1)
    for counter in (fvcore_count, flopcounter_count):
        assert counter(model, args).by_module["shared"] == 3 * 64 * 8 * 8 * 9


def test_max_err_is_relative_and_total() -> None:
    ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert tolerances.max_err(torch.tensor([1.5, -4.0]), ref) == 0.125
    assert tolerances.max_err({"a": [ref], "b": ref * 1.5}, {"a": [ref], "b": ref}) == 0.5
    assert tolerances.max_err(torch.tensor([1.0, math.nan]), ref) == math.inf
    assert tolerances.max_err(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0]).double()) == 0.5
    assert tolerances.max_err(torch.tensor([math.inf]), torch.tensor([-math.inf]).double()) == math.inf
    with pytest.raises(AssertionError, match="shape"):
        tolerances.max_err(ref, ref[None])
    with pytest.raises(AssertionError, match="tensors"):
        tolerances.max_err([ref], [ref, ref])


def test_limits_catch_an_arithmetic_that_is_too_coarse() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    b = torch.randn(96, 48, generator=generator, dtype=torch.float64)
    ref = a @ b
    own = a.float() @ b.float()
    tolerances.assert_close_to_fp64(own, own, ref)
    tolerances.assert_close_to_fp64((a.float() @ b.float()).flip(0).flip(0), own, ref)
    coarse = (a.bfloat16() @ b.bfloat16()).float()
    with pytest.raises(AssertionError, match="above"):
        tolerances.assert_close_to_fp64(coarse, own, ref)
    tolerances.assert_close_to_fp64(coarse, own, ref, arithmetic="bf16")
    with pytest.raises(AssertionError, match="not in fp64"):
        tolerances.assert_close_to_fp64(own, own, own)
    with pytest.raises(AssertionError, match="fp64"):
        tolerances.assert_equal_fp64(ref, ref * (1 + 1e-8))
    tolerances.assert_equal_fp64(ref, ref * (1 + 1e-12))


def test_the_table_of_limits_is_ordered() -> None:
    direct = tolerances.LIMITS["direct"]
    floors = [direct[name].floor for name in ("fp64", "fp32", "tf32", "bf16")]
    assert floors == sorted(floors)
    for algorithm in ("winograd_f2", "winograd_f4"):
        for name, row in tolerances.LIMITS[algorithm].items():
            assert row.floor >= direct[name].floor
            assert row.factor >= direct[name].factor
    assert tolerances.PROOF < tolerances.TEETH / 100
