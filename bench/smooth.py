"""Cost against channels: a 3x3 convolution with a ReLU on 28x28 maps, C channels in and out, one by one.

    python bench/smooth.py                            # C = 8 to 64, ours and all peers, one thread
    python bench/smooth.py --channels 13,14,15,16,17 --peers onnxruntime --batch 8
    python bench/smooth.py --plot FILE.json           # measures nothing: draws the picture again

Networks come out of pruning with any number of channels, so time should grow as the multiply-accumulates do. A step
is how much more the time grew from one count to the next than they did; wanted is at most 15 %. Written: a JSON and
a PNG beside it (needs matplotlib, of the [report] extra). Every convolution is held to fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from torch import nn  # noqa: E402

from bench import machine  # noqa: E402
from bench.cases import Entry, aligned  # noqa: E402
from bench.contenders import Call, Setting, Truth, contenders  # noqa: E402
from bench.latency import ROUNDS, comma_list, prepare  # noqa: E402
from bench.networks import Network  # noqa: E402
from prunekern.analysis.latency import measure  # noqa: E402
from prunekern.core.files import write_bytes, write_text  # noqa: E402

Points = Mapping[str, Sequence[Mapping[str, Any]]]      # channels -> entries as in the JSON
SCHEMA = 1
SIDE, KERNEL = 28, 3
WANTED = 0.15           # the largest step


def convolution(channels: int) -> Network:
    torch.manual_seed(channels)
    model = nn.Sequential(nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2), nn.ReLU()).eval()
    return Network(str(channels), model, (SIDE * KERNEL * channels) ** 2, sum(p.numel() for p in model.parameters()))


def run_point(channels: int, setting: Setting, args: argparse.Namespace) -> list[Entry]:
    """All contenders on one number of channels."""
    net = convolution(channels)
    inputs = tuple(torch.randn(args.batch, channels, SIDE, SIDE) for _ in range(2))
    taking = [c for c in contenders(setting, args.peers, args.backends) if c.league == "fp32"]
    truth = Truth.of(net.module, inputs, net.macs)
    torch._dynamo.reset()
    entries, calls = {}, dict[str, Call]()
    for contender in taking:
        entries[contender.name], call = prepare(contender, net, truth, setting)
        if call is not None:
            calls[contender.name] = call
    for row in measure(calls, seconds=args.seconds, warmup=args.seconds / 4, min_rounds=ROUNDS):
        entries[row.name] = replace(entries[row.name], row=row)
    return list(entries.values())


def steps(times: Mapping[int, float]) -> dict[int, float]:
    """Channels -> time over that at the next smaller count, over the same of the multiply-accumulates, less 1.

    times: channels -> any unit of time; at least two counts.
    """
    found = {}
    for low, high in pairwise(sorted(times)):
        found[high] = times[high] / times[low] / (high / low) ** 2 - 1
    return found


def by_contender(points: Points, figure: str = "p50_us") -> dict[str, dict[int, float]]:
    """Contender -> channels -> µs."""
    found: dict[str, dict[int, float]] = {}
    for channels, entries in points.items():
        for entry in entries:
            if entry["state"] == "timed":
                found.setdefault(entry["contender"], {})[int(channels)] = entry[figure]
    return found


def summary(points: Points) -> str:
    """The largest steps of each contender, by the fastest samples too: they see less of the machine's other load."""
    lines = [["", "largest step", "at C", "steps > 15 %", "... of min", "µs at 16", "µs at 17"]]
    fastest = by_contender(points, "min_us")
    for name, times in by_contender(points).items():
        found, least = steps(times), steps(fastest[name])
        at = max(found, key=found.__getitem__, default=0)
        lines.append([name, f"{found.get(at, 0):+.0%}", str(at), str(sum(step > WANTED for step in found.values())),
                      f"{max(least.values(), default=0):+.0%}",
                      *(f"{times[c]:.1f}" if c in times else "" for c in (16, 17))])
    return "\n".join(aligned(lines))


def draw(results: Mapping[str, Any]) -> bytes:
    """Time and time a multiply-accumulate against channels, as PNG. Raises ImportError without matplotlib."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    ours = {entry["contender"] for entries in results["points"].values() for entry in entries if entry["ours"]}
    for name, times in by_contender(results["points"]).items():
        counts = sorted(times)
        style: dict[str, Any] = {"linewidth": 2.5, "color": "black"} if name in ours else {"linewidth": 1.2}
        above.plot(counts, [times[c] for c in counts], label=name, **style)
        macs = [results["batch"] * (SIDE * KERNEL * c) ** 2 for c in counts]
        below.plot(counts, [1e6 * times[c] / m for c, m in zip(counts, macs, strict=True)], label=name, **style)
    above.set(ylabel="µs a call", ylim=(0, None), title=f"3x3 convolution and ReLU, {SIDE}x{SIDE}, batch "
              f"{results['batch']}, {results['threads']} thread(s), {results['device']}")
    below.set(xlabel="channels in and out", ylabel="ps a multiply-accumulate", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_xticks(range(min(counts) // 8 * 8, max(counts) + 8, 8))
    below.yaxis.set_major_formatter(ScalarFormatter())
    below.yaxis.set_minor_formatter(ScalarFormatter())
    above.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comma_list(parser, "--channels", int, default=tuple(range(8, 65)), metavar="C")
    comma_list(parser, "--peers", str, metavar="NAME", help="as for latency.py; default: all but compile",
               default=("eager", "channels_last", "onnxruntime", "openvino"))
    comma_list(parser, "--backends", str, metavar="NAME", help="as for latency.py")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="measuring time per contender and count")
    parser.add_argument("--compile-limit", type=float, default=60.0, help="seconds that one torch.compile may take")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "smooth-cpu.json")
    parser.add_argument("--plot", type=Path, metavar="RESULTS", help="draw the picture of a file of results again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.plot is not None:
        results = json.loads(args.plot.read_text(encoding="utf-8"))
        out = args.plot
    else:
        results, out = measured(args), args.out
        write_text(out, json.dumps(results, indent=1) + "\n")
    print(summary(results["points"]))
    try:
        picture = write_bytes(out.with_suffix(".png"), draw(results))
    except ImportError as error:
        print(f"smooth.py: no picture: {error}; pip install 'prunekern[report]'", file=sys.stderr)
        return 0
    print(f"written: {out.name}, {picture.name}")
    return 0


def measured(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    setting = Setting(torch.device("cpu"), args.threads, args.compile_limit)
    facts = {"schema": SCHEMA, **machine.environment(setting.device), "threads": args.threads, "batch": args.batch,
             "seconds": args.seconds}
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        points = {str(channels): [entry.to_json() for entry in run_point(channels, setting, args)]
                  for channels in progress.track(args.channels, description="channels")}
    return {**facts, "points": points}


if __name__ == "__main__":
    sys.exit(main())
