"""Your own model and behaviour: from a file of pairs to a verified circuit, compared with exact patching.

python examples/own_behaviour.py --model FOLDER_OR_HUB_ID --data examples/pronouns.jsonl
python examples/own_behaviour.py                # the embedded model, its own gendered-pronoun task
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="jsonl or csv: clean, corrupted, answer, wrong")
    parser.add_argument("--n", type=int, default=24, help="pairs of the built-in task")
    parser.add_argument("--out", type=Path, default=Path("circuitfind-out"))
    options = parser.parse_args()

    model = cf.load(options.model)
    task = cf.Task.from_file(options.data) if options.data else cf.task("gendered-pronoun", model, n=options.n)
    print(model)
    print(cf.summarise(model, task))

    with cf.show_progress():
        exact = cf.attribute(model, task, "exact")
        estimates = {name: cf.attribute(model, task, name) for name in ("eap", "clean-corrupted", "eap-ig-inputs")}
        result = cf.find(model, task)

    edges = model.graph.real
    print(f"correlation with the exact effects of all {edges.sum():,} edges:")
    for name, scores in estimates.items():
        r = np.corrcoef(scores.values[edges], exact.values[edges])[0, 1]
        writer, reader = np.unravel_index(np.abs(scores.values - exact.values).argmax(), edges.shape)
        edge = model.graph.edge_name(writer, reader)
        print(f"  {name}: {r:.2f}; worst {edge}, estimated {scores[edge]:+.2f}, exact {exact[edge]:+.2f}")
    print(result.circuit)
    low, high = result.checks.interval
    print(f"faithfulness {result.checks.faithfulness:.3f} ({low:.3f} to {high:.3f}) on held-out pairs")
    figures = [cf.plot(result), *(cf.plot((scores, exact)) for scores in estimates.values())]
    page = cf.save_page(figures, options.out / "own-behaviour.html", f"{task.name} in {model.name}")
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except cf.CircuitfindError as error:
        raise SystemExit(f"error: {error}") from None
