"""Programs: building them (in-place writes, sizes, constants), checking, saving, placing, calling, explaining."""

from __future__ import annotations

import json
import math
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from prunekern.backends import BACKENDS, Lowered, lower
from prunekern.backends.base import Signature, choose
from prunekern.backends.reference import ReferenceBackend, SlicedPlacement
from prunekern.backends.reference.slices import independent
from prunekern.backends.verify import verify_graph
from prunekern.core.graph import Dim
from prunekern.core.program import Activation, Epilogue, Program, Slot, Step
from prunekern.core.storage import from_json, load_program, to_json
from prunekern.errors import ArtefactError, BackendUnavailable, InputError, LoweringError, UnknownName
from prunekern.graph.trace import trace
from prunekern.lower.arena import Arena, lifetimes, plan
from prunekern.lower.build import build
from prunekern.lower.tolerance import error
from tests.models import make
from tests.weights import randomise_
from tests.zoo import ZOO


class Net(nn.Module):
    """A forward over a few parameters."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("table", torch.randn(3, 6))
        self.run = forward
        randomise_(self.double().eval())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def x64(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64)


def hold(forward: Callable[..., Tensor], *shape: int) -> Lowered:
    """Lowered equals the module, at two batch sizes, and writes to nobody's tensors."""
    net = Net(forward)
    with torch.no_grad():
        lowered = lower(net, x64(2, *shape))
        for batch in (1, 5) if lowered.program.batch is None else (2,):
            x = x64(batch, *shape)
            before, table = x.clone(), net.table.clone()
            expected = net(x.clone())
            net.table.copy_(table)
            assert error(lowered(x), expected) < 1e-13
            assert torch.equal(x, before)
    return lowered


# ---- in-place operators ------------------------------------------------------------------------------------


