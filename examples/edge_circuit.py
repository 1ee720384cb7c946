"""Edge circuits: score every edge, cut circuits of every size, search, and evaluate on held-out pairs.

python examples/edge_circuit.py                 # the embedded model; pages go to --out
python examples/edge_circuit.py --model openai-community/gpt2 --task greater-than
"""

from __future__ import annotations

import argparse
from pathlib import Path

import circuitfind as cf

METHODS = ("eap", "eap-ig-inputs", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("circuitfind-out"))
    options = parser.parse_args()

    model = cf.load(options.model)
    search, unseen = cf.task(options.task, model, n=options.n).on(model).split()
    print(model)

    with cf.show_progress():
        scores = {name: cf.attribute(model, search, name) for name in METHODS}
        curves = {name: cf.curve(model, unseen, one) for name, one in scores.items()}
        for name, curve in curves.items():
            print(f"{name}: CMD {curve.cmd:.3f} ({curve.cmd_interval[0]:.3f} to {curve.cmd_interval[1]:.3f})")
        found = cf.find(model, search)
        judged = cf.evaluate(model, unseen, found.circuit)
        checks = cf.verify(model, unseen, found.scores, top=30)
    low, high = judged.interval
    print(f"{found.circuit}: faithfulness {judged.faithfulness:.3f} ({low:.3f} to {high:.3f}) on held-out pairs")
    print(f"top 30 edges: r = {checks.correlation:.2f} with the exact effects, {checks.sign_errors} wrong signs")

    found.circuit.save(options.out / "circuit.json")
    (options.out / "circuit.dot").write_text(found.circuit.to_dot(), encoding="utf-8")
    figures = [cf.plot(curves), cf.plot(found), cf.plot(checks), cf.plot(found.circuit, "strongest")]
    page = cf.save_page(figures, options.out / "circuit.html", f"{options.task} in {model.name}")
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except cf.CircuitfindError as error:
        raise SystemExit(f"error: {error}") from None
