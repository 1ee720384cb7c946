"""Cost of scores, circuits, ACDC and learned masks on an accelerator, as ratios to bare passes, in one table.

    python benchmarks/gpu.py [--device cuda] [--seconds 400] [--out gpu.md] [--only MODEL] [--tiny]

Random models of GPT-2 small's, SmolLM2-135M's, GPT-2 XL's and an 8B Llama's shape (bfloat16), 8 pairs of 16 tokens.
Runs unattended: the table is written after every row, and rows that do not fit in the time or in memory are named but
left out. Times are wall times, synchronised at the end of each call: the median of a few, after a warm-up. The warm-up
counts operator calls, which an accelerator has to launch: the same number on every machine, unless work is sliced or
run side by side. `--tiny`: models of two layers, to test the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare

NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
PAIRS, TOKENS, ROUNDS = 8, 16, 3
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "vocab_size": 128256}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOL |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "GPT-2 small": ("GPT2", {}, torch.float32),
    "SmolLM2": ("Llama", SMOL, torch.float32),
    "GPT-2 XL": ("GPT2", {"n_layer": 48, "n_head": 25, "n_embd": 1600}, torch.float32),
    "Llama, 8B": ("Llama", LLAMA, torch.bfloat16),
}
TINY = {
    "GPT2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 128},
    "Llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 128},
}


def build(family: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> cf.Model:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return cf.wrap(hf, name=family, backend="hooks", check=False)


def wait(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


class Operators(TorchDispatchMode):
    """Counts operators that compute something: neither views nor tensors without values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns]
        self.count += not (all(views) and views) and func._schema.name.removeprefix("aten::") not in NO_WORK
        return func(*args, **(kwargs or {}))


class Cost(NamedTuple):
    seconds: float
    operators: int


def cost(call: Callable[[], Any], device: str, rounds: int = ROUNDS) -> Cost:
    """Of a call: seconds, the median of some rounds, and operator calls of one before them."""
    with Operators() as operators:
        call()
    found = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return Cost(statistics.median(found), operators.count)


def bare(model: cf.Model, ids: torch.Tensor, backward: bool) -> None:
    """The model's own pass, its last position unembedded."""
    with torch.set_grad_enabled(backward):
        embedded = model.hf.get_input_embeddings()(ids).detach().requires_grad_(backward)
        logits = model.hf(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
        if backward:
            torch.autograd.grad(logits[:, -1, 5].float().sum(), embedded)


def calls(model: cf.Model, task: cf.Task) -> dict[str, tuple[str, int, Callable[[], Any]]]:
    """By what it is: the bare pass it is compared with, rounds, the call."""
    bound, graph = task.on(model), model.graph
    scores = cf.attribute(model, bound, "eap")
    prepared = prepare(model.adapter, bound.batch)
    half, small = (scores.top(n).mask[None] for n in (graph.n_edges // 2, 200))
    order = scores.top(64).edges
    acdc = {"threshold": 1e9, "order": order, "metric": "logit_diff"}
    return {
        "all edges, `eap`": ("forward + backward", ROUNDS, lambda: cf.attribute(model, bound, "eap")),
        "all edges, `relp`": ("forward + backward", ROUNDS, lambda: cf.attribute(model, bound, "relp")),
        "all edges, `gim`": ("forward + backward", ROUNDS, lambda: cf.attribute(model, bound, "gim")),
        "all edges, `eap-ig-inputs`": (
            "forward + backward",
            ROUNDS,
            lambda: cf.attribute(model, bound, "eap-ig-inputs"),
        ),
        "circuit of half the edges": ("forward", ROUNDS, lambda: run_circuits(prepared, half)),
        "circuit of 200 edges": ("forward", ROUNDS, lambda: run_circuits(prepared, small)),
        "64 trials of ACDC": ("forward", 1, lambda: cf.acdc(model, bound, **acdc)),
        "64 trials of ACDC, one at a time": ("forward", 1, lambda: cf.acdc(model, bound, **acdc, side_by_side=1)),
        "10 steps of a learned mask": (
            "forward + backward",
            1,
            lambda: cf.learn_masks(model, bound, "edge-pruning", steps=10, batch_size=PAIRS),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=400, help="no row is begun later than that")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    parser.add_argument("--only", choices=[*SHAPES], help="one of the models")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    on_cuda = torch.device(options.device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"torch finds no CUDA device here: {torch.__version__}; give --device cpu")
    if on_cuda:
        torch.cuda.set_device(torch.device(options.device).index or 0)
    end = time.monotonic() + options.seconds
    lines = [torch.cuda.get_device_name() if on_cuda else options.device, ""]
    lines += ["| model | | seconds | of a bare | operator calls | of a bare | peak beside the weights |"]
    lines += ["|---|---|---|---|---|---|---|"]

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        options.out.write_text("\n".join(lines) + "\n")

    for name, (family, shape, dtype) in SHAPES.items():
        if options.only not in (None, name):
            continue
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
        if time.monotonic() > end:
            say(f"| {name} | not reached in {options.seconds:.0f} s | | | | | |")
            continue
        try:
            measure(name, build(family, TINY[family] if options.tiny else shape, dtype, options.device), end, say)
        except (cf.CircuitfindError, RuntimeError) as error:  # a card too small for the model
            say(f"| {name} | {reason(error)} | | | | | |")


def reason(error: Exception) -> str:
    """Its first line, for a cell of a table."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100].replace("|", "/")


def measure(name: str, model: cf.Model, end: float, say: Callable[[str], None]) -> None:
    """Says a row for each thing done with a model, as far as there is time."""
    device = str(model.device)
    on_cuda = model.device.type == "cuda"
    clean, corrupted = torch.randint(3, 100, (2, PAIRS, TOKENS), generator=torch.Generator().manual_seed(0))
    task = cf.Task(clean, corrupted, [5] * PAIRS, [6] * PAIRS)
    ids, base = clean.to(device), {}
    for what, backward in (("forward", False), ("forward + backward", True)):
        base[what] = cost(partial(bare, model, ids, backward), device)
        say(f"| {name} | bare {what} | {base[what].seconds:.4f} | 1 | {base[what].operators} | 1 | |")
    for what, (of, rounds, call) in calls(model, task).items():
        if time.monotonic() > end:
            say(f"| {name} | {what}: not reached | | | | | |")
            continue
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_cuda else 0
        try:
            took = cost(call, device, rounds)
        except (cf.CircuitfindError, RuntimeError) as error:
            say(f"| {name} | {what}: {reason(error)} | | | | | |")
            continue
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MB" if on_cuda else ""
        ratios = (one / other for one, other in zip(took, base[of], strict=True))
        told = (f"{ratio:.1f} x {of}" for ratio in ratios)
        say(f"| {name} | {what} | {took.seconds:.3f} | {next(told)} | {took.operators} | {next(told)} | {peak} |")


if __name__ == "__main__":
    main()
