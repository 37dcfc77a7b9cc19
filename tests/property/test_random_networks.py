"""Random small networks through the whole path: nothing that was decided, predicted or returned may be off.

`SHARDS * EXAMPLES` networks a run. Under the default hypothesis profile they are the same in every run; with
HYPOTHESIS_PROFILE=explore they are new ones. `-m nightly` takes a thousand more, under policies in turn;
PRUNEKERN_FUZZ=3 three thousand, PRUNEKERN_FUZZ_SEED=7 others.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekern import apply_plan, lower, profile, trace
from prunekern.core.plan import Plan
from prunekern.core.policy import DEFAULT, Policy
from prunekern.errors import TargetError
from prunekern.graph.groups import Groups
from prunekern.graph.inputs import Call
from prunekern.lower.tolerance import limit
from prunekern.prune.reference import masked_outputs
from prunekern.prune.target import Meter, Target, choose
from prunekern.prune.units import Units, make_units
from tests.networks import Case, build, networks, random_network, random_spec
from tests.pruning import Cut, cut, double, groups_of, mixes_in_layers, random_choice, silenced, taken
from tests.tolerances import FOLDED, assert_equal_fp64, max_err

SHARDS, EXAMPLES = 4, 40
NIGHTLY = round(1000 * float(os.environ.get("PRUNEKERN_FUZZ", "1")))
FIRST = 1_000_000 * int(os.environ.get("PRUNEKERN_FUZZ_SEED", "0"))
POLICIES = (Policy(), Policy(), Policy(attention="widths"), Policy(norms="counted"), Policy(norms="remaining"))
SEEDS = st.integers(0, 2**16)
SIMPLE = networks()
RICH = st.integers(0, 2**32).map(lambda number: build(random_spec(number)))
"""Hypothesis draws few blocks and shrinks them further; every other shard takes all that a spec can hold."""


def shards(test: Callable[[int], None]) -> Callable[[int], None]:
    return pytest.mark.parametrize("shard", range(SHARDS))(test)


def run(check: Callable[..., None], shard: int, examples: int = EXAMPLES) -> None:
    """Fixed examples, others in every shard; fresh ones where the profile asks for them."""
    check = settings(max_examples=examples)(check)
    if settings().derandomize:
        check = seed(shard)(check)
    check()


@shards
def test_pruned_lowered_costs(shard: int) -> None:
    kinds: Counter[str] = Counter()

    @given(RICH if shard % 2 else SIMPLE, SEEDS, st.booleans())
    def check(case: Case, choice: int, wide: bool) -> None:
        check_whole(case, choice, wide, kinds)

    run(check, shard)
    if settings().derandomize:      # the networks are worth it
        assert kinds["prunable"] > EXAMPLES // 2
        assert all(kinds[kind] > shard % 2 * 2 for kind in ("class", "graph", "several families", "balanced")), kinds


@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(20))
def test_a_thousand(shard: int) -> None:
    kinds: Counter[str] = Counter()
    for number in range(FIRST + shard, FIRST + NIGHTLY, 20):
        case = random_network(number)
        try:
            check_whole(case, number, bool(number % 2), kinds, POLICIES[number // 20 % len(POLICIES)])
        except Exception as error:
            error.add_note(f"random_network({number}): {case!r}")
            raise
    assert kinds["class"] > 0 < kinds["graph"]


def check_whole(case: Case, choice: int, wide: bool, kinds: Counter[str], policy: Policy = DEFAULT) -> None:
    """A random choice, carried out: equal, planned, predicted and lowered; the model is as it was."""
    model = case.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = groups_of(model, case.args, policy)
    if not len(groups):
        return
    result = cut(model, groups, random_choice(groups, choice))
    kinds.update({"prunable": 1, result.proof.form: 1, "several families": len(groups) > 2,
                  "balanced": any(bool(table.any()) for table in groups.labels.balanced)})
    check_equal(case, result)
    check_plan(case, result)
    check_lowered(result, case, wide)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def fresh(case: Case, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Inputs of another batch size than the traced one, the same ones whenever hypothesis asks again."""
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, *x.shape[1:], dtype=dtype, generator=generator) for x in case.args)


