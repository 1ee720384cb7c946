"""Prompts of unequal length: among the pairs of a task, and within a pair.

python examples/unequal_prompts.py                 # the embedded model; pages go to --out
python examples/unequal_prompts.py --model openai-community/gpt2

Pairs of different lengths are padded and masked; only scores by position are not available. The two prompts of a pair
must have equal lengths, unless spans are named on both sides, which align their tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("circuitfind-out"))
    options = parser.parse_args()
    model = cf.load(options.model)

    mixed = cf.task("ioi", model, n=16)
    lengths = {len(tokens) for tokens in mixed.on(model).tokens}
    print(f"{mixed.name}: prompts of {min(lengths)} to {max(lengths)} tokens")
    padded = cf.attribute(model, mixed, level="node", what="heads")
    try:
        cf.attribute(model, mixed, level="node", what="heads", by_position=True)
    except cf.ScoreError as error:
        print(f"by position: {error}")

    place, other = "park", "apple park"  # the second is longer by at least one token
    prompts = "When {a} and {b} went to the {place}, {s} gave the bag to"
    pairs = [("John", "Mary"), ("Mary", "John"), ("Tom", "James"), ("James", "Tom")]
    sides = {
        "clean": [prompts.format(a=a, b=b, s=a, place=place) for a, b in pairs],
        "corrupted": [prompts.format(a=a, b=b, s=b, place=other) for a, b in pairs],
        "answers": [b for _, b in pairs],
        "wrong_answers": [a for a, _ in pairs],
    }
    try:
        cf.Task(**sides).on(model)
    except cf.TaskError as error:
        print(f"unaligned: {error}")
    aligned = cf.Task(
        **sides, spans=[{"place": place}] * 4, corrupted_spans=[{"place": other}] * 4, align="spans", name="aligned"
    )
    heads = cf.attribute(model, aligned, level="node", what="heads")
    best = heads.top(1)[0]
    print(f"aligned: largest effect {best.name} {best.effect:+.3f}")
    page = cf.save_page([cf.plot(padded), cf.plot(heads)], options.out / "unequal.html", "Prompts of unequal length")
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except cf.CircuitfindError as error:
        raise SystemExit(f"error: {error}") from None
