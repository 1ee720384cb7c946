"""`Known`: a model that was made to compute a known circuit; `prove`: the proof that it does.

1. A *drawing* is a blueprint, a generator of prompt pairs, and *contexts*: sets of edges that are ablated together with
   the edge under test. If another path takes over when an edge is ablated, that edge's effect shows only in a context
   without that path.
2. `make` compiles the blueprint (`gpt2.py`, `llama.py`), or takes a model that was trained to it (`trained.py`), adds a
   tokenizer, and draws the pairs.
3. `prove` measures how much the metric changes when one more edge is ablated in each context. Each true edge must
   matter in at least one context, and no other edge may matter in any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from circuitfind.circuit import Circuit
from circuitfind.errors import NoFile, ScoreError, TaskError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.loading import wrap
from circuitfind.models.load import Model
from circuitfind.record import Record
from circuitfind.references.reference import Reference
from circuitfind.tasks.builder import Pair
from circuitfind.tasks.task import Task
from circuitfind.testbed.blueprint import Blueprint
from circuitfind.testbed.gpt2 import gpt2
from circuitfind.testbed.llama import grouped, llama

FORMS, NORMS = ("gpt2", "llama"), ("identity", "real")
# Parts of the task's whole effect: the least that ablating a true edge must change, and the most for any other edge.
NEEDED = 0.02
INERT = {"identity": 1e-5, "real": 5e-3}  # by norm; real norms couple all that is written a little
INERT_TRAINED = 1e-2
_TRIES = 100  # draws per pair


class Drawing(NamedTuple):
    """A circuit to compile, described in step 1 of the module's docstring.

    contexts: each a tuple of edge names. needed: the least change of the metric when a true edge is ablated, as a part
    of the task's whole effect.
    """

    blueprint: Blueprint
    draw: Callable[[random.Random], Pair]
    contexts: tuple[tuple[str, ...], ...] = ((),)
    needed: float = NEEDED


@dataclass(frozen=True, eq=False)
class Known(NoFile):
    """A model whose circuit is known.

    Attributes:
        summary: what the circuit computes, in one line.
        truth: the true edges.
        contexts: the sets of edges that `prove` ablates together with each edge.
        needed, inert: the least change of the metric when a true edge is ablated, and the most when any other edge is,
            as parts of the task's whole effect.
    """

    INSTEAD = "save .truth, or the weights with .model.hf.save_pretrained(folder)"

    name: str
    summary: str
    model: Model
    task: Task
    truth: Circuit
    contexts: tuple[tuple[str, ...], ...] = ((),)
    needed: float = NEEDED
    inert: float = INERT["identity"]

    @property
    def reference(self) -> Reference:
        """The true edges as a reference circuit, for `circuitfind.compare(reference=)` and `agreement`."""
        return Reference(self.name, self.truth.graph, self.truth.mask, source="the model was made to compute it")

    def __repr__(self) -> str:
        return f"Known({self.name}: {len(self.truth)} true edges of {self.truth.graph.n_edges:,}; {self.summary})"


class Proof(NamedTuple):
    """The change of the metric when each edge is ablated, as a part of the task's whole effect.

    Attributes:
        largest: `[writers, readers]`, the largest mean |change| over pairs in any context; 0 where there is no edge.
        weakest: the smallest of these values over the true edges, and its edge.
        strongest: the largest of these values over all other edges, and its edge.
    """

    largest: np.ndarray
    weakest: tuple[float, str]
    strongest: tuple[float, str]


def tokenizer_of(words: Sequence[str]) -> Any:
    """Return a tokenizer with one token per word, which puts the first word before every text."""
    first = words[0]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=first))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=inner, bos_token=first)


def make(name: str, summary: str, drawing: Drawing, n: int, seed: int, norm: str, form: str, hf: Any = None) -> Known:
    """Return the model, task and true edges of a drawing. `hf`: a trained model in place of the compiled one."""
    blueprint, inert = drawing.blueprint, INERT[norm] if hf is None else INERT_TRAINED
    if hf is None:
        hf = llama(blueprint) if form == "llama" else gpt2(blueprint, norm)
    model = wrap(hf, tokenizer_of(blueprint.words), name=f"testbed/{name}")
    pairs = _pairs(drawing.draw, n, seed)
    task = Task(
        clean=[pair.clean for pair in pairs],
        corrupted=[pair.corrupted for pair in pairs],
        answers=[list(pair.answers) for pair in pairs],
        wrong_answers=[list(pair.wrong) for pair in pairs],
        flips=all(pair.flips for pair in pairs),
        name=name,
    )
    named = grouped if form == "llama" else str
    edges = list(map(named, blueprint.true_edges()))
    contexts = tuple(tuple(map(named, context)) for context in drawing.contexts)
    truth = Circuit.of(model.graph, edges, record=Record(model=model.name, task=name, method="truth"))
    return Known(name, summary, model, task, truth, contexts, drawing.needed, inert)


def _pairs(draw: Callable[[random.Random], Pair], n: int, seed: int) -> list[Pair]:
    """Return `n` pairs; they repeat if `_TRIES * n` draws give fewer different pairs."""
    rng = random.Random(seed)
    found: dict[tuple[str, str], Pair] = {}
    for _ in range(_TRIES * n):
        pair = draw(rng)
        found.setdefault((pair.clean, pair.corrupted), pair)
        if len(found) == n:
            return list(found.values())
    if not found:
        raise TaskError("testbed: the drawing makes no pairs")
    few = list(found.values())
    return [few[i % len(few)] for i in range(n)]


def prove(known: Known, n: int = 16) -> Proof:
    """Ablate every edge in every context, one exact run each, on the first `n` pairs, and check the true edges.

    Raises:
        ScoreError: a true edge does not matter, or another edge does; the message names both edges and their effects.
    """
    graph, largest = known.model.graph, _largest_changes(known, n)
    true, other = known.truth.mask, graph.real & ~known.truth.mask

    def at(values: np.ndarray, cell: int) -> tuple[float, str]:
        found = np.unravel_index(cell, values.shape)
        return float(values[found]), f"{graph.writer_names[found[0]]}->{graph.reader_names[found[1]]}"

    weakest = np.where(true, largest, np.inf)
    strongest = np.where(other, largest, -1.0)
    proof = Proof(largest, at(weakest, int(weakest.argmin())), at(strongest, int(strongest.argmax())))
    (least, one), (most, another) = proof.weakest, proof.strongest
    if least < known.needed or most > known.inert:
        raise ScoreError(
            f"testbed: the true edges of '{known.name}' are wrong: ablating the true edge {one} changes the metric by"
            f" {least:.2%} of the whole effect (at least {100 * known.needed:g}% is needed), and ablating {another},"
            f" which is not a true edge, by {most:.2%} (at most {100 * known.inert:g}% is allowed)"
        )
    return proof


def _largest_changes(known: Known, n: int) -> np.ndarray:
    """Return `Proof.largest`, measured on the first `n` pairs."""
    graph = known.model.graph
    evaluator = Evaluator.of(known.model, known.task.subset(range(min(n, len(known.task)))))
    evaluator.check_contrast()
    whole = abs(float(np.mean(evaluator.full - evaluator.empty)))
    largest = np.zeros(graph.real.shape)
    for context in known.contexts:
        left = graph.real & ~graph.mask(context)
        cells = np.argwhere(left)

        def without(cells: np.ndarray = cells, left: np.ndarray = left) -> Any:
            yield left
            for writer, reader in cells:
                mask = left.copy()
                mask[writer, reader] = False
                yield mask

        metrics = evaluator.metrics(without(), len(cells) + 1, "proof")
        change = np.abs(metrics[1:] - metrics[0]).mean(1) / whole
        largest[tuple(cells.T)] = np.maximum(largest[tuple(cells.T)], change)
    return largest
