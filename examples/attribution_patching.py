"""Attribution patching over heads and positions on eight prompts, compared with exact patching.

python examples/attribution_patching.py                 # the embedded model; pages go to --out
python examples/attribution_patching.py --model openai-community/gpt2
python examples/attribution_patching.py --model meta-llama/Llama-3.2-1B --dtype float32
python examples/attribution_patching.py --model meta-llama/Llama-3.1-8B --remote ndif
python examples/attribution_patching.py --model FOLDER --task copy

Two forward passes and one backward pass estimate the effects of all places; exact patching needs a run for each place.
Keys and values of a model with grouped queries are those of its real key/value heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from eight_prompts import both_orders, eight_prompts, report

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype")
    parser.add_argument("--remote", help='run on an NDIF server: "ndif", or its URL')
    parser.add_argument("--task", help="a built-in behaviour in both orders, instead of the eight prompts")
    parser.add_argument("--out", type=Path, default=Path("circuitfind-out"))
    options = parser.parse_args()

    model = cf.load(options.model, dtype=options.dtype, remote=options.remote == "ndif" or options.remote or False)
    task = both_orders(cf.task(options.task, model, n=4)) if options.task else eight_prompts(model)
    report(model, task)
    one_length = not task.on(model).batch.clean.padded

    figures = []
    with cf.show_progress():
        for what in ("heads", "q", "k", "v", "attn", "mlp", "resid"):
            estimated = cf.attribute(model, task, "atp", level="node", what=what, by_position=False)
            exact = cf.patch(model, task, what, by_position=False)
            r = np.corrcoef(estimated.effects.ravel(), exact.effects.ravel())[0, 1]
            best = exact.top(1)[0]
            print(
                f"{what}: {exact.effects.size} places, r = {r:.2f} with exact; largest {best.name} {best.effect:+.3f}"
            )
            figures += [cf.plot(estimated), cf.plot((estimated, exact))]
        if one_length:
            figures += [
                cf.plot(cf.attribute(model, task, "atp", level="node", what="heads", by_position=True)),
                cf.plot(cf.attribute(model, task, "atp", level="node", what="resid")),
            ]
    page = cf.save_page(figures, options.out / "attribution.html", f"Attribution patching of {model.name}: {task.name}")
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except cf.CircuitfindError as error:
        raise SystemExit(f"error: {error}") from None
