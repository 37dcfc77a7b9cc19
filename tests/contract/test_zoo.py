"""Every awkward network, pruned: what may go, in which form the result comes, and all that must stay as it was."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekern.core.policy import Policy
from prunekern.errors import InputError
from prunekern.graph import bake
from prunekern.graph.groups import Groups, find_groups
from prunekern.graph.inputs import Call
from prunekern.graph.labels import frozen_report
from prunekern.ops import REGISTRY
from prunekern.prune.oneshot import prune
from prunekern.prune.reference import masked_outputs
from prunekern.prune.target import Target
from tests.pruning import (
    Conv,
    Cut,
    cut,
    double,
    first_units,
    groups_of,
    is_baked,
    mixes_in_layers,
    random_choice,
    silenced,
)
from tests.tolerances import assert_equal_fp64
from tests.weights import NORMS
from tests.zoo import ZOO

NOTHING = {
    "constant_index": "looked up by an index",                         # x[:, order], where order is computed with, too
    "outer_product": "two kinds of channels share the mixed axis",
}
"""Networks in which every channel stays, and a word of the reason that is given."""

REWRITTEN = {
    "axial_attention": "unflatten(1, (2, -1)) of two heads",
    "channel_numbers": "x[:, [7, 6, 5, ...]]",
    "channel_slices": "x[:, :8], x[:, 8:]",
    "channels_last_flatten": "reshape to 7 * 36",
    "cosine_windows": "reshape(B, 16, 3, 2, -1) of two heads",
    "csp": "split((5, 5))",
    "dropped_channels": "narrow(1, 2, 7)",
    "dual_path": "x[:, :6]",
    "generator": "view(-1, 8, 4, 4)",
    "ghost": "out[:, :11]",
    "glu": "reshape(-1, 2, 4)",
    "graph_attention": "view(-1, 5, 4, 3)",
    "heads_view": "unflatten(1, (4, 6))",
    "hooked_norms": "weights that hooks compute are baked",
    "ibn": "split([5, 7])",
    "inplace_view": "x[:, :4] += ...",
    "lstm_cell_loop": "zeros(B, 7)",
    "manual_attention": "view(b, n, 2, 3)",
    "maxout": "split(6)",
    "mixconv": "split([4, 12])",
    "multi_query": "unflatten(-1, (-1, 3))",
    "nonlocal_block": "view(b, 6, -1)",
    "normalizer_free": "weights computed across channels are baked",
    "option_a": "pad by a number of channels",
    "packed_qkv": "reshape(b, n, c), c being the width of another layer",
    "parametrised": "weights computed across channels are baked",
    "reduced_keys": "reshape(b, -1, 2, 4, 3)",
    "res2net": "split(3)",
    "reversible": "chunk(2) of halves that are no longer equal",
    "roll": "chunk(4), roll by 3 channels",
    "rope_gqa": "reshape(b, n, 16)",
    "shuffle_hard_coded": "view(-1, 2, 6, 64)",
    "shufflenet_v2": "chunk(2) of halves that are no longer equal",
    "spectral": "weights computed across channels are baked",
    "split_attention": "reshape(b, 2, 6, h, w)",
    "split_uneven": "split([4, 12])",
    "summed_directions": "y[..., :8]",
    "t5_layers": "view(b, -1, 2, 4)",
    "unfolded_patches": "unflatten(-1, (3, 2, -1))",
    "unit_embedding": "weights computed across channels are baked",
    "view_hard_coded": "view(-1, 512)",
    "wavenet_gate": "y[:, :8], y[:, 6:]",
    "weight_standardised": "weights computed across channels are baked",
    "window_attention": "reshape(-1, 16, 3, 2, 3)",
}
"""Networks whose own forward holds a size that pruning changes; all others come back as the user's class."""