def check_equal(case: Case, result: Cut) -> None:
    """Equal to the masked original (where all mixing is in layers, to a network of silenced layers) at a batch size
    that was never seen; its weights are the plan's."""
    labels, inputs = result.groups.labels, fresh(case, 5)
    tensors = {name: double(tensor.detach()) for name, tensor in labels.graph.tensors.items()}
    with torch.no_grad():
        wanted = masked_outputs(labels, result.keep, tensors, Call(inputs, {}))
        outputs = double(result.model)(*inputs)
        assert_equal_fp64(outputs if isinstance(outputs, tuple) else (outputs,), wanted)
        if mixes_in_layers(case.model, result.groups) and not labels.restricted:
            assert_equal_fp64(outputs, silenced(case.model, result.plan)(*inputs))
    state, taken_ = result.model.state_dict(), taken(case.model, result.plan)
    assert state.keys() == taken_.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in taken_.items())
    assert all(0 not in tensor.shape for tensor in state.values())


def check_plan(case: Case, result: Cut) -> None:
    """Through JSON and back, and carried out again: the same network."""
    plan = Plan.from_json(json.loads(json.dumps(result.plan.to_json())))
    assert plan == result.plan
    again = apply_plan(case.model, case.args, plan, groups=result.groups)
    assert torch.equal(again.keep, result.keep)
    assert again.plan.kept == plan.kept
    assert again.plan.costs == plan.costs
    assert again.plan.shapes == plan.shapes
    left, right = result.model.state_dict(), again.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def check_lowered(result: Cut, case: Case, wide: bool) -> None:
    """What the plan predicts is counted on what came out; as GEMMs it is the same network."""
    model = double(result.model) if wide else result.model
    args = double(case.args) if wide else case.args
    graph = trace(model, args)
    total = profile(graph, batch=1 if graph.free_batch else None).total
    predicted = {name: after for name, (_, after) in result.plan.costs.items()}
    size = 2 if wide else 1
    assert total.macs == predicted["macs"]
    assert total.params == predicted["params"]
    integers = sum(8 for name in result.model.state_dict() if name.endswith("num_batches_tracked"))
    assert total.weight_bytes - integers == size * (predicted["bytes"] - integers)
    lowered = lower(graph, verify=not wide)
    inputs = fresh(case, 3, args[0].dtype)
    with torch.no_grad():
        ours, theirs = lowered(*inputs), model(*inputs)
        if wide:
            assert_equal_fp64(ours, theirs, FOLDED)
        else:
            exact = double(model)(*double(inputs))
            assert max_err(ours, exact) <= limit(max_err(theirs, exact), torch.float32)


@shards
def test_targets(shard: int) -> None:
    """A target is met from below; a smaller one removes the same and more; something always stays."""
    @given(RICH if shard % 2 else SIMPLE, SEEDS, st.sampled_from(["macs", "params", "bytes"]),
           st.sampled_from(["global", "layer"]), st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2).map(sorted))
    def check(case: Case, choice: int, what: str, ranking: str, shares: list[float]) -> None:
        groups = groups_of(case.model, case.args)
        if not len(groups):
            return
        generator = torch.Generator().manual_seed(choice)
        scores = torch.rand(groups.labels.groups, generator=generator, dtype=torch.float64)
        units = make_units(groups, scores)
        removed = []
        for share in shares:
            target = Target(**{what: share})
            if share < reachable(groups, units, what):
                with pytest.raises(TargetError, match="out of reach"):
                    choose(groups, units, target, ranking=ranking)
                continue
            # Without refilling, which trades single channels for being nearer to the target.
            found = choose(groups, units, target, ranking=ranking, refill=0)
            before, after = found.costs[what]
            assert after <= share * before
            for family in groups:
                assert bool(found.keep[family.groups].any())
            removed.append(~found.keep)
            refilled = choose(groups, units, target, ranking=ranking)
            assert after <= refilled.costs[what][1] <= share * before
            assert not bool((~refilled.keep & found.keep).any())
        if len(removed) == 2:
            smaller, larger = removed
            assert not bool((larger & ~smaller).any())

    run(check, shard, 12)


def reachable(groups: Groups, units: Units, what: str) -> float:
    """The share that is left when one unit of each family is."""
    meter = Meter(groups)
    return meter.of(~units.removed(~units.last))[what] / meter.whole[what]
