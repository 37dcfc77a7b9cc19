"""Every architecture of five libraries: does half of it come out smaller, running, and equal to the masked original?

    python bench/zoo.py                                              # all of them, this library
    python bench/zoo.py --zoo timm,pyg --only 'res*' --jobs 2
    python bench/zoo.py --peer torch-pruning                         # the same questions for another pruner, too
    python bench/zoo.py --resume bench/results/FILE.json --again FAIL
    python bench/zoo.py --table bench/results/FILE.json              # measures nothing: prints the tables again

What is asked is in `bench/zoo_case.py`, the networks are in `bench/architectures/`. Each one runs in a process of its
own, in one thread, with a limit on its time and memory. The file is written whole after every case, the tables beside
it. Exit status: 0; 1 where this library failed somewhere; 2 on wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:                     # run as a file; a plain checkout is enough, nothing need be installed
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.text import Text  # noqa: E402

from bench import zoo_child, zoo_table  # noqa: E402
from bench.architectures import OWN, ZOOS  # noqa: E402
from bench.latency import comma_list  # noqa: E402
from bench.machine import placeless  # noqa: E402
from bench.shrinkers import OURS, PEERS  # noqa: E402
from prunekern.core.files import write_text  # noqa: E402

SCHEMA = 1
CAPS = {OURS: 120.0}                    # seconds of processor time that a network may take
PEER_CAP = 30.0                         # of a peer; as many again for the checks
BUILD = 120.0                           # to be built and run once
STRETCH = 8                             # how much longer than its processor time a process may take on a busy machine
Key = tuple[str, str, str]              # zoo, network, library
STATUS_STYLE = {"PASS": "green", "EXPLAINED": "cyan", "FAIL": "red", "SKIP": "dim"}


class Results:
    """A file of cases that is whole at all times. ``runs`` holds where and of which revision each case is."""

    def __init__(self, path: Path, facts: Mapping[str, Any], resume: bool, again: Sequence[str] = ()) -> None:
        """again: statuses of cases that are examined once more. Raises ValueError for a file of another schema."""
        self.path, self.runs, self.cases = path, [dict(facts)], dict[Key, dict[str, Any]]()
        if resume:
            old = json.loads(path.read_text(encoding="utf-8"))
            if old.get("schema") != SCHEMA:
                raise ValueError(f"{path} has schema {old.get('schema')}, this version writes {SCHEMA}")
            self.runs = [*old["runs"], dict(facts)]
            self.cases = {(c["zoo"], c["name"], c["library"]): c for c in old["cases"] if c["status"] not in again}

    def take(self, path: Path) -> None:
        """The cases of another file that this one lacks. Raises ValueError for a file of another schema."""
        other = json.loads(path.read_text(encoding="utf-8"))
        if other.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {other.get('schema')}, this version writes {SCHEMA}")
        before = len(self.runs) - 1                      # the present run stays the last
        self.runs[-1:-1] = other["runs"]
        for case in other["cases"]:
            self.cases.setdefault((case["zoo"], case["name"], case["library"]), {**case, "run": case["run"] + before})

    def add(self, case: Mapping[str, Any]) -> None:
        self.cases[case["zoo"], case["name"], case["library"]] = {**case, "run": len(self.runs) - 1}
        self.write()

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "runs": self.runs, "cases": placeless(list(self.cases.values()))}

    def write(self) -> None:
        whole = self.to_json()
        write_text(self.path, json.dumps(whole, indent=1) + "\n")
        write_text(self.path.with_suffix(".md"), zoo_table.markdown(whole, self.path.name) + "\n")


@dataclass
class Job:
    """A network that is being examined in a process of its own."""

    key: Key
    process: ForkServerProcess
    pipe: connection.Connection
    started: float = field(default_factory=time.monotonic)
    stage: str = "start"

    @property
    def limit(self) -> float:
        return BUILD if self.stage in ("start", "build") else CAPS.get(self.key[2], PEER_CAP)

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self.started > STRETCH * self.limit

    def hear(self) -> Mapping[str, Any] | None:
        """Take what the process says: the stage that it begins, or at last its case, which is given back."""
        try:
            while self.pipe.poll():
                said = self.pipe.recv()
                if isinstance(said, dict):
                    return said
                if self.stage in ("start", "build") and said not in ("start", "build"):
                    self.started = time.monotonic()
                self.stage = said
        except EOFError:
            self.process.join()
            if self.process.exitcode == -signal.SIGXCPU:
                return self.broken("time", f"more than {self.limit:g} s of processor time, in {self.stage}")
            return self.broken("crash", f"the process ended with status {self.process.exitcode} in {self.stage}")
        return self.broken("time", f"more than {STRETCH * self.limit:g} s, in {self.stage}") if self.overdue else None

    def broken(self, kind: str, reason: str) -> Mapping[str, Any]:
        skip = self.stage in ("start", "build")
        return {**dict(zip(("zoo", "name", "library"), self.key, strict=True)), "reason": reason,
                "status": "SKIP" if skip else "FAIL", **({} if skip else {"kind": kind})}

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def examine_all(keys: Sequence[Key], jobs: int) -> Iterator[Mapping[str, Any]]:
    """The case of every key, in the order in which they are finished."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"      # for the server and its children
    context = get_context("forkserver")         # what is imported once is there in every child
    zoos = dict.fromkeys(zoo for zoo, _, _ in keys)
    context.set_forkserver_preload(["bench.zoo_child", "bench.zoo_warm", *(f"bench.architectures.{z}" for z in zoos)])
    waiting, running = list(reversed(keys)), list[Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                key = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=zoo_child.main, daemon=True,
                                          args=(theirs, *key, BUILD, CAPS.get(key[2], PEER_CAP)))
                process.start()
                theirs.close()
                running.append(Job(key, process, ours))
            connection.wait([job.pipe for job in running], timeout=1.0)
            for job in list(running):
                case = job.hear()
                if case is not None:
                    job.end()
                    running.remove(job)
                    yield case
    finally:
        for job in running:
            job.end()


