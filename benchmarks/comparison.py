"""All methods on the embedded model's five tasks, and optionally on your own model and pairs: the tables of the docs.

    python benchmarks/comparison.py --out runs [--model FOLDER --data examples/pronouns.jsonl] [--methods eap,random]

Each task has 64 pairs (of a file, all): half rank the edges, half evaluate the circuits. One thread. Each task's
comparison is written to OUT as compare.json, .csv and .md, with every method's scores; a stopped run continues from
there. Prints CPR and CMD by method and task, how well scores rank the exact effects, the method whose faithfulness is
nearest to 1 at each size, and the cost of each ranking.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import circuitfind as cf
from circuitfind.comparison.result import Comparison, Entry

SOME = 0.05  # below it no method's circuit does anything
BEHAVIOURS = ("ioi", "greater-than", "gendered-pronoun", "subject-verb-agreement", "induction")


def run(out: Path, folder: str | None, data: str | None, methods: list[str] | None) -> dict[str, Comparison]:
    """Comparisons by task; finished ones are read from their files."""
    tasks: dict[str, Callable[[], tuple[cf.Model, cf.Task]]] = {
        name: lambda name=name: ((model := cf.load("tiny", backend="hooks")), cf.task(name, model, n=64))
        for name in BEHAVIOURS
    }
    if folder and data:
        tasks[Path(data).stem] = lambda: (cf.load(folder, backend="hooks"), cf.Task.from_file(data))
    found = {}
    for name, make in tasks.items():
        place = out / name
        if (place / "compare.json").exists():
            found[name] = Comparison.open(place / "compare.json")
            continue
        found[name] = cf.compare(*make(), methods, folder=place / "scores")
        for ending in ("json", "csv", "md"):
            found[name].save(place / f"compare.{ending}")
        print(f"{name} done", flush=True)
    return found


def by_task(title: str, found: dict[str, Comparison], number: Callable[[Entry], float], best: Callable) -> None:
    """One line a method, one column a task, the mean at the end; best mean first."""
    methods = [entry.method for entry in next(iter(found.values())).entries]
    values = {m: [number(one[m]) for one in found.values()] for m in methods}
    print(f"\n{title}\n\n| method | {' | '.join(found)} | mean |\n| --- |{' ---: |' * (len(found) + 1)}")
    tops = [best(column) for column in zip(*values.values(), strict=True)]
    for method in sorted(values, key=lambda m: statistics.mean(values[m]), reverse=best is max):
        cells = [f"**{v:.3f}**" if v == top else f"{v:.3f}" for v, top in zip(values[method], tops, strict=True)]
        print(f"| {method} | {' | '.join(cells)} | {statistics.mean(values[method]):.3f} |")


def nearest(found: dict[str, Comparison]) -> None:
    """Which method's circuit is nearest to faithfulness 1, by size and task."""
    first = next(iter(found.values()))
    heads = " | ".join(f"{point.fraction:.1%}" for point, _ in first.closest()[:-1])
    print(f"\nNearest to faithfulness 1, by part of the edges\n\n| task | {heads} |")
    print(f"| --- |{' --- |' * (len(first.closest()) - 1)}")
    for name, one in found.items():
        cells = [
            "" if point.faithfulness < SOME else f"{m} {point.faithfulness:.2f}" for point, m in one.closest()[:-1]
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def costs(found: dict[str, Comparison]) -> None:
    """Passes and CPU seconds of the rankings: the first task, and the range over all."""
    name, first = next(iter(found.items()))
    print(f"\nCost of a ranking ({name}; {first.n_search} pairs)\n")
    print("| method | forward passes | backward passes | CPU s | CPU s, all tasks | MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for entry in sorted(first.entries, key=lambda entry: entry.costs.cpu_seconds):
        seconds = [one[entry.method].costs.cpu_seconds for one in found.values()]
        memory = "" if entry.costs.memory is None else f"{entry.costs.memory / 2**20:.0f}"
        print(
            f"| {entry.method} | {entry.costs.forwards:,.0f} | {entry.costs.backwards:,.0f} |"
            f" {entry.costs.cpu_seconds:.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {memory} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--methods", type=lambda text: re.split(r",\s*", text))
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparisons = run(options.out, options.model, options.data, options.methods)
    by_task("CPR (higher is better)", comparisons, lambda entry: entry.cpr, max)
    by_task("CMD (lower is better)", comparisons, lambda entry: entry.cmd, min)
    if all(entry.rank_correlation is not None for one in comparisons.values() for entry in one.ranked):
        by_task("Spearman's rho with exact effects", comparisons, lambda entry: entry.rank_correlation, max)
    nearest(comparisons)
    costs(comparisons)
