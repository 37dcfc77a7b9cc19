"""The zoo benchmark: what passes, what is explained and what fails; limits on time; files that are resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import shrinkers, zoo, zoo_case, zoo_child, zoo_table
from bench.architectures import OWN, Architecture, architectures
from bench.shrinkers import Shrunk, Stages
from prunekern.errors import PlanError, TraceError
from prunekern.graph.inputs import Call, as_call
from prunekern.graph.trace import trace


def quiet(stage: str) -> None:
    pass


def small(hidden: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def some(build: Callable[[], nn.Module] = small, *inputs: Tensor) -> Architecture:
    return Architecture("some", "net", lambda: (build(), inputs or torch.randn(2, 4)))


def examined(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any], library: str = "other") -> zoo_case.Case:
    """The case of a small network under a pruner that gives ``answer(model, call, stages)``."""
    monkeypatch.setattr(zoo_case, "shrinker", lambda name: answer)
    return zoo_case.examine(some(), library, quiet)


# ---- one network ---------------------------------------------------------------------------------------------------


def test_a_network_that_halves_passes() -> None:
    said: list[str] = []
    case = zoo_case.examine(some(), "prunekern", said.append)
    assert (case.status, case.kind, case.reason, case.ratio) == ("PASS", "", "", 0.5)
    assert case.macs == 2 * 8 * 7
    assert case.error is not None
    assert case.error < 1e-12
    assert case.facts["families"] == 1
    assert said == ["build", "trace", "label", "plan", "slice", "rewrite", "prove", "lower", "check"]
    assert set(case.seconds) == set(said[1:])
    json.dumps(case.to_json())


def test_a_network_that_must_stay_is_explained() -> None:
    case = zoo_case.examine(some(lambda: nn.Linear(4, 3)), "prunekern", quiet)
    assert (case.status, case.ratio) == ("EXPLAINED", 1.0)
    assert "no prunable channels" in case.reason


class Branch(nn.Module):
    """A forward that no graph holds, around a part that one does."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.body, self.head = small(hidden), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x)) if x.sum() > 0 else self.body(x)


def test_a_refused_forward_is_explained_by_a_part_that_passes() -> None:
    case = zoo_case.examine(some(Branch), "prunekern", quiet)
    assert (case.status, case.facts["part"]["name"], case.facts["part"]["ratio"]) == ("EXPLAINED", "body", 0.5)
    assert case.facts["part"]["error"] < 1e-12
    assert "if x.sum() > 0" in case.facts["part"]["line"]
    json.dumps(case.to_json())


def test_a_part_that_holds_some_of_its_channels_explains_with_its_reason() -> None:
    held = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    class Held(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.body = held
    part = zoo_case.examine(some(Held), "prunekern", quiet).facts["part"]
    assert (part["status"], part["name"]) == ("EXPLAINED", "body")
    assert zoo_case.SHARE < part["ratio"] <= zoo_case.SMALLER
    assert "softmax" in part["frozen"][0]


def test_a_refused_forward_is_a_failure_where_no_part_passes() -> None:
    case = zoo_case.examine(some(lambda: Branch(1)), "prunekern", quiet)
    assert (case.status, case.kind) == ("FAIL", "trace")
    with pytest.raises(TraceError) as caught:
        trace(Branch().eval(), torch.randn(2, 4))
    assert zoo_case.in_parts(Branch().eval(), caught.value) is not None
    caught.value.line = ""                      # an error that does not say where
    assert zoo_case.in_parts(Branch().eval(), caught.value) is None


def test_a_network_that_does_not_run_is_skipped() -> None:
    case = zoo_case.examine(some(small, torch.randn(2, 5)), "prunekern", quiet)
    assert case.status == "SKIP"
    assert "RuntimeError" in case.reason


@pytest.mark.parametrize(("stage", "error", "kind"), [
    ("trace", RuntimeError("x"), "trace"), ("plan", RuntimeError("x"), "slice"), ("rewrite", KeyError("x"), "slice"),
    ("prove", RuntimeError("x"), "proof"), ("prove", PlanError("x"), "shape"), ("lower", RuntimeError("x"), "lower")])
def test_a_failure_is_named_by_its_stage(monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception,
                                         kind: str) -> None:
    def breaks(model: nn.Module, call: Call, stages: Stages) -> Shrunk:
        with stages("slice"):
            pass
        with stages(stage):
            raise error
    case = examined(monkeypatch, breaks)
    assert (case.status, case.kind) == ("FAIL", kind)
    assert "breaks" in case.facts["traceback"]


@pytest.mark.parametrize(("shrunk", "expected"), [
    (Shrunk(small(4), 1e-9), ("PASS", "")),
    (Shrunk(small(4), 1e-5), ("FAIL", "proof")),
    (Shrunk(small(4), float("nan")), ("FAIL", "proof")),
    (Shrunk(small(4), 0.0, teeth=0.0, blunt=("fc",)), ("FAIL", "teeth")),
    (Shrunk(small(4), 0.0, teeth=0.05, blunt=("fc",)), ("FAIL", "teeth")),
    (Shrunk(small(4), 0.0, teeth=0.9, blunt=("fc",)), ("PASS", "")),
    (Shrunk(small(7), 0.0, frozen=("softmax: why (3 channels)",)), ("EXPLAINED", "")),
    (Shrunk(small(7), 0.0, frozen=None), ("FAIL", "ratio")),
    (Shrunk(nn.Sequential(nn.Linear(4, 2)), 0.0), ("FAIL", "shape")),
    (Shrunk(nn.Sequential(nn.Linear(5, 3)), 0.0), ("FAIL", "run"))])
def test_verdicts(monkeypatch: pytest.MonkeyPatch, shrunk: Shrunk, expected: tuple[str, str]) -> None:
    case = examined(monkeypatch, lambda model, call, stages: shrunk)
    assert (case.status, case.kind) == expected
    assert case.status != "EXPLAINED" or "softmax" in case.reason


def test_a_peer_has_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: nn.Module, call: Call, stages: Stages) -> Shrunk:
        stages.seconds["slice"] = zoo_case.PEER_SECONDS + 1
        return Shrunk(small(4), 0.0)
    assert examined(monkeypatch, slow).kind == "time"
    assert examined(monkeypatch, slow, "prunekern").status == "PASS"