FAMILIES: dict[str, dict[str, int]] = {
    "plain_cnn": {"features.0.0": 8, "features.2.0": 12, "classifier.0": 20},
    "odd_widths": {"0": 13, "2": 37, "6": 11},                         # a layer of one channel keeps it
    "depthwise_separable": {"0.0": 8, "2.0": 16, "4.0": 12},           # depthwise layers go with their input
    "depthwise_multiplier": {"0": 6},
    "depthwise_on_input": {"0": 12, "2": 9},
    "resnext": {"stem.0": 12, "body.0.0": 16, "body.1.0": 16},         # one stream; grouped in, grouped out
    "grouped_uneven": {"0": 12, "2": 12, "4": 8},
    "generator": {"fc": 8, "up1": 6},                                  # 16 neurons are one channel
    "super_resolution": {"conv1": 8, "conv2": 6},                      # four channels are one of the image
    "space_to_depth": {"conv1.0": 7, "conv2.0": 6},
    "segnet": {"enc1.0": 6, "enc2.0": 9},                              # unpooling writes each channel's maxima back
    "graph_convolution": {"fc1": 12, "fc2": 10},                       # messages along edges keep channels apart
    "graph_attention": {"fc": 4},                                      # whole heads
    "neighbours": {"embed": 9, "edge": 8},
    "channel_order": {"conv1.0": 8, "conv2.0": 8},                     # the order is cut and renumbered
    "written_places": {"conv1.0": 8, "conv3": 5},                      # one map is written into another
    "global_filter": {"conv1.0": 8, "conv2.0": 6},
    "unfold_fold": {"conv.0": 6, "mix.0": 5},                          # nine columns are one channel
    "sampled": {"conv.0": 7},                                          # what says where to read stays
    "embedding_bag": {"bag": 8, "fc": 9},
    "shufflenet_v1": {"stem.0": 12, "gconv1.0": 2},
    "dense_block": {"stem": 6, "layers.0.2": 4, "layers.1.2": 4, "layers.2.2": 4, "transition.2": 9},
    "fpn": {"stages.0.0": 6, "stages.1.0": 8, "stages.2.0": 10, "lateral.2": 7},
    "inplace_residual": {"stem.0": 8, "blocks.0.0.0": 5, "blocks.1.0.0": 6, "blocks.2.0.0": 7},
    "option_a": {"0.0": 6, "1.conv1": 6, "2.conv1": 11, "2.conv2": 5, "3.conv1": 16, "3.conv2": 5, "4.conv1": 16},
    "mobilenet_v3": {"stem.0": 8, "expand.0": 20, "squeeze": 6},
    "res2net": {"stem.0": 10, "reduce.0": 3, "reduce.0#2": 3, "reduce.0#3": 3, "reduce.0#4": 3, "convs.2.0": 3},
    "csp": {"cv1.0": 5, "cv1.0#2": 5, "blocks.0.0.0": 4, "blocks.1.0.0": 4, "cv2.0": 8},
    "dual_path": {"stem.0": 6, "stem.0#2": 4, "block1.0.0": 7, "block1.1": 2, "block2.0.0": 7, "block2.1": 2},
    "se_block": {"stem.0": 8, "fc.0": 3},
    "cbam": {"mlp.0": 4},                                              # mean and max over channels hold the map
    "spatial_gate": {"conv.0": 8, "gate.0.0": 6},
    "channel_conv_gate": {"conv1.0": 8},                               # neighbours mix in the gated layer
    "selective_kernel": {"branches.0.0": 8, "squeeze": 5},
    "swiglu": {"packed": 14},                                          # gate and value in pairs
    "glu": {"fc1": 10, "fc2": 2, "conv": 5},
    "attention_pooling": {"hidden": 12, "score.0": 5},
    "shared_twice": {"stem.0": 8},
    "siamese": {"encoder.0.0": 6, "encoder.2.0": 8},
    "tied_embedding": {"embedding": 8, "fc1": 14},
    "tied_autoencoder": {"enc1": 9, "enc2": 5},
    "functional_conv": {"kernel": 8, "weight": 10},                    # no layers, only parameters
    "parameter_list": {"weights": 8, "weights#2": 9},
    "masked_weight": {"fc1.weight[0]": 12},
    "several_outputs": {"conv2.0": 9},                                 # the others go out
    "positional_embedding": {"word": 10, "fc1": 12},
    "channel_slices": {"conv.0": 4, "conv.0#2": 1, "conv.0#3": 2, "a": 6},    # every other one is read: pairs leave
    "dropped_channels": {"conv.0": 5, "conv.0#2": 7},                  # the first family is dead already
    "roll": {"conv1.0": 2, "conv1.0#2": 2, "conv1.0#3": 2, "conv1.0#4": 2, "conv2.0": 9},
    "heads_view": {"fc1": 4, "fc2": 10},                               # softmax within each head: whole heads
    "group_norm": {"0": 4, "3": 8, "6": 10},                           # whole groups; channels of a single one
    "instance_norm": {"1": 8, "4": 10, "7": 6},
    "layer_norm_mlp": {"0": 16, "3": 10},
    "maxout": {"conv1": 6, "conv2": 5},
    "channel_reductions": {"conv1": 8, "conv3": 7},                    # a sum forgives, a mean does not
    "recurrent": {"conv": 8, "lstm": 6, "lstm#2": 6, "lstm#3": 6, "lstm#4": 6, "gru": 7},    # 2 layers, 2 ways
    "text_bilstm": {"embedding": 10, "lstm": 7, "lstm#2": 7, "score.0": 5},
    "last_states": {"fc1": 8, "lstm": 6},                              # the same units in all layers
    "seq2seq": {"embedding": 8, "encoder": 7},                         # in the decoder, too
    "learned_state": {"gru": 7},
    "lstm_cell_loop": {"fc1": 6, "low": 8, "high": 7},
    "summed_directions": {"rnn": 8, "rnn#2": 8, "rnn#3": 8, "cell": 6},
    "mha_block": {"attention": 3, "ffn.0": 20},
    "vit": {"patch": 12, "attention": 4, "fc1": 24},
    "mlp_mixer": {"patch": 10, "tokens.0": 9, "channels.0": 16},
    "convnext": {"stem": 8, "fc1": 24},
    "separate_qkv": {"q": 4},                                          # a head of each projection
    "gqa_expand": {"q": 2},                                            # two query heads with their key head
    "gqa_interleave": {"q": 2},
    "gqa_flag": {"q": 2},
    "gqa_views": {"q": 3},
    "multi_query": {"q": 3, "v": 3},                                   # widths: there is one key head
    "talking_heads": {"q": 4, "v": 4, "before": 4},                    # heads before, between and after the mixing
    "class_attention": {"q": 4},
    "cross_covariance": {"q": 4},
    "einsum_heads": {"q": 4},
    "einsum_heads_last": {"q": 4, "o": 12},
    "bmm_heads": {"q": 4},
    "linear_attention": {"q": 4},
    "gated_heads": {"q": 4},
    "axial_attention": {"stem.0": 8, "qkv": 2},
    "unfolded_patches": {"stem.0": 6, "into": 8, "qkv": 2, "back": 6, "fuse": 7},
    "cross_attention": {"kv": 4, "up": 16},
    "decoder_layer": {"layer.self_attn": 3, "layer.multihead_attn.in_proj_weight[0]": 3, "layer.linear1": 18},
    "rotary_interleaved": {"q": 3},
    "rotary_partial": {"q": 3},
    "rotary_complex": {"q": 3},
    "alibi": {"q": 4},
    "head_bias": {"q": 4},
    "query_key_norm": {"q": 4},
    "attention_sinks": {"q": 4},
    "gated_experts": {"packed": 8},                                    # a gate with its value, in all experts
    "one_hot_experts": {"up": 9},
    "module_experts": {"shared.0": 5, "experts.0.0": 7, "experts.1.0": 8, "experts.2.0": 9},
    "dynamic_convolution": {"stem": 6, "router": 3, "bank[1]": 8},
    "llama_block": {"q_proj": 2, "gate_proj": 14},
    "gpt_block": {"wte": 12, "c_attn": 3, "c_fc": 20},
    "bert_layer": {"words": 12, "query": 3, "intermediate": 18, "pooler": 12},
    "t5_layers": {"relative": 2},                                      # one bias for the heads of both layers
    "octave": {"high.0": 6, "low.0": 4, "mix.lh": 7, "mix.ll": 5},
    "high_resolution": {"stem.0": 6, "down.0": 8, "branches.0.0": 6, "branches.1.0": 8},
    "normalizer_free": {"stem": 8, "conv1": 6, "conv2": 6, "squeeze": 3},
}
"""Family -> channels, where the network is there for the sake of them."""