# ---- the command line ---------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comma_list(parser, "--zoo", str, default=ZOOS, metavar="NAME",
               help=f"default: {', '.join(ZOOS)}; there is '{OWN}', too: the hand-built networks of the tests")
    comma_list(parser, "--peer", str, default=(), metavar="NAME", help=f"other pruners: {', '.join(PEERS)}")
    parser.add_argument("--no-ours", action="store_true", help="examine the peers alone")
    comma_list(parser, "--only", str, default=("*",), metavar="PATTERN", help="names of networks, e.g. 'resnet*'")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    parser.add_argument("--cap", type=float, default=CAPS[OURS], help="seconds that this library may take for one")
    parser.add_argument("--out", type=Path, help="default: bench/results/zoo.json")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the cases of this file, and write to it")
    parser.add_argument("--take", type=Path, metavar="FILE", help="add the cases of this file that are not there yet")
    comma_list(parser, "--again", str, default=(), metavar="STATUS", help="with --resume: examine these once more")
    parser.add_argument("--table", type=Path, metavar="FILE", help="examine nothing: print the tables of a file")
    args = parser.parse_args(argv)
    for what, given, known in (("zoo", args.zoo, (*ZOOS, OWN)), ("peer", args.peer, PEERS),
                               ("--again", args.again, tuple(STATUS_STYLE))):
        if set(given) - set(known):
            parser.error(f"unknown {what} {', '.join(sorted(set(given) - set(known)))}; known: {', '.join(known)}")
    if args.jobs < 1 or args.cap <= 0:
        parser.error("--jobs and --cap must be above zero")
    return args


def wanted(args: argparse.Namespace) -> list[Key]:
    """What is asked for, library by library, in the order of the lists."""
    libraries = [*([] if args.no_ours else [OURS]), *args.peer]
    return [(zoo, name, library) for library in libraries for zoo in args.zoo for name in zoo_child.names(zoo)
            if any(fnmatchcase(name, pattern) for pattern in args.only)]


def line(case: Mapping[str, Any]) -> Text:
    """A case in one line of the terminal."""
    library = "" if case["library"] == OURS else f" ({case['library']})"
    why = " ".join(f"{case.get('kind', '')} {case.get('reason', '')}".split())[:100]
    return Text.assemble((f"{case['status']:<10}", STATUS_STYLE[case["status"]]),
                         f"{case['zoo']}/{case['name']}{library} ", (why, "dim"))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.table is not None:
        print(zoo_table.markdown(json.loads(args.table.read_text(encoding="utf-8")), args.table.name))
        return 0
    CAPS[OURS] = args.cap
    out = args.resume or args.out or ROOT / "bench" / "results" / "zoo.json"
    try:
        results = Results(out, zoo_child.facts(args.zoo, sys.argv[1:]), args.resume is not None, args.again)
        if args.take is not None:
            results.take(args.take)
            results.write()
        keys = [key for key in wanted(args) if key not in results.cases]
    except (ValueError, ImportError, OSError) as error:
        print(f"zoo.py: {error}", file=sys.stderr)
        return 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("zoo", total=len(keys))
        for case in examine_all(keys, args.jobs):
            results.add(case)
            progress.console.print(line(case), highlight=False, soft_wrap=True)
            progress.advance(bar)
    print(zoo_table.summary(results.to_json()))
    print(f"\nwritten: {out.name}, {out.with_suffix('.md').name}")
    return int(any(c["status"] == "FAIL" and c["library"] == OURS for c in results.cases.values()))


if __name__ == "__main__":
    sys.exit(main())
