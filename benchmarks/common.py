"""What the benchmarks share: a random-weight GPT-2, a batch of pairs, paired CPU timings.

Every figure is a ratio to a bare pass of the same model and batch, measured in the same run: machines differ and drift,
so contestants take turns, each turn gives one ratio, and the median is quoted. One thread, CPU time of the process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import transformers

import circuitfind as cf
from circuitfind.engine.capture import capture
from circuitfind.engine.edge_effects import edge_effects
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.models.load import Model
from circuitfind.tasks.bound import BoundTask


def gpt2(n_layers: int = 12, seed: int = 0) -> Model:
    """GPT-2 small's shape with random weights, frozen."""
    torch.manual_seed(seed)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layers)).eval()
    hf.requires_grad_(False)
    return cf.wrap(hf, name=f"random GPT-2, {n_layers} layers")


def pairs(examples: int = 8, length: int = 16, seed: int = 0) -> cf.Task:
    """Random prompts that differ everywhere; metric: a logit difference at the last position."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(50257, (2, examples, length), generator=generator)
    answers = torch.randint(50257, (2, examples), generator=generator)
    return cf.Task(clean, corrupted, answers[0].tolist(), answers[1].tolist())


def bare_forward(model: Model, ids: torch.Tensor) -> None:
    """The model as a user would call it: all positions, whole vocabulary."""
    with torch.no_grad():
        model.hf(ids, use_cache=False)


def bare_forward_backward(model: Model, ids: torch.Tensor) -> None:
    """Forward and backward to the token embeddings with frozen parameters."""
    embeddings = model.hf.transformer.wte(ids).requires_grad_(True)
    logits = model.hf(inputs_embeds=embeddings, use_cache=False).logits
    torch.autograd.grad(logits[:, -1, 0].sum() - logits[:, -1, 1].sum(), embeddings)


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contestant in each round, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> str:
    """Median and range of the paired ratios."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def parts_of_eap(model: Model, bound: BoundTask) -> dict[str, Callable[[], object]]:
    """What `eap` is made of."""
    adapter, batch, metric = model.adapter, bound.batch, bound.metric
    run, at, _ = capture_gradients(adapter, batch.clean, lambda logits: metric(logits, batch))
    delta = run.writers.minus(capture(adapter, batch.corrupted, stop=True).writers)

    def contraction() -> None:
        with torch.no_grad():
            edge_effects(adapter, delta, run, at)

    return {
        "corrupted": lambda: capture(adapter, batch.corrupted, stop=True),
        "gradients": lambda: capture_gradients(adapter, batch.clean, lambda x: metric(x, batch)),
        "contraction": contraction,
    }
