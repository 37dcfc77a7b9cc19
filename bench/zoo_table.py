"""The tables of a run of ``zoo.py`` in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

CORE = ("trace", "label", "plan", "slice")      # the stages whose sum has a target
COUNTS = ("library", "zoo", "PASS", "explained", "fail", "runs unpruned", "PASS %", "+ explained %", "own class",
          "partly blunt", "failures")
TIMES = ("library", "median", "90 %", "most", "above 20 s", "rewrite", "prove", "lower")
WANTED = "median at most 0.7 s, none above 20 s"


def markdown(results: Mapping[str, Any], name: str) -> str:
    """Everything about a file of results."""
    cases = results["cases"]
    parts = ["# The zoo", f"Written by `bench/zoo.py` beside `{name}`; what is asked of a network is in "
             "`bench/zoo_case.py`.", summary(results)]
    for library in libraries(cases):
        mine = [case for case in cases if case["library"] == library]
        for status in ("FAIL", "EXPLAINED", "SKIP"):
            chosen = [case for case in mine if case["status"] == status]
            if chosen:
                parts += [f"## {library}: {status.lower()} ({len(chosen)})", _grid(
                    ("network", "kind", "MACs", "reason"), (_line(case) for case in chosen))]
    last = results["runs"][-1]
    versions = ", ".join(f"{package} {version}" for package, version in last["versions"].items())
    parts.append(f"{last['device']}, one thread a process; {last['date'][:10]}, revision "
                 f"{(last['commit'] or 'unknown')[:10]}; {versions}.")
    return "\n\n".join(parts)


def summary(results: Mapping[str, Any]) -> str:
    """One row per library and zoo, then seconds by stage. "own class": of those that pass, the result is the user's
    class; "partly blunt": the comparison says nothing about some of their families."""
    cases = results["cases"]
    rows, times = [], []
    for library in libraries(cases):
        mine = [case for case in cases if case["library"] == library]
        for zoo in [*dict.fromkeys(case["zoo"] for case in mine), None]:
            rows.append(_counts(library, zoo, [case for case in mine if zoo in (None, case["zoo"])]))
        times.append(_seconds(library, mine))
    return "\n\n".join([_grid(COUNTS, rows), f"Seconds of processor time, {' + '.join(CORE)} in one thread (wanted: "
                        f"{WANTED}); then medians of what comes after it:", _grid(TIMES, times)])


def libraries(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(case["library"] for case in cases))


def _counts(library: str, zoo: str | None, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    count = Counter(case["status"] for case in cases)
    whole = len(cases) - count["SKIP"]
    kinds = Counter(case.get("kind", "") for case in cases if case["status"] == "FAIL")
    bold = "**" if zoo is None else ""
    return [library, zoo or "all", *(str(count[status]) for status in ("PASS", "EXPLAINED", "FAIL")),
            f"{whole} of {len(cases)}", f"{bold}{count['PASS'] / max(whole, 1):.1%}{bold}",
            f"{(count['PASS'] + count['EXPLAINED']) / max(whole, 1):.1%}",
            str(sum(case.get("facts", {}).get("form") == "class" for case in cases if case["status"] == "PASS")),
            str(sum("blunt" in case for case in cases if case["status"] == "PASS")),
            ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())]


def _seconds(library: str, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    done = [case["seconds"] for case in cases if "slice" in case.get("seconds", {})]
    core = sorted(sum(seconds.get(stage, 0.0) for stage in CORE) for seconds in done)
    if not core:
        return [library] + ["–"] * 7

    def middle(stage: str) -> str:
        found = [seconds[stage] for seconds in done if stage in seconds]
        return f"{median(found):.2f}" if found else "–"
    return [library, f"{median(core):.2f}", f"{core[int(0.9 * (len(core) - 1))]:.2f}", f"{core[-1]:.2f}",
            str(sum(value > 20 for value in core)), *(middle(stage) for stage in ("rewrite", "prove", "lower"))]


def _line(case: Mapping[str, Any]) -> list[str]:
    ratio = f"{case['ratio']:.2f}" if "ratio" in case else ""
    reason = str(case.get("reason", "")).replace("|", "\\|").replace("\n", " ")
    return [f"{case['zoo']}/{case['name']}", case.get("kind", ""), ratio, reason[:300]]


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