PRUNED = [name for name in ZOO if name not in NOTHING]


@cache
def labelled(name: str) -> tuple[nn.Module, Call, Groups]:
    model, args, kwargs = ZOO[name]()
    call = Call(args, kwargs)
    return model, call, groups_of(model, call)


@cache
def cuts(name: str) -> tuple[Cut, Cut]:
    """One unit of each family less; a random number of units less."""
    model, _, groups = labelled(name)
    return cut(model, groups, first_units(groups)), cut(model, groups, random_choice(groups, 3))


def forms(result: Cut) -> list[nn.Module]:
    """The rewritten module and, where it is what came back, the user's class."""
    return [result.graph_form] + ([result.sliced] if result.proof.form == "class" else [])


def call_of(name: str, batch: int) -> Call:
    """fp64 inputs of another batch; an input without a batch axis stays."""
    _, args, kwargs = ZOO[name](batch=batch, seed=batch)
    return Call(*double((args, kwargs)))


def run(model: nn.Module, call: Call) -> list[Any]:
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (call.args, dict(call.kwargs)))
    return pytree.tree_leaves(model(*args, **kwargs))


def test_tables_name_networks() -> None:
    assert (NOTHING.keys() | REWRITTEN.keys() | FAMILIES.keys()) <= ZOO.keys()
    assert not NOTHING.keys() & (REWRITTEN.keys() | FAMILIES.keys())


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_prune_says_why(name: str) -> None:
    model, call, groups = labelled(name)
    assert not len(groups)
    report = frozen_report(groups.labels)
    assert any(NOTHING[name] in line for line in report), report
    assert all(".py:" in line or "parametri" in line for line in report)
    with pytest.raises(InputError, match=NOTHING[name]):
        prune(model, call, Target(macs=0.5))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    assert {family.name: family.channels for family in labelled(name)[2]} == FAMILIES[name]


