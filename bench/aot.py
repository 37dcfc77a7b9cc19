"""What the compiler makes of every shipped GPU kernel: registers, shared memory, instructions, for chips that need not
be there.

    python bench/aot.py [--arch 80 90] [--out bench/results/aot.md]

Exit status 1 where a kernel does not fit, spills registers or leaves the matrix unit alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:                     # run as a file; a plain checkout is enough
    sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "kernels"))

import torch  # noqa: E402
import triton  # noqa: E402

from prunekern_triton.ahead import Compiled, compile_ahead  # noqa: E402
from prunekern_triton.catalogue import Case, faults, shipped  # noqa: E402

HEAD = """# The GPU kernels, compiled ahead

By `python bench/aot.py`, with triton {triton}; no GPU was used, and nothing here says how fast anything is. Every line
is one shipped config of one kernel. *stack* is what registers spill to, in bytes a thread: 0 everywhere. UTCHMMA is
the matrix unit of Blackwell, HGMMA that of Hopper, HMMA that of earlier chips (these run it too: tiles of 16 rows,
for small batches), FFMA the plain multiply-add that IEEE fp32 needs (FFMA2: two of them); UTMALDG is the tensor copy
engine, LDGSTS asynchronous copies. Counts are of instructions in the code, not of how often they run.
"""
COLUMNS = ("kernel", "type", "config", "registers", "stack", "shared", "UTCHMMA", "HGMMA", "HMMA", "FFMA", "FFMA2",
           "UTMALDG", "LDGSTS")


def table(rows: Iterable[tuple[Case, Compiled]]) -> str:
    """Markdown, one line a kernel."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for case, built in rows:
        lines.append([case.title, case.kind, str(case.config or ""), str(built.registers), str(built.stack),
                      str(built.shared), *(str(built.counts[name] or "") for name in COLUMNS[6:])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def work(job: tuple[int, int]) -> Compiled:
    """One case of an architecture, by number; cases are cheap to list, and hold functions that cannot be sent."""
    torch.set_num_threads(1)
    arch, number = job
    return compile_ahead(list(shipped(arch))[number].launch, arch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 86, 90, 100])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "aot.md")
    args = parser.parse_args(argv)
    text, wrong = [HEAD.format(triton=triton.__version__)], []
    with ProcessPoolExecutor(args.workers) as pool:
        for arch in args.arch:
            cases = list(shipped(arch))
            built = list(pool.map(work, [(arch, number) for number in range(len(cases))]))
            text.append(f"## sm_{arch}\n\n{table(zip(cases, built, strict=True))}\n")
            wrong += [f"sm_{arch} {case}: {'; '.join(found)}" for case, each in zip(cases, built, strict=True)
                      if (found := faults(case, each))]
            print(f"sm_{arch}: {len(cases)} kernels")
    args.out.write_text("\n".join(text))
    print("\n".join(wrong) or "nothing is wrong with them", f"written: {args.out}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