def _slice_fill(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    y[:, 1:3] = 0
    return y + 1


def _select_then_read_other_view(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    left, right = y[:, :3], y[:, 3:]
    y[:, 0] = 7.0
    right.mul_(2)
    return torch.cat((left, right, y), 1)


def _write_through_reshape_and_transpose(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x).view(-1, 2, 3)
    y.transpose(1, 2)[:, 0].add_(5)
    return y.flatten(1) * 2


def _view_of_view(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = y.view(-1, 3, 2)
    z[:, 1].relu_()
    return y - z.flatten(1).sigmoid()


def _copy_is_no_view(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = y.clone()
    z.mul_(0)
    w = y.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)     # this reshape has to copy
    w.add_(100)
    return y + z


def _chained(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = y.relu_()
    z += 1
    return y * z


def _writes_to_the_input(m: Net, x: Tensor) -> Tensor:
    x.mul_(2)
    return m.fc(x)


def _constant_written(m: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(6, dtype=x.dtype)
    mask[2:4] = 1
    return m.fc(x) * mask


def _constant_filled_from_activations(m: Net, x: Tensor) -> Tensor:
    y = x.new_zeros(x.size(0), 8)
    y[:, 1:7] = m.fc(x)
    return y


def _copied_into(m: Net, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(m.fc(x))
    return y + 1


def _dropout_returns_its_argument(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = F.dropout(y, 0.5, training=False)
    z.add_(1)
    return y * z


def _contiguous_of_contiguous(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = y.contiguous()
    z.add_(1)
    return y * z


def _masked(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x)
    y.masked_fill_(y > 0, -1.0)
    return y + y.clamp_(min=-0.5)


def _diagonal(m: Net, x: Tensor) -> Tensor:
    y = m.fc(x).unsqueeze(1) * m.fc(x).unsqueeze(2)
    y.diagonal(0, 1, 2).zero_()
    return y.sum(1)


WRITES = (_slice_fill, _select_then_read_other_view, _write_through_reshape_and_transpose, _view_of_view,
          _copy_is_no_view, _chained, _writes_to_the_input, _constant_written,
          _constant_filled_from_activations, _copied_into, _dropout_returns_its_argument,
          _contiguous_of_contiguous, _masked, _diagonal)


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_in_place_writes_become_pure(forward: Callable[..., Tensor]) -> None:
    lowered = hold(forward, 6)
    names = [step.attributes.get("target", "") for step in lowered.program.steps]
    assert not any(name.split(".")[1].endswith("_") for name in names if name)


def test_a_write_through_a_view_that_cannot_be_scattered_says_where_and_what_to_do() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.fc(x)
        pieces = y.unfold(1, 3, 3)
        pieces.mul_(2)
        return y
    with torch.no_grad(), pytest.raises(LoweringError, match=r"(?s)unfold.*written in place.*torch\.cat"):
        lower(Net(forward), x64(2, 6))


def test_the_same_write_is_fine_where_nobody_reads_the_base_again() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.fc(x).unfold(1, 3, 3).mul_(2)
    hold(forward, 6)


# ---- sizes, constants, other operators ---------------------------------------------------------------------


def test_sizes_follow_the_batch() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        n = x.size(0)
        return torch.cat((m.fc(x), x.new_ones(n, 2)), 1).reshape(2 * n, 4) + torch.zeros(2 * n, 1, dtype=x.dtype)
    lowered = hold(forward, 6)
    assert lowered(x64(7, 6)).shape == (14, 4)


def test_what_depends_on_parameters_alone_is_computed_once() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        weight = m.fc.weight / m.fc.weight.norm(dim=1, keepdim=True) + torch.eye(6, dtype=x.dtype)
        return F.linear(x, weight, m.fc.bias)
    lowered = hold(forward, 6)
    assert [step.op for step in lowered.program.steps] == ["linear"]
    assert len(lowered.program.weights) == 2


def test_an_operator_without_a_step_of_its_own_is_visible_by_name() -> None:
    lowered = hold(lambda m, x: m.fc(x).cumsum(1).masked_fill(x > 0, float("-inf")).exp(), 6)
    targets = [step.attributes["target"] for step in lowered.program.steps if step.op == "aten"]
    assert targets == ["aten.cumsum.default", "aten.gt.Scalar", "aten.masked_fill.Scalar"]
    assert {"float": "-inf"} in lowered.program.steps[-2].attributes["args"]
    json.dumps(lowered.to_json(), allow_nan=False)


@pytest.mark.parametrize(("forward", "shape"), [
    (lambda m, x: F.glu(x, 1), (6, 4, 4)), (lambda m, x: x.roll((1, -2), (2, 1)), (6, 4, 4)),
    (lambda m, x: x.roll(4, 2), (6, 4, 4)), (lambda m, x: F.channel_shuffle(x, 3), (6, 4, 4)),
    (lambda m, x: F.pixel_shuffle(x, 2), (8, 3, 5)), (lambda m, x: F.pixel_unshuffle(x, 2), (3, 4, 6)),
    (lambda m, x: x.repeat_interleave(3, 2), (6, 4)), (lambda m, x: torch.stack(x.unbind(1)[::-1], 2), (3, 4)),
    (lambda m, x: x.movedim(1, -1).narrow(2, 1, 2)[..., 1::2], (6, 4, 4))], ids=range(9))
def test_movement_is_made_of_plain_moves(forward: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    lowered = hold(forward, *shape)
    assert {step.op for step in lowered.program.steps} <= {"move", "cat", "activation", "binary"}


def _attention(**kwargs: Any) -> Callable[..., Tensor]:
    def forward(m: Net, x: Tensor) -> Tensor:
        q = x.view(-1, 5, 4, 6).transpose(1, 2)
        k = v = q[:, ::2] if kwargs.get("enable_gqa") else q
        return F.scaled_dot_product_attention(q, k, v, **kwargs)
    return forward


_MASK = torch.rand(5, 5) > 0.4
_MASK[2] = False


@pytest.mark.parametrize("kwargs", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": _MASK}, {"enable_gqa": True},
    {"attn_mask": torch.randn(1, 4, 5, 5).double()}], ids=range(6))
def test_attention(kwargs: dict[str, Any]) -> None:
    lowered = hold(_attention(**kwargs), 5, 24)
    assert "attention" in {step.op for step in lowered.program.steps}
    assert "aten" not in {step.op for step in lowered.program.steps}
    assert lowered.program.macs(3) == 3 * 4 * 5 * 5 * 12


def test_regions_without_gradients_are_part_of_the_network() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = m.fc(x)
            with torch.enable_grad():
                z = y * 2
        return m.fc(z) + y
    net = Net(forward)
    lowered = lower(net, x64(2, 6))
    assert lowered.program.batch is None
    assert error(lowered(x64(3, 6).fill_(0.5)), net(x64(3, 6).fill_(0.5)).detach()) < 1e-13


def test_results_that_are_no_tensors_of_the_input() -> None:
    def forward(m: Net, x: Tensor) -> Any:
        return {"sum": x.sum(), "size": x.size(0), "table": m.table, "none": None, "same": x, "pair": (x + 1, 3)}
    net = Net(forward)
    lowered = lower(net, x64(2, 6))
    x = x64(4, 6)
    out = lowered(x)
    assert out["size"] == 4
    assert out["none"] is None
    assert out["pair"][1] == 3
    assert torch.equal(out["table"], net.table)
    assert torch.equal(out["same"], x)
    assert out["same"].data_ptr() != x.data_ptr()
    assert out["table"].data_ptr() != lowered.program.weights["table"].data_ptr()


# ---- consistency -------------------------------------------------------------------------------------------


def _conv_program() -> Program:
    model, (x,) = make("lenet")
    return lower(model, x, verify=False).program


def test_a_broken_program_names_the_step() -> None:
    program = _conv_program()
    first, second, *rest = program.steps
    cases: list[tuple[tuple[Step, ...], str]] = [
        ((second, first, *rest), rf"{second.name}.*reads {first.output.name}"),
        ((first, first, *rest), rf"{first.name}.*writes"),
        ((replace(first, op="convolve"), second, *rest), "no such op 'convolve'"),
        ((first, second.with_epilogue(activation=Activation("relu")), *rest), rf"{second.name}.*epilogue"),
        ((replace(first, weights={"weight": "nowhere"}), second, *rest), "'nowhere'"),
        ((first, replace(second, outputs=(replace(second.output, shape=(Dim(1, 0),)),)), *rest), "reads"),
        (program.steps[:-1], "output"),
    ]
    for steps, message in cases:
        with pytest.raises(LoweringError, match=message):
            program.with_steps(steps)


def test_weights_that_no_step_names_go() -> None:
    program = _conv_program()
    assert set(program.with_steps(program.steps).weights) == {n for s in program.steps for n in s.weight_names()}
    assert "conv1.bias" in program.weights
    lone = replace(program.steps[0], outputs=program.steps[0].outputs)
    assert set(replace(program, outputs=(lone.output,)).with_steps((lone,)).weights) == set(lone.weight_names())


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, (x,) = make("lenet")
    lower(model, x, verify=False).save(tmp_path / "net")
    return tmp_path / "net"


def test_json_round_trip_is_exact(saved: Path) -> None:
    program = load_program(saved)
    again = from_json(json.loads(json.dumps(to_json(program), allow_nan=False)), program.weights)
    assert again.steps == program.steps
    assert (again.inputs, again.outputs, again.in_spec, again.out_spec) == (
        program.inputs, program.outputs, program.in_spec, program.out_spec)
    assert sorted(file.name for file in saved.iterdir())[0] == "program.json"
    assert len(list(saved.iterdir())) == 2


def test_infinite_constants_survive(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.fc(x).clamp(-math.inf, 0.3))
    lowered = lower(net, x64(2, 6))
    assert lowered.program.steps[0].epilogue.activation == Activation("clamp", (-math.inf, 0.3))
    lowered.save(tmp_path)
    x = x64(3, 6)
    assert torch.equal(Lowered.load(tmp_path)(x), lowered(x))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("kind", ["program.json", "weights"])
def test_a_truncated_file_is_refused(saved: Path, kind: str, share: float) -> None:
    file = next(f for f in saved.iterdir() if f.name.startswith(kind))
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(ArtefactError):
        Lowered.load(saved)


def _edit(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (saved.parent / "elsewhere.safetensors").write_bytes(next(saved.glob("weights-*")).read_bytes())
    data = json.loads((saved / "program.json").read_text())
    change(data)
    (saved / "program.json").write_text(json.dumps(data))


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d["program"]["steps"][0]["attributes"].update(stride=[2, 2]), "altered"),
    (lambda d: d.update(version=2), "version 2"),
    (lambda d: d.update(format="other"), "no saved Program"),
    (lambda d: d.update(weights_sha256="0" * 64), "SHA-256"),
    (lambda d: d.update(weights_file="../elsewhere.safetensors"), "missing"),
    (lambda d: d.pop("program"), "program"),
], ids=["step", "version", "format", "hash", "path", "key"])
def test_an_altered_file_is_refused(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    _edit(saved, change)
    with pytest.raises(ArtefactError, match=message):
        Lowered.load(saved)


def test_altered_weights_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = next(saved.glob("weights-*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="SHA-256"):
        Lowered.load(saved)
    weights.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        Lowered.load(saved)
    with pytest.raises(ArtefactError, match="cannot be read"):
        Lowered.load(tmp_path / "nowhere")


def test_a_program_whose_hash_fits_but_makes_no_sense_is_refused(saved: Path) -> None:
    from prunekern.core import storage

    def change(data: dict[str, Any]) -> None:
        data["program"]["steps"].pop()
        data["sha256"] = storage._digest(data["program"])
    _edit(saved, change)
    with pytest.raises(ArtefactError, match="not computed by any step"):
        Lowered.load(saved)


def test_a_full_disk_leaves_what_was_saved_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model, (x,) = make("lenet", seed=1)
    lowered = lower(model, x, verify=False)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtefactError, match="No space left"):
        lowered.save(saved)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    lowered.save(saved)
    assert len(list(saved.iterdir())) == 2
    assert torch.equal(Lowered.load(saved)(x), lowered(x))


def test_outputs_in_named_tuples_are_saved(tmp_path: Path) -> None:
    pair = namedtuple("pair", "a b")
    lowered = lower(Net(lambda m, x: pair(x + 1, m.fc(x))), x64(2, 6))
    assert lowered(x64(3, 6)).b.shape == (3, 6)
    lowered.save(tmp_path)
    assert type(Lowered.load(tmp_path)(x64(3, 6))) is pair


class Nameless:
    def __init__(self, a: Tensor) -> None:
        self.a = a


def test_outputs_of_unknown_classes_cannot_be_saved_and_say_so(tmp_path: Path) -> None:
    register_pytree_node(Nameless, lambda value: ([value.a], None), lambda values, _: Nameless(*values))
    lowered = lower(Net(lambda m, x: Nameless(m.fc(x))), x64(2, 6))
    assert lowered(x64(3, 6)).a.shape == (3, 6)
    with pytest.raises(ArtefactError, match="serialized_type_name"):
        lowered.save(tmp_path)


# ---- arena -------------------------------------------------------------------------------------------------


def overlaps(arena: Arena) -> list[tuple[str, str]]:
    buffers = list(arena.buffers.values())
    return [(a.slot, b.slot) for i, a in enumerate(buffers) for b in buffers[i + 1:] if a.overlaps(b)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=25))
def test_no_two_live_buffers_share_a_byte(steps: list[tuple[int, int, int]]) -> None:
    """Chains with skip connections: step i reads its predecessor and one some steps back."""
    slots = [Slot(f"s{i}", (Dim(0, size),), torch.uint8) for i, (size, _, _) in enumerate(steps)]
    made = []
    for i, slot in enumerate(slots):
        reads = tuple(dict.fromkeys(slots[max(0, i - 1 - back)] for back in steps[i][1:])) if i else ()
        made.append(Step("cat" if reads else "constant", slot.name, reads, (slot,)))
    program = Program(tuple(made), {}, (), (slots[-1],), None, None)
    arena = plan(program, lambda slot: slot.shape[0].offset, lambda step: False)
    assert not overlaps(arena)
    assert set(arena.buffers) == {slot.name for slot in slots}
    alive = lifetimes(program, lambda step: False)
    peak = max(sum(b.size for b in arena.buffers.values() if b.first <= t <= b.last) for t in range(len(steps)))
    assert peak <= arena.size <= arena.naive
    assert all((b.first, b.last) == alive[name] for name, b in arena.buffers.items())
    assert all(b.offset % 64 == 0 and b.size >= slots[int(name[1:])].shape[0].offset
               for name, b in arena.buffers.items())


@pytest.mark.parametrize("name", ["resnext", "unet", "dense_block", "inception", "vit"])
def test_arena_of_networks(name: str) -> None:
    case = ZOO[name]()
    lowered = lower(case.model, case.args, verify=False, backend="reference")
    arena = lowered.placement(lowered.signature(lowered.bind(case.args, case.kwargs)[0])).arena
    assert not overlaps(arena)
    assert arena.size < 0.8 * arena.naive


def test_a_view_keeps_alive_what_it_is_a_view_of() -> None:
    a, b, c = (Slot(name, (Dim(0, 64),), torch.uint8) for name in "abc")
    steps = (Step("constant", "a", (), (a,)), Step("move", "b", (a,), (b,)), Step("cat", "c", (b,), (c,)))
    program = Program(steps, {}, (), (c,), None, None)
    assert lifetimes(program, lambda step: step.op == "move")["a"] == (0, 2)
    assert lifetimes(program, lambda step: False)["a"] == (0, 1)


# ---- calling -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lenet() -> Lowered:
    model, (x,) = make("lenet", batch=2)
    return lower(model, x)


@pytest.mark.parametrize(("args", "message"), [
    ((torch.zeros(2, 1, 28, 28, dtype=torch.float64),), "float64.*float32"),
    ((torch.zeros(2, 1, 28),), "3 axes"),
    ((torch.zeros(2, 1, 28, 27),), r"Nx1x28x28|N, 1, 28, 28"),
    ((torch.zeros(2, 1, 28, 28), 1), "structure"),
    ((), "structure"),
    (("text",), "str"),
], ids=["dtype", "rank", "size", "extra", "missing", "type"])
def test_wrong_arguments(lenet: Lowered, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lenet(*args)


def test_arguments_by_keyword_and_constants() -> None:
    def forward(m: Net, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return m.fc(x) * scale + y

    class Named(Net):
        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
            return forward(self, x, y, scale)
    net = Named(forward)
    x, y = x64(2, 6), x64(2, 6)
    lowered = lower(net, (x, y))
    expected = net(x, y)
    for got in (lowered(x, y), lowered(x, y=y), lowered(y=y, x=x)):
        assert error(got, expected.detach()) < 1e-13
    with pytest.raises(InputError, match="structure"):
        lowered(x, z=y)
    scaled = lower(net, {"x": x, "y": y, "scale": 3.0})
    assert error(scaled(x=x, y=y, scale=3.0), net(x, y, 3.0).detach()) < 1e-13
    with pytest.raises(InputError, match=r"3\.0"):
        scaled(x=x, y=y, scale=4.0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_forward_that_fixes_its_batch_is_lowered_for_the_batch_of_the_example(batch: int) -> None:
    net = Net(lambda m, x: torch.stack([m.fc(row.unsqueeze(0))[0] for row in x.unbind(0)]))
    x = x64(batch, 6)
    lowered = lower(net, x)
    assert lowered.program.batch == batch
    assert error(lowered(x), net(x).detach()) < 1e-13
    with pytest.raises(InputError, match=f"fixed the batch at {batch}"):
        lowered(x64(batch + 1, 6))


def test_placements_are_kept_by_shape_and_the_oldest_goes(lenet: Lowered) -> None:
    fresh = Lowered(lenet.program)
    for batch in range(1, 12):
        fresh(torch.zeros(batch, 1, 28, 28))
    assert [signature.batch for signature in fresh._placements] == list(range(4, 12))
    kept = fresh.placement(Signature(((5, 1, 28, 28),), 5, torch.device("cpu")))
    fresh(torch.ones(5, 1, 28, 28))
    assert fresh.placement(Signature(((5, 1, 28, 28),), 5, torch.device("cpu"))) is kept


# ---- backends ----------------------------------------------------------------------------------------------


class Absent(ReferenceBackend):
    name = "absent"

    def unavailable(self) -> str | None:
        return "no such device in this test"


def test_choosing_a_backend(caplog: pytest.LogCaptureFixture) -> None:
    known = (Absent(), *BACKENDS)
    with caplog.at_level("INFO", logger="prunekern"):
        choice = choose("auto", known, "cpu")
    assert choice.backend is BACKENDS[0]
    assert "no such device in this test" in choice.reason
    assert choice.reason in caplog.text
    with pytest.raises(BackendUnavailable, match="no such device in this test"):
        choose("absent", known, "cpu")
    with pytest.raises(BackendUnavailable, match="not on mps"):
        choose("reference", known, "mps")
    with pytest.raises(UnknownName, match=r"absent, auto, .*reference"):
        choose("fastest", known, "cpu")
    with pytest.raises(BackendUnavailable, match="no backend runs on"):
        choose("auto", (Absent(),), "cpu")


def test_lower_refuses_an_unknown_backend_at_once() -> None:
    model, (x,) = make("lenet")
    with pytest.raises(UnknownName, match="reference"):
        lower(model, x, backend="warp")


def test_slices_of_a_batch() -> None:
    """A large batch runs in slices, remainder included, and gives what the whole would."""
    model, (x,) = make("fashion", batch=203)
    lowered = lower(model, x[:2], backend="reference")
    with torch.no_grad():
        assert error(lowered(x), model(x)) < 1e-5
    placement = lowered.placement(Signature(((203, 1, 28, 28),), 203, torch.device("cpu")))
    assert isinstance(placement, SlicedPlacement)
    report = lowered.verify(model, x)
    assert len(report.steps) == len(lowered.program.steps)
    small = lowered.placement(Signature(((2, 1, 28, 28),), 2, torch.device("cpu")))
    assert not isinstance(small, SlicedPlacement)


@pytest.mark.parametrize("forward", [
    lambda m, x: m.fc(x).softmax(0), lambda m, x: m.fc(x) - x.mean(0), lambda m, x: m.fc(x).flip(0),
    lambda m, x: m.fc(x) @ x.t(), lambda m, x: m.fc(x).sum(), lambda m, x: torch.cat((x, m.fc(x))),
    lambda m, x: m.fc(x).t(), lambda m, x: m.fc(x).reshape(-1, 2)], ids=range(8))
def test_samples_that_meet_are_never_sliced(forward: Callable[..., Tensor]) -> None:
    assert not independent(hold(forward, 6).program)


# ---- verification and explanation --------------------------------------------------------------------------


def test_verification_names_the_first_step_that_is_off() -> None:
    model, (x,) = make("lenet", batch=2)
    lowered = lower(model, x, verify=False, backend="reference")
    victim = lowered.program.steps[2]
    name = victim.weights["weight"]
    weights = {**lowered.program.weights, name: lowered.program.weights[name] * (1 + 1e-4)}
    wrong = Lowered(replace(lowered.program, weights=weights), "reference")
    with pytest.raises(LoweringError, match=rf"step '{victim.name}'.*conv2.*off by"):
        wrong.verify(model, x)
    report = lowered.verify(model, x)
    assert report.error <= 2 * report.torch_error + 2e-6
    assert {check.step for check in report.steps} == {step.name for step in lowered.program.steps}
    assert json.loads(json.dumps(report.to_json()))["error"] == report.error


def test_verification_holds_shrunken_values_to_the_channels_that_are_left() -> None:
    model, (x,) = make("lenet", batch=2)
    with torch.no_grad():
        model.conv2.weight[:, [1, 4]] = 0
    lowered = lower(model, x, backend="reference")
    first = lowered.program.steps[0].output
    assert lowered.program.kept[first.name] == (1, (0, 2, 3, 5))
    assert first.name in {check.name for check in lowered.verification.steps}
    moved = {**lowered.program.kept, first.name: (1, (0, 1, 2, 3))}
    with pytest.raises(LoweringError, match=lowered.program.steps[0].name):
        Lowered(replace(lowered.program, kept=moved), "reference").verify(model, x)


def test_a_trace_that_is_not_the_model_is_noticed() -> None:
    net = Net(lambda m, x: m.fc(x) if torch.is_grad_enabled() else -m.fc(x))
    graph = trace(net, x64(2, 6))
    lowered = lower(graph, verify=False)
    lowered.verify(graph, x64(3, 6))
    with pytest.raises(LoweringError, match="traced graph is not what the model gives"):
        verify_graph(lowered, graph, (x64(3, 6),), {}, net)


def test_a_network_that_fixes_its_dtype_is_held_to_that_dtype() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            bits = self.fc(x).view(torch.int32) & 0x7FFFFFFF        # |x| by clearing the sign bit
            return bits.view(torch.float32)[:, :6] + self.fc(x)
    model = Fixed().eval()
    lowered = lower(model, torch.randn(2, 6))
    assert lowered.verification.error < 1e-5
    names = [step.weights["weight"] for step in lowered.program.steps if step.op == "linear"]
    weights = {**lowered.program.weights, names[0]: lowered.program.weights[names[0]] * (1 + 1e-3)}
    with pytest.raises(LoweringError, match="off by"):
        Lowered(replace(lowered.program, weights=weights)).verify(model, torch.randn(2, 6))


def test_explanation() -> None:
    model, (x,) = make("fashion", batch=3)
    lowered = lower(model, x, verify=False)
    plain = lowered.explain(x)
    by_step = {row.step: row for row in plain.rows}
    assert (by_step["conv2d_1"].M, by_step["conv2d_1"].N, by_step["conv2d_1"].K) == (3 * 196, 16, 144)
    assert (by_step["linear"].M, by_step["linear"].N, by_step["linear"].K) == (3, 100, 784)
    assert by_step["conv2d_1"].bytes == 4 * (3 * 16 * 196 * 2 + 16 * 144 + 16)
    assert plain.macs == sum(row.M * row.N * row.K for row in plain.rows) == lowered.program.macs(3)
    assert plain.macs == 3 * (784 * 16 * 9 + 196 * 16 * 144 + 784 * 100 + 1000)
    assert plain.seconds is None
    assert "bias + relu" in str(plain)
    timed = lowered.explain(x, time=True)
    assert timed.seconds is not None
    assert 0 < timed.seconds < 1
    conv = next(row for row in timed.rows if row.step == "conv2d_1")
    assert conv.seconds is not None
    assert conv.roofline is not None
    assert 0 < conv.roofline < 3
    json.dumps(timed.to_json())
    header, *rows = str(timed).splitlines()
    assert header.split() == ["step", "op", "MxNxK", "algorithm", "MACs", "bytes", "us", "speed", "roofline",
                              "epilogue"]
    assert len(rows) >= len(timed.rows) + 1


def test_raw_programs_keep_one_step_per_operator() -> None:
    model, (x,) = make("resnet20")
    fused, raw = lower(model, x), lower(model, x, fuse=False)
    count = {op: sum(step.op == op for step in raw.program.steps) for op in ("conv", "scale", "activation", "binary")}
    assert count == {"conv": 19, "scale": 19, "activation": 19, "binary": 9}
    assert {step.op for step in fused.program.steps} <= {"conv", "reduce", "move", "linear", "pad", "pool"}
    assert build(trace(model, x)).macs(1) == fused.program.macs(1)
    assert error(raw(x), fused(x)) < 1e-5


def test_epilogues_print_in_order() -> None:
    slot = Slot("r", (Dim(1, 0),), torch.float32)
    relu = Activation("relu")
    assert str(Epilogue("b", relu, slot)) == "bias + add r + relu"
    assert str(Epilogue("b", relu, slot, residual_last=True)) == "bias + relu + add r"
    assert not Epilogue()
