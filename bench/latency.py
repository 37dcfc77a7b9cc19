"""Latency side by side: dense and pruned networks, on every runtime there is.

    python bench/latency.py --device cpu --threads 1,2 --batches 1,8,64       # the table of targets, all peers
    python bench/latency.py --models fashion,resnet20 --macs 0.5 --peers eager,onnxruntime --out some.json
    python bench/latency.py --device cuda --models resnet50 --macs 0.5 0.25
    python bench/latency.py --table RESULTS.json [--readme README.md]         # its table, from what was measured

Every contender is held to eager before it is timed (`prunekern.lower.tolerance`); one that misses is shown as
failed. All contenders of a case take turns in one process (`prunekern.analysis.latency`; on a GPU by its own clock and
with cold caches, `bench/cuda_clock.py`). The file is written after every case; `--resume` goes on with one that was
stopped. Exit status: 0; 1 where a lowered backend failed; 2 on wrong arguments; 3, with the reason, where the device is
not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:                     # run as a file; a plain checkout is enough, nothing need be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from bench import machine, table  # noqa: E402
from bench.cases import SCHEMA, Case, Entry, Results  # noqa: E402
from bench.contenders import DTYPES, PEERS, Call, Contender, Setting, Truth, contenders  # noqa: E402
from bench.cuda_clock import measure_on_gpu  # noqa: E402
from bench.networks import MODELS, TABLE, Network, networks  # noqa: E402
from prunekern.analysis.latency import measure, synchroniser  # noqa: E402
from prunekern.backends import BACKENDS  # noqa: E402
from tests.models import make  # noqa: E402

NO_DEVICE = 3
ROUNDS = 5          # at least, however long a call takes
# A run is resumed with the same ones.
SETTINGS = ("peers", "backends", "precisions", "macs", "seconds", "cap", "compile_limit")


@lru_cache(maxsize=1)
def prepared(name: str, shares: tuple[float, ...] | None) -> tuple[tuple[Network, ...], torch.Tensor]:
    """The networks of a model and an example input; kept while batches and threads of one model are gone through."""
    model, (one,) = make(name)
    return networks(name, model, one, shares), one


def run_case(name: str, batch: int, setting: Setting, args: argparse.Namespace, peak: float | None = None,
             tell: Any = lambda text: None) -> Case:
    """Build, verify, then time everybody together."""
    found, one = prepared(name, args.macs)
    nets = [replace(net, module=net.module.to(setting.device)) for net in found]
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(batch, *one.shape[1:], generator=generator).to(setting.device) for _ in range(2))
    torch._dynamo.reset()
    taking = contenders(setting, args.peers, args.backends, args.precisions)
    entries: dict[str, Entry] = {}
    calls: dict[str, Call] = {}
    for net in nets:
        tell(f"{net.name} in fp64")
        truth = Truth.of(net.module, inputs, net.macs, sorted({c.precision for c in taking}))
        for contender in taking:
            tell(f"{contender.name} on {net.name}")
            key = f"{contender.name} | {net.name}"
            entries[key], call = prepare(contender, net, truth, setting, args.cap)
            if call is not None:
                calls[key] = call
    tell(f"{len(calls)} take turns")
    if setting.device.type == "cuda":
        rows = measure_on_gpu(calls, seconds=args.seconds, min_rounds=ROUNDS)
    else:
        rows = measure(calls, seconds=args.seconds, min_rounds=ROUNDS, synchronise=synchroniser(setting.device))
    for row in rows:
        entries[row.name] = replace(entries[row.name], row=row)
    return Case(name, batch, setting.threads, tuple(nets), tuple(entries.values()), peak)


def prepare(contender: Contender, net: Network, truth: Truth, setting: Setting,
            cap: float = float("inf")) -> tuple[Entry, Call | None]:
    """A verified call, or the reason why there is none. cap: seconds that its rounds may take."""
    reason = contender.unavailable(setting)
    if reason is not None:
        return Entry(contender, net.name, "skipped", reason), None
    try:
        runner = contender.make(net.module, truth.inputs[0], setting)
        checked = truth.hold(runner, contender)
    except Exception as error:      # whatever a runtime stumbles over is a result of the comparison, not its end
        first = (str(error) or "-").splitlines()[0]
        return Entry(contender, net.name, "failed", f"{type(error).__name__}: {first}"[:300]), None
    if not checked.passed:
        return Entry(contender, net.name, "failed", f"off by {checked.error:.1e} of max|output|, the limit is "
                     f"{checked.limit:.1e} (eager's own error: {checked.torch_error:.1e})", checked), None
    if checked.seconds * ROUNDS > cap:
        return Entry(contender, net.name, "skipped", f"one call takes {checked.seconds:.1f} s, {ROUNDS} rounds more "
                     f"than the {cap:g} s of --cap", checked), None
    return Entry(contender, net.name, checked=checked), runner.bind(truth.inputs[0])


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


# ---- the command line ---------------------------------------------------------------------------------------------


def comma_list(parser: argparse.ArgumentParser, names: str, kind: type, **options: Any) -> None:
    """An option that takes values separated by commas or spaces, and gives a tuple."""
    def convert(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",") if item]

    class Flat(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
            setattr(namespace, self.dest, tuple(item for group in values for item in group))
    convert.__name__ = f"list of {kind.__name__}"
    parser.add_argument(*names.split(), type=convert, nargs="+", action=Flat, **options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(PEERS), default="cpu")
    several = partial(comma_list, parser)
    several("--models", str, metavar="NAME", help=f"of {', '.join(MODELS)}; default: on a CPU those of the table of "
            "targets, else the small ones")
    several("--batches --batch", int, default=(1, 64), metavar="N")
    several("--threads", int, default=(torch.get_num_threads(),), metavar="N")
    several("--macs", float, metavar="SHARE", help="shares of the MACs to prune to; default: on a CPU the pruned "
            "networks of the table, else 0.5; the dense network is always there")
    several("--peers", str, metavar="NAME", help="default: all; on a CPU "
            + ", ".join(dict.fromkeys(peer.key for peer in PEERS["cpu"])))
    several("--backends", str, metavar="NAME", help="of this library; default: the best one on the device")
    several("--precisions", str, metavar="NAME", help=f"of {', '.join(DTYPES)}; default: all that there are")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per contender and network "
                        f"(at least {ROUNDS} rounds)")
    parser.add_argument("--cap", type=float, default=120.0, help=f"seconds that {ROUNDS} rounds of one contender may "
                        "take before it is left out")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="seconds that one torch.compile may take")
    parser.add_argument("--out", type=Path, help="default: bench/results/latency-DEVICE.json")
    parser.add_argument("--resume", action="store_true", help="keep the cases that --out already holds")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="measure nothing: print the table of a file")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="with --table: write it between the markers there")
    args = parser.parse_args(argv)
    on_cpu = args.device == "cpu"
    args.models = args.models or (TABLE if on_cpu else ("fashion", "lenet", "mlp", "resnet20"))
    args.macs = args.macs or (None if on_cpu else (0.5,))
    for what, given, known in (("models", args.models, MODELS), ("backends", args.backends, [b.name for b in BACKENDS]),
                               ("precisions", args.precisions, DTYPES),
                               ("peers", args.peers, [peer.key for peer in PEERS[args.device]])):
        strange = sorted(set(given or ()) - set(known))
        if strange:
            parser.error(f"unknown {what} {', '.join(strange)}; known: {', '.join(dict.fromkeys(known))}")
    if min((*args.batches, *args.threads)) < 1 or min(args.seconds, args.cap) <= 0:
        parser.error("--batches, --threads, --seconds and --cap must be above zero")
    if args.readme is not None and args.table is None:
        parser.error("--readme needs --table: it is written from a file of results")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.table is not None:
        return table.main(args.table, args.readme)
    where = device(args.device)
    facts = {"schema": SCHEMA, **machine.environment(where),
             "settings": {key: getattr(args, key) for key in SETTINGS}}
    out = args.out or ROOT / "bench" / "results" / f"latency-{args.device}.json"
    try:
        results = Results(out, facts, args.resume)
    except ValueError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2
    results.facts["peaks"] = results.facts.get("peaks", {}) | machine.peaks(where, args.threads)
    print(f"{facts['device']}, torch {torch.__version__}, commit {facts['commit']}, load "
          f"{', '.join(f'{x:.1f}' for x in machine.load_average())} on {facts['cpus']} CPUs")
    for threads, peak in results.facts["peaks"].items():
        print(f"{threads} thread{'s' * (threads != '1')}: {peak['gflops']:.0f} GFLOP/s fp32 by {peak['by']}")
    measure_all(args, where, results)
    print(f"\nwritten: {out}")
    broken = [e for case in results for e in case["entries"] if e["state"] == "failed" and e["ours"]]
    return 1 if broken else 0


def measure_all(args: argparse.Namespace, where: torch.device, results: Results) -> None:
    """Every case that the file does not hold yet."""
    cases = list(product(args.models, args.batches, args.threads))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn when there is news only: a thread that draws all the time would disturb what is timed.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False,
                  auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(cases))
        for name, batch, threads in cases:
            if (name, batch, threads) not in results:
                torch.set_num_threads(threads)
                setting = Setting(where, threads, args.compile_limit)

                def tell(text: str, head: str = f"{name}, batch {batch}, threads {threads}: ") -> None:
                    progress.update(bar, description=head + text, refresh=True)
                case = run_case(name, batch, setting, args, results.facts["peaks"][str(threads)]["gflops"], tell)
                results.add(case)
                progress.stop()             # the line would run through what is printed
                print(f"\n{case}", flush=True)
                progress.start()
            progress.advance(bar)


if __name__ == "__main__":
    sys.exit(main())
