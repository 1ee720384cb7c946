"""Activation patching: by layer and position, by head, by head and position; with denoising and with noising.

python examples/activation_patching.py                 # the embedded model; pages go to --out
python examples/activation_patching.py --model openai-community/gpt2

Denoising shows which activations are sufficient to restore the behaviour, noising which are necessary for it. A
normalised effect of 1 is the whole difference between the clean and the corrupted run. If that difference is within
noise, effects are drawn unnormalised, in units of the metric.

If every prompt is also the corrupted side of its neighbour, as in these eight, denoising and noising give the same
numbers. Noising is therefore shown with other corrupted prompts, which name three people who are not in the clean one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eight_prompts import eight_prompts, report

import circuitfind as cf


def can_be_normalised(sweep: cf.Sweep) -> bool:
    """Whether the clean and the corrupted run differ beyond noise; print a note if they do not."""
    try:
        return sweep.normalised.size > 0
    except cf.ScoreError as error:
        print(f"effects are drawn unnormalised: {error}")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("circuitfind-out"))
    options = parser.parse_args()

    model = cf.load(options.model)
    tasks = {
        "denoising": eight_prompts(model),
        "noising": cf.task("ioi", model, n=8, template="abba-3", corruption="abc"),
    }
    for direction, task in tasks.items():
        report(model, task)
        figures = []
        with cf.show_progress():
            heads = cf.patch(model, task, "heads", direction=direction)
            normalised = can_be_normalised(heads)
            for what in ("resid", "attn", "mlp"):  # layer by position
                figures.append(cf.plot(cf.patch(model, task, what, direction=direction), normalised=normalised))
            figures.append(cf.plot(heads, normalised=normalised))
            for what in ("q", "k", "v", "pattern"):
                figures.append(cf.plot(cf.patch(model, task, what, direction=direction), normalised=normalised))
            figures.append(cf.plot(cf.patch(model, task, "heads", by_position=True, direction=direction)))
        for row in heads.top(3):
            print(f"{direction}: {row.name} {row.effect:+.3f} ({row.low:+.3f} to {row.high:+.3f})")
        page = cf.save_page(figures, options.out / f"{direction}.html", f"Patching {model.name}, {direction}")
        print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except cf.CircuitfindError as error:
        raise SystemExit(f"error: {error}") from None