class Everything(nn.Module):
    """A contraction of each kind that the counter has to see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.gru = nn.Conv2d(3, 5, 3), nn.LSTM(6, 7), nn.GRUCell(6, 4)

    def forward(self, image: Tensor, words: Tensor) -> Any:
        attended = nn.functional.scaled_dot_product_attention(words, words, words)
        return {"maps": self.conv(image), "state": self.lstm(attended)[0], "cell": self.gru(words[0]), "n": 3}


def test_counted_macs_and_shapes() -> None:
    call = as_call(Everything(), (torch.randn(2, 3, 6, 6), torch.randn(5, 2, 6)))
    shapes, macs = zoo_case.measured(Everything().eval(), call)
    attention = 2 * 5 * 2 * 2 * 6
    assert macs == 2 * 5 * 27 * 16 + attention + 5 * 2 * 4 * 7 * (6 + 7) + 2 * 3 * 4 * (6 + 4)
    assert sorted(shapes, key=str) == [(2, 4), (2, 5, 4, 4), (5, 2, 7), 3]


def test_attention_modules_are_counted_in_full() -> None:
    """Their fast path is one fused operator, of which the counter knows nothing."""
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=False)[0]
    model = Attention().eval()
    _, macs = zoo_case.measured(model, as_call(model, torch.randn(2, 5, 8)))
    assert macs == 2 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_holds_channels_back_is_said() -> None:
    name = "softmax_block"
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    case = zoo_case.examine(Architecture("some", name, lambda: (model, torch.randn(2, 4))), "prunekern", quiet)
    assert "softmax" in case.frozen[0]
    assert "channels)" in case.frozen[0]


def test_families_that_stay_for_no_stated_reason_are_no_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinkers, "HALF", shrinkers.Target(layers={"*": 0.9}))
    case = zoo_case.examine(some(), "prunekern", quiet)
    assert (case.status, case.kind) == ("FAIL", "ratio")
    assert case.facts["not_halved"] == ["0"]


# ---- the peer ------------------------------------------------------------------------------------------------------


def test_the_peer_is_held_to_the_masked_original() -> None:
    pytest.importorskip("torch_pruning")
    found = [zoo_case.examine(some(), "torch-pruning", quiet) for _ in range(2)]
    assert [case.status for case in found] == ["PASS", "PASS"]
    from bench import peer_torch_pruning as peer

    class Wrong(nn.Module):
        """Positions that its own forward mixes up once channels are gone."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x).relu()
            return self.second(hidden.roll(hidden.shape[1] // 8, 1))
    case = zoo_case.examine(some(Wrong), "torch-pruning", quiet)
    assert (case.status, case.kind) == ("FAIL", "proof")
    assert peer.output_layers(small(), as_call(small(), torch.randn(2, 4))) == ["2"]


# ---- many of them --------------------------------------------------------------------------------------------------


def arguments(out: Path, *more: str) -> list[str]:
    return ["--zoo", OWN, "--only", *sorted(architectures(OWN))[:2], "--out", str(out), *more]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo.json"
    assert zoo.main(arguments(out)) == 0
    found = json.loads(out.read_text())
    assert [case["status"] for case in found["cases"]].count("PASS") >= 1
    assert {"commit", "versions", "device", "date"} <= set(found["runs"][0])
    tables = out.with_suffix(".md").read_text()
    assert "| prunekern | own |" in tables
    assert "| prunekern | own |" in capsys.readouterr().out
    written = out.stat().st_mtime_ns
    assert zoo.main(["--zoo", OWN, "--only", found["cases"][0]["name"], "--resume", str(out)]) == 0
    assert out.stat().st_mtime_ns == written                            # nothing was left to do


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = zoo.Results(path, {"commit": "a", "versions": {}, "date": "2026-01-01", "device": "d"}, resume=False)
    for name, status in (("x", "PASS"), ("y", "FAIL")):
        results.add({"zoo": "timm", "name": name, "library": "prunekern", "status": status})
    again = zoo.Results(path, {"commit": "b", "versions": {}, "date": "2026-01-02", "device": "d"}, True, ["FAIL"])
    assert list(again.cases) == [("timm", "x", "prunekern")]
    again.add({"zoo": "timm", "name": "y", "library": "prunekern", "status": "PASS"})
    whole = json.loads(path.read_text())
    assert [(case["name"], whole["runs"][case["run"]]["commit"]) for case in whole["cases"]] == [("x", "a"), ("y", "b")]
    path.write_text(json.dumps({**whole, "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        zoo.Results(path, {}, resume=True)


def test_results_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    results = zoo.Results(tmp_path / "z.json", {"commit": "a", "versions": {}, "date": "", "device": ""}, resume=False)
    said = f'at /x/lib/site-packages/timm/a.py:3 in "{zoo.ROOT}/bench/zoo.py"'
    results.add({"zoo": "own", "name": "n", "library": "prunekern", "status": "FAIL", "kind": "run", "reason": said,
                 "facts": {"notes": [said]}, "seconds": {}})
    text = (tmp_path / "z.json").read_text()
    assert 'at timm/a.py:3 in \\"bench/zoo.py\\"' in text
    assert "/x/lib" not in text
    assert str(zoo.ROOT) not in text


@pytest.mark.parametrize("wrong", [["--zoo", "nowhere"], ["--peer", "nobody"], ["--jobs", "0"], ["--again", "MAYBE"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        zoo.main(wrong)
    assert stopped.value.code == 2


def stuck(pipe: connection.Connection, zoo: str, name: str, library: str, build: float, cap: float) -> None:
    """Stands for ``zoo_child.main``."""
    pipe.send("build")
    if name == "never built":
        time.sleep(60)
    pipe.send("trace")
    zoo_child.limit(1 if name == "computes" else 60, "RLIMIT_CPU")
    if name == "dies":
        raise SystemExit(7)
    while name == "computes":
        pass
    time.sleep(60)


def test_processes_that_get_stuck_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_child, "main", stuck)
    monkeypatch.setattr(zoo, "BUILD", 6.0)
    monkeypatch.setattr(zoo, "STRETCH", 1)
    monkeypatch.setitem(zoo.CAPS, "prunekern", 20.0)
    monkeypatch.setitem(zoo.CAPS, "short", 0.5)
    keys = [(OWN, "dies", "prunekern"), (OWN, "sleeps", "short"), (OWN, "computes", "prunekern"),
            (OWN, "never built", "prunekern")]
    found = {case["name"]: case for case in zoo.examine_all(keys, jobs=4)}
    assert {name: (case["status"], case.get("kind")) for name, case in found.items()} == {
        "dies": ("FAIL", "crash"), "sleeps": ("FAIL", "time"), "computes": ("FAIL", "time"),
        "never built": ("SKIP", None)}
    assert "status 7" in found["dies"]["reason"]
    assert "in trace" in found["sleeps"]["reason"]


# ---- the tables ----------------------------------------------------------------------------------------------------


def test_tables() -> None:
    def case(name: str, status: str, **more: Any) -> dict[str, Any]:
        return {"zoo": "timm", "name": name, "library": "prunekern", "status": status, **more}
    seconds = {"trace": 1.0, "label": 0.25, "plan": 0.25, "slice": 0.5, "prove": 3.0}
    cases = [case("a", "PASS", seconds=seconds, facts={"form": "class"}),
             case("b", "PASS", seconds={**seconds, "trace": 30.0}, facts={"form": "graph"}, blunt=["fc"]),
             case("c", "FAIL", kind="proof", reason="x | y\nz"), case("d", "EXPLAINED", ratio=0.8, reason="softmax"),
             case("e", "SKIP", reason="no")]
    run = {"versions": {"torch": "2"}, "device": "d", "date": "2026-01-01T00:00", "commit": "abc"}
    text = zoo_table.markdown({"runs": [run], "cases": cases}, "f.json")
    assert "| prunekern | all | 2 | 1 | 1 | 4 of 5 | **50.0%** | 75.0% | 1 | 1 | proof 1 |" in text
    assert "| prunekern | 16.50 | 2.00 | 31.00 | 1 | – | 3.00 | – |" in text
    assert "| timm/c | proof |  | x \\| y z |" in text
    assert "| timm/d |  | 0.80 | softmax |" in text
    assert "| timm/e |  |  | no |" in text


def test_every_zoo_has_a_package() -> None:
    assert set(shrinkers.PEERS).isdisjoint({shrinkers.OURS})
    assert len(architectures(OWN)) > 50
