"""What `estimate_memory` says of scoring, beside how far the process really grows.

    python benchmarks/memory.py [NAME ...] [--pairs N] [--method METHOD]

Random models of many shapes, each in a process of its own that has scored one short pair before, so that only what
grows with the batch is counted: the resident set's high-water mark while all edges are scored, by EAP, or under KL by
integrated gradients.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from gpt2_small import resident

import circuitfind as cf
from circuitfind.engine.memory import plan_memory, sizes_of

GEMMA = {"head_dim": 256, "num_key_value_heads": 1, "num_attention_heads": 4, "sliding_window": 512}
# (configuration, pairs, tokens, metric)
SHAPES: dict[str, tuple[Any, int, int, str]] = {
    "GPT-2 small": (("GPT2", {}), 32, 16, "logit_diff"),
    "long prompts": (("GPT2", {"n_layer": 4}), 4, 512, "logit_diff"),
    "long prompts, eager": (("GPT2", {"n_layer": 4, "attn_implementation": "eager"}), 4, 512, "logit_diff"),
    "many layers": (("Llama", {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 48}), 16, 32, "kl"),
    "SmolLM2's shape": (
        (
            "Llama",
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
            },
        ),
        32,
        16,
        "logit_diff",
    ),
    "Gemma 3 270M's shape": (
        (
            "Gemma3",
            {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "vocab_size": 262144, **GEMMA},
        ),
        32,
        16,
        "logit_diff",
    ),
    "large vocabulary": (
        (
            "Gemma3",
            {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 262144, **GEMMA},
        ),
        32,
        16,
        "logit_diff",
    ),
    "large vocabulary, KL": (
        ("Llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 128256}),
        32,
        16,
        "kl",
    ),
    "wide MLP": (
        ("Llama", {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1000}),
        32,
        32,
        "logit_diff",
    ),
    "parallel blocks": (
        ("GPTNeoX", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 50432}),
        32,
        32,
        "logit_diff",
    ),
}


def build(family: str, options: dict[str, Any]) -> cf.Model:
    torch.manual_seed(0)
    options = dict(options)
    how = options.pop("attn_implementation", "sdpa")
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = how
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return cf.wrap(getattr(transformers, name)(config).eval(), check=False)


def task(model: cf.Model, pairs: int, tokens: int, metric: str) -> cf.Task:
    clean, corrupted = torch.randint(3, 1000, (2, pairs, tokens), generator=torch.Generator().manual_seed(0))
    answers = [[5] * pairs, [6] * pairs] if metric == "logit_diff" else []
    return cf.Task(clean, corrupted, *answers, metric=metric)


def child(name: str, pairs: int, method: str) -> None:
    """Prints what is said and what is grown, in MB."""
    (family, options), _, tokens, metric = SHAPES[name]
    model = build(family, options)
    cf.attribute(model, task(model, 1, 4, metric), method)
    bound = task(model, pairs, tokens, metric).on(model)
    points = 5 if method == "eap-ig-inputs" else 1
    said = plan_memory(model.adapter, sizes_of(bound.batch), pairs, softmax=metric == "kl", points=points).beside
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    cf.attribute(model, bound, method, batch_size=pairs)
    print(said / 2**20, resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--method")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child(options.child, options.pairs, options.method)
        return
    print("| shape | method | pairs x tokens | said | grown | grown / said |\n|---|---|---|---|---|---|")
    for name in options.names or SHAPES:
        _, pairs, tokens, metric = SHAPES[name]
        pairs = options.pairs or pairs
        method = options.method or ("eap" if metric == "logit_diff" else "eap-ig-inputs")
        command = [sys.executable, __file__, "--child", name, "--pairs", str(pairs), "--method", method]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        said, grown = map(float, found[-2:])
        print(
            f"| {name} | `{method}` | {pairs} x {tokens} | {said:.0f} MB | {grown:.0f} MB | {grown / said:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
