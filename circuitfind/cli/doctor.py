"""`circuitfind doctor`: check that a model is computed correctly on this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import inputs, options
from circuitfind.cli.cells import Right
from circuitfind.cli.options import option
from circuitfind.cli.output import FAILED, Output

PLANNED = {
    "scores, one gradient (eap, relp)": 1,
    "scores, 5 gradients (eap-ig-inputs, find)": 5,
    "exact effects, sweeps, circuits": 0,
}
"""Kinds of call, and their number of integration points."""


@dataclass(frozen=True)
class BatchOptions:
    examples: int = option("Number of pairs for the memory estimate.", 32, least=1)
    length: int = option("Tokens per prompt for the memory estimate.", 16, least=1)
    plan: bool = option("Print batch size, tokens at a time and expected memory of each kind of call.", False)


def doctor(model: options.UncheckedModel, batch: BatchOptions, task: options.Task, out: Output) -> int:
    """Check a model (identities, size of its graph, memory, versions), and with --data or --task your pairs.

    Identities compare circuitfind's arithmetic with the model's own. Exit code 1 if one fails. For a task, doctor
    reports how well the model does it, what the model answers, and problems with the pairs.

    Example: circuitfind doctor tiny --task ioi
    """
    if pairs := task.task is not None or task.data is not None:
        loaded, bound = inputs.load(options.Model(**vars(model), check=False), task, out)
    else:
        loaded = inputs.load_model(model, out)
    from circuitfind.engine.memory_plan import DEFAULT, Kept
    from circuitfind.loading import identities as identities_of
    from circuitfind.record import library_versions

    with out.waiting("checking identities"):
        identities = identities_of(loaded)
    found, sizes = _facts(loaded), (batch.examples, batch.length, 1)
    of_batch = f"{batch.examples} pairs of {batch.length} tokens"
    memory = inputs.memory_line(loaded, sizes, kept=DEFAULT)
    dot, versions = shutil.which("dot"), library_versions()
    out.facts(
        [
            ("model", inputs.model_line(loaded)),
            ("grouped", _ungrouped_line(loaded)),
            ("attention", str(found["attention"])),
            ("tokenizer", str(found["tokenizer"])),
            ("memory", f"{of_batch}: {memory}"),
            ("graphviz", dot or "'dot' is not on the PATH: circuits are written as .dot, pictures are not drawn"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
    )
    found |= {"memory": memory, "dot": dot, "versions": versions}
    if batch.plan:
        plans = {name: inputs.memory_line(loaded, sizes, kept=Kept(points)) for name, points in PLANNED.items()}
        found["plan"] = plans
        out.say()
        out.table(f"Of {of_batch}", ("call", "memory"), plans.items())
    found["identities"] = [{**one._asdict(), "holds": one.holds} for one in identities]
    out.say()
    rows = ((one.name, Right(f"{one.error:.1e}"), Right(f"{one.tolerance:.0e}"), _verdict(one)) for one in identities)
    out.table("Identities, error relative to the largest value", ("identity", "error", "allowed", ""), rows)
    fine = all(one.holds for one in identities)
    out.say(
        "All hold: circuitfind computes this model correctly."
        if fine
        else "Do not trust scores of this model on this machine."
    )
    if pairs:
        out.say()
        inputs.introduce(loaded, bound, options.Run(), out, whole=True)
        found["task"] = cf.diagnose(loaded, bound).to_dict()
    out.document({"model": loaded.name, **found})
    return 0 if fine else FAILED


def _verdict(one: Any) -> Text:
    return Text("holds", style="green") if one.holds else Text("FAILS", style="bold red")


def _facts(model: cf.Model) -> dict[str, Any]:
    graph, tokenizer = model.graph, model.tokenizer
    return {
        "family": model.kind,
        "edges": graph.n_edges,
        "nodes": graph.n_nodes,
        "edges_ungrouped": graph.ungrouped().n_edges,
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"weights": model.dequantised} if model.dequantised else {}),
        "device": str(model.device),
        "attention": getattr(model.config, "_attn_implementation", None) or "?",
        "tokenizer": "none: tasks are given as token ids" if tokenizer is None else _tokenizer_line(model),
    }


def _tokenizer_line(model: cf.Model) -> str:
    first = model.tokenizer("probe")["input_ids"][:1]
    bos = model.tokenizer.bos_token_id
    own = "adds a BOS token by itself" if bos is not None and first == [bos] else "adds no BOS token by itself"
    return f"{type(model.tokenizer).__name__}, vocabulary of {model.vocabulary:,}, {own}"


def _ungrouped_line(model: cf.Model) -> str:
    """For grouped-query models: the number of edges with one key and value per query head, as in other tools."""
    if model.graph.group == 1:
        return ""
    return f"{model.graph.ungrouped().n_edges:,} edges as other tools count, with keys and values for every query head"
