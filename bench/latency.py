"""Latency side by side: the dense and the pruned network, on every runtime there is.

    python bench/latency.py --device cpu --models fashion,resnet20 --batch 1,64 --threads 1
    python bench/latency.py --device cuda --models resnet50 --macs 0.5 0.25

Every contender is held to eager before it is timed (`prunekern.lower.tolerance`); one that misses is shown as
failed. All contenders of a case take turns in one process (`prunekern.analysis.latency`). Exit status: 0; 1 where a
lowered backend failed; 2 on wrong arguments; 3, with the reason, where the device is not there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:                     # run as a file; a plain checkout is enough, nothing need be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import prunekern  # noqa: E402
from bench.contenders import Call, Checked, Contender, Setting, contenders, verify  # noqa: E402
from prunekern.analysis.latency import Row, measure, synchroniser  # noqa: E402
from prunekern.core.files import write_text  # noqa: E402
from tests.models import ARCHITECTURES, make  # noqa: E402

SCHEMA = 1
NO_DEVICE = 3
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "triton")


@dataclass(frozen=True)
class Network:
    """One network of a case; ``name`` is 'dense', or the share of the MACs that it was pruned to."""

    name: str
    module: nn.Module
    macs: int
    params: int


@dataclass(frozen=True)
class Entry:
    """What became of one contender on one network: times, or the reason why there are none."""

    contender: str
    network: str
    state: str = "timed"                # or 'failed', 'skipped'
    reason: str = ""
    checked: Checked | None = None
    row: Row | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"contender": self.contender, "network": self.network, "state": self.state}
        if self.reason:
            found["reason"] = self.reason
        if self.checked is not None:
            found.update(asdict(self.checked))
        if self.row is not None:
            found.update({f"{key}_us": round(getattr(self.row, key), 3) for key in ("p20", "p50", "p80", "min")})
            found.update(samples=self.row.count, calls_per_sample=self.row.inner)
        return found


@dataclass(frozen=True)
class Case:
    """One model at one batch size."""

    model: str
    batch: int
    networks: tuple[Network, ...]
    entries: tuple[Entry, ...]
    load: tuple[float, ...] = field(default_factory=lambda: load_average())

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "batch": self.batch, "load_average": self.load,
                "networks": {n.name: {"macs": n.macs, "params": n.params} for n in self.networks},
                "entries": [entry.to_json() for entry in self.entries]}

    def __str__(self) -> str:
        by = {(e.contender, e.network): e for e in self.entries}
        base = by["eager", "dense"].row
        lines = [["", *(cell for n in self.networks for cell in (f"{n.name}, {n.macs / 1e6:.3g} M MACs", "x"))]]
        for name in dict.fromkeys(e.contender for e in self.entries):
            line = [name]
            for network in self.networks:
                entry = by[name, network.name]
                line += [_times(entry), f"{base.p50 / entry.row.p50:.2f}" if base and entry.row else ""]
            lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["   ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in
                            enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
        reasons = [f"  {e.contender} ({e.network}) {e.state}: {e.reason}" for e in self.entries if e.reason]
        head = (f"{self.model}, batch {self.batch}: µs a call, p50 (p20 - p80); x: times as fast as eager on the "
                "dense network")
        return "\n".join((head, *table, *reasons))


def _times(entry: Entry) -> str:
    row = entry.row
    if row is None:
        return entry.state
    p20, p50, p80 = (f"{value:.0f}" if row.p50 >= 1000 else f"{value:.1f}" for value in (row.p20, row.p50, row.p80))
    return f"{p50} ({p20} - {p80})"


def networks(model: nn.Module, x: Tensor, shares: Iterable[float]) -> tuple[Network, ...]:
    """The dense network and what prunekern makes of it at each share of MACs, proven."""
    dense = prunekern.profile(model, x)
    found = [Network("dense", model, dense.macs, dense.params)]
    for share in shares:
        pruned = prunekern.prune(model, x, prunekern.Target(macs=share))
        costs = prunekern.profile(pruned.model, x)
        found.append(Network(f"{share:.0%} MACs", pruned.model, costs.macs, costs.params))
    return tuple(found)


def run_case(name: str, batch: int, args: argparse.Namespace, setting: Setting) -> Case:
    """Build, verify, then time everybody together."""
    model, (one,) = make(name)
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(batch, *one.shape[1:], generator=generator).to(setting.device) for _ in range(2))
    nets = tuple(Network(n.name, n.module.to(setting.device), n.macs, n.params)
                 for n in networks(model, one, args.macs))
    torch._dynamo.reset()
    entries: dict[str, Entry] = {}
    calls: dict[str, Call] = {}
    for contender in contenders(setting, args.compile):
        for net in nets:
            key = f"{contender.name} | {net.name}"
            entries[key], call = prepare(contender, net, inputs, setting)
            if call is not None:
                calls[key] = call
    rows = measure(calls, seconds=args.seconds, synchronise=synchroniser(setting.device))
    for row in rows:
        entry = entries[row.name]
        entries[row.name] = Entry(entry.contender, entry.network, checked=entry.checked, row=row)
    return Case(name, batch, nets, tuple(entries.values()))


def prepare(contender: Contender, net: Network, inputs: tuple[Tensor, ...],
            setting: Setting) -> tuple[Entry, Call | None]:
    """A verified call, or the reason why there is none."""
    reason = contender.unavailable(setting)
    if reason is not None:
        return Entry(contender.name, net.name, "skipped", reason), None
    try:
        runner = contender.make(net.module, inputs[0], setting)
        checked = verify(runner, net.module, inputs)
    except Exception as error:      # whatever a runtime stumbles over is a result of the comparison, not its end
        first = (str(error) or "-").splitlines()[0]
        return Entry(contender.name, net.name, "failed", f"{type(error).__name__}: {first}"[:300]), None
    if not checked.passed:
        return Entry(contender.name, net.name, "failed", f"off by {checked.error:.1e} of max|output|, the limit is "
                     f"{checked.limit:.1e} (eager's own error: {checked.torch_error:.1e})", checked), None
    return Entry(contender.name, net.name, checked=checked), runner.bind(inputs[0])


# ---- where and with what -----------------------------------------------------------------------------------------


def load_average() -> tuple[float, ...]:
    """Processes that wanted to run, over the last 1, 5 and 15 minutes."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The revision that is checked out, '+' where files differ from it; None outside a git checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=True,
                              timeout=20).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(setting: Setting) -> dict[str, Any]:
    """What the figures depend on besides the networks."""
    versions = {"python": platform.python_version(), "prunekern": prunekern.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else None
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit(),
            "device": gpu or processor(), "cpu": processor(), "cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity") else os.cpu_count(), "threads": setting.threads, "precision": "fp32",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cuda": torch.version.cuda,
            "platform": platform.platform(), "versions": versions}