@pytest.mark.parametrize("name", PRUNED)
def test_form(name: str) -> None:
    found = {result.proof.form for result in cuts(name)}
    assert ("graph" in found) == (name in REWRITTEN), REWRITTEN.get(name, "the user's class should run")
    for result in cuts(name):
        assert isinstance(result.model, type(labelled(name)[0])) == (result.proof.form == "class")
    assert not bool(cuts(name)[0].keep.all())


@pytest.mark.parametrize("name", PRUNED)
def test_equal_at_any_batch(name: str) -> None:
    """Both forms equal the masked network, and one whose layers are silenced where all mixing is in layers."""
    model, _, groups = labelled(name)
    assert groups.graph.free_batch, groups.graph.notes
    wide = {key: tensor.detach().double() if tensor.is_floating_point() else tensor
            for key, tensor in groups.graph.tensors.items()}
    for result in cuts(name):
        reference = silenced(model, result.plan) if mixes_in_layers(model, groups) else None
        for batch in (1, 2, 5):
            call = call_of(name, batch)
            masked = masked_outputs(groups.labels, result.keep, wide, call)
            with torch.no_grad():
                if reference is not None:
                    assert_equal_fp64(run(reference, call), masked)
                for form in forms(result):
                    assert_equal(run(double(form), call), masked)


@pytest.mark.parametrize("policy", [Policy(attention="widths"), Policy(norms="counted"), Policy(norms="remaining")],
                         ids=["widths", "counted", "remaining"])
