"""The memory that `estimate_memory` predicts for scoring, beside the measured growth of the process.

    python benchmarks/memory.py [NAME ...] [--pairs N] [--tokens N] [--method METHOD] [--planned]

Random models of many shapes, each in its own process that has already scored one short pair, so that only memory that
grows with the batch is counted: the resident set's high-water mark while all edges are scored, by EAP, or under KL by
integrated gradients. Methods beside those of edges: "exact" measures a few edges of every layer, "spans" and
"positions" patch the stream by span and by position, "edge-pruning" learns for two steps, by KL, "find" is a whole
`find(edges=EDGES)`. `--planned`: in the planned batches, not in one. The last columns are the memory of the whole
process, weights included, and its CPU time.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from gpt2_small import resident

import circuitfind as cf
from circuitfind.attribution.exact import exact_effects
from circuitfind.attribution.methods import METHODS
from circuitfind.cli.inputs import kept_by
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import plan_learning, plan_memory, sizes_of
from circuitfind.models.backends import bare_logits
from circuitfind.search.learn import LEARNERS

EDGES = 500
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
    "1B": (
        (
            "Llama",
            {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
                "dtype": "bfloat16",
            },
        ),
        8,
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
    how, dtype = options.pop("attn_implementation", "sdpa"), getattr(torch, options.pop("dtype", "float32"))
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = how
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.set_default_dtype(dtype)
    model = getattr(transformers, name)(config).eval()
    torch.set_default_dtype(torch.float32)
    return cf.wrap(model, check=False)


def task(model: cf.Model, pairs: int, tokens: int, metric: str) -> cf.Task:
    clean, corrupted = torch.randint(3, 1000, (2, pairs, tokens), generator=torch.Generator().manual_seed(0))
    answers = [[5] * pairs, [6] * pairs] if metric == "logit_diff" else []
    halves = {"first": (0, tokens // 2), "second": (tokens // 2, tokens)}
    return cf.Task(clean, corrupted, *answers, metric=metric, spans=[halves] * pairs)


def done(model: cf.Model, pairs: int, tokens: int, metric: str) -> cf.Task:
    """Pairs that a random model does: the answers are its own."""
    given = task(model, pairs, tokens, metric).on(model).batch
    answers = [bare_logits(model.adapter, side)[:, 0].argmax(-1).tolist() for side in (given.clean, given.corrupted)]
    return cf.Task(given.clean.ids, given.corrupted.ids, *answers)


def call(model: cf.Model, pairs: Any, method: str, batch_size: int | None = None) -> None:
    graph = model.graph
    if method in LEARNERS:
        cf.learn_masks(model, pairs, method, steps=2, n_edges=100, batch_size=batch_size)
    elif method == "find":
        cf.find(model, pairs, edges=EDGES, batch_size=batch_size)
    elif method in ("spans", "positions"):
        cf.patch(model, pairs, "resid", by_span=method == "spans", batch_size=batch_size)
    elif method == "exact":
        names = [f"m{layer}->{kind}" for layer in range(graph.n_layers - 1) for kind in (f"m{layer + 1}", "logits")]
        exact_effects(Experiment.of(model, pairs, {"batch_size": batch_size}), graph.mask(names))
    else:
        cf.attribute(model, pairs, method, batch_size=batch_size)


def child(name: str, pairs: int, tokens: int, method: str, planned: bool) -> None:
    """Prints what is said and what is grown, in MB, the size of batches, the process's peak and processor time."""
    (family, options), _, _, metric = SHAPES[name]
    metric = "kl" if method in LEARNERS else metric
    model = build(family, {"max_position_embeddings": 8192} | options if family == "Llama" else options)
    call(model, task(model, 1, 4, metric), method if method in {**METHODS, **LEARNERS} else "eap")
    bound = (done if method == "find" else task)(model, pairs, tokens, metric).on(model)
    at_once = None if planned else pairs
    sizes, softmax = sizes_of(bound.batch), metric == "kl"
    if method in LEARNERS:
        plan = plan_learning(model.adapter, sizes, LEARNERS[method].pairs_per_step, at_once, softmax)
    else:
        kept = kept_by({"method": method if method in METHODS else "exact" if method != "find" else None}, "edge")
        plan = plan_memory(model.adapter, sizes, at_once, softmax, kept._replace(masks=method == "find"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmHWM"), time.process_time()
    call(model, bound, method, at_once)
    peak = resident("VmHWM")
    print(plan.beside / 2**20, peak - before, plan.batch_size, peak, time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--method")
    parser.add_argument("--planned", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child(options.child, options.pairs, options.tokens, options.method, options.planned)
        return
    print(
        "| shape | method | pairs x tokens | in a batch | said | grown | grown / said | peak | CPU s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.names or SHAPES:
        _, pairs, tokens, metric = SHAPES[name]
        pairs, tokens = options.pairs or pairs, options.tokens or tokens
        method = options.method or ("eap" if metric == "logit_diff" else "eap-ig-inputs")
        command = [sys.executable, __file__, "--child", name, "--pairs", str(pairs), "--tokens", str(tokens)]
        command += ["--method", method, *(["--planned"] if options.planned else [])]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        said, grown, at_once, peak, seconds = map(float, found[-5:])
        print(
            f"| {name} | `{method}` | {pairs} x {tokens} | {at_once:.0f} | {said:.0f} MB | {grown:.0f} MB |"
            f" {grown / said:.2f} | {peak:.0f} MB | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