def device(name: str) -> torch.device:
    """The device, IEEE fp32 set everywhere. Exits with status 3 where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        print(f"latency.py: nothing was measured: {built}. Run it on a machine with a GPU, or pass --device cpu.",
              file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch.device(name)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def comma(kind: type) -> Any:
        return lambda text: [kind(item) for item in text.split(",") if item]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=comma(str), nargs="+", default=[["fashion", "lenet", "mlp", "resnet20"]],
                        metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--batch", type=comma(int), nargs="+", default=[[1, 64]], metavar="N")
    parser.add_argument("--macs", type=comma(float), nargs="+", default=[[0.5]], metavar="SHARE",
                        help="shares of the MACs to prune to; the dense network is always there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per contender and network")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="seconds that one torch.compile may take")
    parser.add_argument("--out", type=Path, help="default: bench/results/latency-DEVICE.json")
    args = parser.parse_args(argv)
    for name in ("models", "batch", "macs"):
        setattr(args, name, [item for group in getattr(args, name) for item in group])
    strange = sorted(set(args.models) - set(ARCHITECTURES))
    if strange:
        parser.error(f"unknown models {', '.join(strange)}; known: {', '.join(ARCHITECTURES)}")
    if min(args.batch) < 1 or args.threads < 1 or args.seconds <= 0:
        parser.error("--batch, --threads and --seconds must be above zero")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setting = Setting(device(args.device), args.threads, args.compile_limit)
    torch.set_num_threads(args.threads)
    out = args.out or ROOT / "bench" / "results" / f"latency-{args.device}.json"
    facts = {"schema": SCHEMA, **environment(setting), "load_average_before": load_average(),
             "seconds_per_contender": args.seconds}
    print(f"{facts['device']}, {args.threads} threads, fp32, torch {torch.__version__}, commit {facts['commit']}, "
          f"load {', '.join(f'{x:.1f}' for x in load_average())} on {facts['cpus']} CPUs")
    cases: list[Case] = []
    for name in args.models:
        for batch in args.batch:
            cases.append(run_case(name, batch, args, setting))
            print(f"\n{cases[-1]}", flush=True)
            write_text(out, json.dumps({**facts, "cases": [case.to_json() for case in cases]}, indent=1) + "\n")
    print(f"\nwritten: {out}")
    broken = [e for case in cases for e in case.entries if e.state == "failed" and e.contender.startswith("lowered")]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