@pytest.mark.parametrize("name", ZOO)
def test_other_policies(name: str, policy: Policy) -> None:
    """Where another policy offers other channels: half of them leave, and both forms equal the reference."""
    model, call, usual = labelled(name)
    groups = find_groups(bake.labelled(usual.graph, REGISTRY, policy=policy))
    if str(groups) == str(usual):
        return
    result = prune(model, call, Target(layers={"*": 0.5}), criterion="l1", groups=groups)
    assert not bool(result.keep.all())
    wide = {key: tensor.detach().double() if tensor.is_floating_point() else tensor
            for key, tensor in groups.graph.tensors.items()}
    again = call_of(name, 3)
    with torch.no_grad():
        assert_equal(run(double(result.model), again), masked_outputs(groups.labels, result.keep, wide, again))


def assert_equal(out: list[Any], ref: list[Any]) -> None:
    """A forward that casts to fp32 itself is equal to fp32."""
    narrow = any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in ref)
    if narrow or "keyword" in str(ref):
        assert len(out) == len(ref)
        assert all(torch.allclose(o, r, rtol=1e-4, atol=1e-5) for o, r in zip(out, ref, strict=True))
    else:
        assert_equal_fp64(out, ref)


@pytest.mark.parametrize("name", PRUNED)
def test_state_dicts_agree(name: str) -> None:
    """Names, order and values; so weights can be moved from either form to the other."""
    for result in cuts(name):
        own, graph = result.sliced.state_dict(), result.graph_form.state_dict()
        if name != "reserved_names":
            assert list(own) == list(graph)
            assert [n for n, _ in result.sliced.named_parameters()] == \
                   [n for n, _ in result.graph_form.named_parameters()]
            result.sliced.load_state_dict(graph)
        assert all(torch.equal(a, b) for a, b in zip(own.values(), graph.values(), strict=True))


UNTRAINABLE = {"inplace_view"}      # autograd refuses the original too
FIXED_MODE = {"functional_conv"}    # F.batch_norm without training=self.training; the graph form follows train()


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_untrainable(name: str) -> None:
    with pytest.raises(RuntimeError, match="inplace"):
        trained(double(labelled(name)[0]), call_of(name, 4))


