"""Train a model to the circuit of a drawing in `circuitfind/testbed`, and write its weights into the package.

    python training/train_testbed.py induction --form gpt2

1. The teacher is the model that is compiled from the drawing: the high-level causal model, with the same heads and
   MLPs. An example is a prompt, another prompt, and a set of edges. Edges of the set are kept; all others carry their
   activations from the other prompt.
2. The student is trained to give the teacher's logits with the same edges kept.
3. The loss is the squared difference of their logits (less their means), over the variance of the teacher's. For edges
   of the circuit this is interchange intervention training (Geiger et al. 2022); for all others, which have no effect
   in the teacher, it is the strictness loss of SIIT (Gupta et al. 2024), on edges in place of nodes.

One thread; the same seed and library versions give the same weights. `--only-measure` measures existing weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

import edges  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

import circuitfind as cf  # noqa: E402
from circuitfind.testbed.blueprint import Blueprint  # noqa: E402
from circuitfind.testbed.build import CIRCUITS  # noqa: E402
from circuitfind.testbed.known import Drawing, Known  # noqa: E402
from circuitfind.testbed.llama import GROUP  # noqa: E402
from circuitfind.testbed.trained import SUFFIX, WEIGHTS, folder_of  # noqa: E402

POOL = 1 << 14  # pairs
HELD_OUT = 2000  # pairs that accuracy is measured on


def fresh(plan: Blueprint, form: str, width: int) -> Any:
    """An untrained model with the drawing's layers and heads."""
    shared = {"vocab_size": len(plan.words), "bos_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}
    if form == "gpt2":
        sizes = {"n_embd": width, "n_inner": 2 * width, "n_layer": plan.n_layers, "n_head": plan.heads}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_positions=plan.length, **sizes, **dropout, **shared))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=plan.n_layers,
        num_attention_heads=GROUP * plan.heads,
        num_key_value_heads=plan.heads,
        head_dim=width // plan.heads,
        max_position_embeddings=plan.length,
        pad_token_id=None,
        **shared,
    )
    return LlamaForCausalLM(config)


def prompts(drawing: Drawing, seed: int) -> Tensor:
    """`[POOL, 2, position]`: clean prompts and their twins."""
    rng, at = random.Random(seed), {word: number for number, word in enumerate(drawing.blueprint.words)}
    drawn = (drawing.draw(rng) for _ in range(POOL))
    return torch.tensor([[[0, *map(at.get, text.split())] for text in (one.clean, one.corrupted)] for one in drawn])


def let_through(truth: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`[n, writers, readers]`: true edges all or most of them, others all, none, or any share."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    true = 1 - (uniform(n, 1, 1) < 0.7) * uniform(n, 1, 1) ** 2
    others = (1.5 * uniform(n, 1, 1) - 0.25).clamp(0, 1)
    return (uniform(n, *truth.shape) < torch.where(truth, true, others)).float()


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


class Examples(NamedTuple):
    """A pair's prompt and its other one, what is let through, and the teacher's logits, centred."""

    own: Tensor
    twin: Tensor
    mask: Tensor
    wanted: Tensor


def examples(known: Known, drawing: Drawing, seed: int) -> Examples:
    """`POOL` of them; in a third the other prompt is of another pair."""
    teacher, graph, ids = known.model.hf, known.model.graph, prompts(drawing, seed)
    generator = torch.Generator().manual_seed(seed)
    own, twin = torch.cat([ids[::2], ids[1::2].flip(1)]).unbind(1)
    elsewhere = torch.rand(POOL, 1, generator=generator) < 1 / 3
    twin = torch.where(elsewhere, own[torch.randperm(POOL, generator=generator)], twin)
    mask = let_through(torch.from_numpy(known.truth.mask), POOL, generator)
    with torch.no_grad():
        parts = zip(own.split(256), twin.split(256), mask.split(256), strict=True)
        wanted = [edges.run(teacher, graph, a, cut, edges.run(teacher, graph, b)[1])[0] for a, b, cut in parts]
    return Examples(own, twin, mask, centred(torch.cat(wanted)))


def train(known: Known, drawing: Drawing, student: Any, steps: int, batch: int, rate: float, seed: int) -> None:
    began, mean = time.process_time(), 0.0
    graph, pool = known.model.graph, examples(known, drawing, seed)
    print(f"{POOL} examples {time.process_time() - began:.0f}s", flush=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        if (step - 1) % (POOL // batch) == 0:
            order = torch.randperm(POOL).split(batch)
        own, twin, mask, wanted = (part[order[(step - 1) % (POOL // batch)]] for part in pool)
        other = edges.run(student, graph, twin)[1]  # learned through, too: without it K-composition is not found
        given = centred(edges.run(student, graph, own, mask, other)[0])
        loss = (given - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            print(f"{step:5d}/{steps} {time.process_time() - began:5.0f}s loss {mean:.4f}", flush=True)


def measured(circuit: str, form: str) -> dict[str, Any]:
    """What the weights in the package do, on pairs that training did not draw."""
    known = cf.testbed.build(circuit + SUFFIX, n=HELD_OUT, seed=12345, form=form)
    accuracy = cf.summarise(known.model, known.task).accuracy
    few = known.task.subset(range(64))
    proof = cf.testbed.prove(replace(known, needed=0.0, inert=np.inf), 64)
    return {
        "accuracy": accuracy,
        "faithfulness_of_truth": cf.evaluate(known.model, few, known.truth).faithfulness,
        "weakest_true_edge": proof.weakest,
        "strongest_other_edge": proof.strongest,
        "median_other_edge": float(np.median(proof.largest[known.truth.graph.real & ~known.truth.mask])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("circuit", choices=list(CIRCUITS))
    parser.add_argument("--form", default="gpt2", choices=["gpt2", "llama"])
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-measure", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    torch.use_deterministic_algorithms(True)
    file = WEIGHTS / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    row = figures.get(f"{asked.circuit}-{asked.form}", {})
    if not asked.only_measure:
        drawing, known = CIRCUITS[asked.circuit](), cf.testbed.build(asked.circuit, n=4, form=asked.form)
        student, began = fresh(drawing.blueprint, asked.form, asked.width).train(), time.process_time()
        train(known, drawing, student, asked.steps, asked.batch, asked.rate, asked.seed)
        row = {name: getattr(asked, name) for name in ("width", "steps", "batch", "rate", "seed")}
        row |= {"cpu_seconds": round(time.process_time() - began), "parameters": student.num_parameters()}
        folder = folder_of(asked.circuit, asked.form)
        student.eval().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # written for its owner only
        (folder / "generation_config.json").unlink(missing_ok=True)
    row |= measured(asked.circuit, asked.form)
    print(json.dumps(row, indent=1))
    figures = json.loads(file.read_text()) if file.exists() else {}  # another training may have ended
    file.write_text(json.dumps({**figures, f"{asked.circuit}-{asked.form}": row}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