@pytest.mark.parametrize("name", sorted(set(PRUNED) - UNTRAINABLE))
def test_trains(name: str) -> None:
    """train() works: statistics move, gradients reach every parameter that the original's reach (all there are, where
    weights that the forward computed are parameters now), eval() returns."""
    model, _, groups = labelled(name)
    call = call_of(name, 4)
    expected = {n for n, _ in cuts(name)[0].graph_form.named_parameters()} if is_baked(groups) else \
        trained(double(model), call)[1]
    result = cuts(name)[0]
    outputs, states = [], []
    for form in forms(result):
        out, reached, state = *trained(module := double(form), call), module.state_dict()
        if name != "reserved_names":
            assert reached == expected
        outputs.append(out)
        states.append(state)
        module.eval()
        assert not any(m.training for m in module.modules())
        moved = [key for key, value in state.items() if "running_" in key and not torch.equal(
            value, double(form).state_dict()[key])]
        assert len(moved) == sum("running_" in key for key in state)
    if len(outputs) == 2 and name not in FIXED_MODE and not random_in_training(model):
        assert_equal(outputs[0], outputs[1])
        assert all(torch.allclose(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def trained(model: nn.Module, call: Call) -> tuple[list[Any], set[str]]:
    """Outputs of one training step, and the parameters that its gradients reach."""
    model.train()
    torch.manual_seed(0)
    outputs = run(model, call)
    total = sum((out * torch.randn_like(out)).sum() for out in outputs if isinstance(out, Tensor)
                and out.is_floating_point() and out.requires_grad)
    total.backward()  # type: ignore[union-attr]
    return ([out.detach() if isinstance(out, Tensor) else out for out in outputs],
            {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())})


def random_in_training(model: nn.Module) -> bool:
    drops = any("Dropout" in type(m).__name__ and m.p for m in model.modules())
    return drops or any(getattr(m, "dropout", 0.0) for m in model.modules() if not isinstance(m, nn.Module))


def snapshot(model: nn.Module) -> Any:
    """Everything about a model that a careless pruner could change."""
    plain = [(path, type(module), sorted((key, repr(value)) for key, value in vars(module).items()
                                         if not key.startswith("_") and not isinstance(value, Tensor)),
              {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks") and value})
             for path, module in model.named_modules()]
    tensors = [(name, id(t), t.clone(), t.requires_grad, t.grad, t._version, t.dtype) for name, t in
               [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]]
    return plain, tensors


@pytest.mark.parametrize("name", PRUNED)
def test_original_is_untouched(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    next(iter(model.parameters())).requires_grad_(False)
    before = snapshot(model)
    prune(model, Call(args, kwargs), Target(layers={"*": 0.6}), criterion="l1")
    after = snapshot(model)
    assert before[0] == after[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert torch.equal(old[2], new[2])
        assert (*old[:2], *old[3:]) == (*new[:2], *new[3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain_cnn", "mobilenet_v3", "dual_path", "tied_embedding"])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = ZOO[name]()
    args = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args)
    result = prune(model.to(dtype), Call(args, kwargs), Target(layers={"*": 0.5}), criterion="l1")
    assert all(p.dtype == dtype for p in result.model.parameters())
    with torch.no_grad():
        assert all(out.dtype == dtype for out in run(result.model, Call(args, kwargs)))


@pytest.mark.parametrize("name", ["plain_cnn", "resnext", "inception", "siamese", "tied_embedding", "dual_path"])
def test_flags_and_hooks_are_kept(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    calls: list[str] = []
    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv, nn.Embedding))]
    first, last = modules[0], modules[-1]
    first.weight.requires_grad_(False)
    last.training = True                          # changes nothing in a linear layer, and is to stay
    first.weight.note = "mine"                    # type: ignore[attr-defined]
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.weight.requires_grad_(True)
    first.weight.register_hook(lambda grad: calls.append("grad"))
    first.weight.requires_grad_(False)
    result = prune(model, Call(args, kwargs), Target(layers={"*": 0.5}), criterion="l1")
    assert last.training
    calls.clear()
    pruned = [m for m in result.model.modules() if isinstance(m, (nn.Linear, Conv, nn.Embedding))]
    if result.proof.form == "class":
        assert pruned[0].weight.note == "mine"    # type: ignore[union-attr]
        assert not pruned[0].weight.requires_grad
        run(result.model, Call(args, kwargs))
        assert "forward" in calls
    assert not dict(result.model.named_parameters())[name_of(model, first)].requires_grad
    assert result.model.get_submodule(name_of(model, last).rpartition(".")[0]).training
    assert sum(m.training for m in result.model.modules()) == 1


def name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(f"{path}.weight" for path, module in model.named_modules() if module is layer)


@pytest.mark.parametrize("name", ["unet", "dual_path", "option_a", "text_cnn", "functional_conv", "roll"])
def test_rewritten_module_is_a_module(name: str, tmp_path: Any) -> None:
    """Copied, saved, moved, exported: the graph form does what modules do."""
    _, call, _ = labelled(name)
    graph = cuts(name)[1].graph_form
    with torch.no_grad():
        wanted = run(graph, call)
        twin = copy.deepcopy(graph)
        assert all(torch.equal(a, b) for a, b in zip(run(twin, call), wanted, strict=True))
        for tensor in twin.parameters():
            tensor.zero_()
        assert all(torch.equal(a, b) for a, b in zip(run(graph, call), wanted, strict=True))
        torch.save(graph.state_dict(), tmp_path / "state.pt")
        twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert all(torch.equal(a, b) for a, b in zip(run(twin, call), wanted, strict=True))
        assert all(t.dtype == torch.float64 for t in [*twin.double().parameters(), *twin.buffers()]
                   if t.is_floating_point())
        exported = torch.export.export(graph, call.args, dict(call.kwargs)).module()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run(exported, call), wanted, strict=True))


def test_norm_layers_stay_layers() -> None:
    """Layers that are one call each are the torch.nn layers themselves in the graph form."""
    for name in ("unet", "dual_path", "instance_norm", "shared_twice", "bn1d_mlp"):
        result = cuts(name)[0]
        norms = [type(m) for m in result.sliced.modules() if isinstance(m, NORMS)]
        assert norms
        assert [type(m) for m in result.graph_form.modules() if isinstance(m, NORMS)] == norms
