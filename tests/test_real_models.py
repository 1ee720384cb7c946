"""SmolLM2-135M (Llama, three key/value heads) and Gemma 3 270M (post-norms, q/k norms, one key/value head, BOS).

Real weights have what random ones lack: streams of very unequal size, saturated attention, scores over four decades.
Padding, unequal lengths and grouped queries are tested on them against the literal twins, with few pairs and edges.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import as_matrix, off
from oracles import Literal, patch_edge, run_circuit, split_reader_scores
from toys import off_scores

import circuitfind as cf
from circuitfind.batch import Inputs
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.loading import identities
from circuitfind.models import gguf_files

pytestmark = pytest.mark.real

BOTH = ("smollm2", "gemma3")
GIVEN = "Mary and John went to the store. {} gave a drink to"
LONGER = "Yesterday, after a long day at work, Mary and John went to the old store. {} gave a drink to"
GROUPED = {  # edges into a key and a value that several heads share, and one into the logits
    "smollm2": ["m0->a8.kv1<k>", "m0->a23.kv1<v>", "a20.h0->logits"],
    "gemma3": ["m0->a5.kv0<k>", "m2->a11.kv0<v>", "a17.h0->logits"],
}


def unequal(model: cf.Model) -> cf.Task:
    """Two pairs of unequal length."""
    templates = (GIVEN, LONGER)
    clean, corrupted = ([text.format(name) for text in templates] for name in ("John", "Mary"))
    return cf.Task(clean, corrupted, answers=["Mary"] * 2, wrong_answers=["John"] * 2)


def logit_diff(logits: torch.Tensor, task: cf.Task, model: cf.Model) -> torch.Tensor:
    """`[batch]`, from the definition."""
    batch = task.on(model).batch
    right, wrong = (logits[:, 0].gather(1, ids[:, 0]) for ids in (batch.answers, batch.wrong))
    return (right - wrong).squeeze(1)


# -------------------------------------------------------------------- loading
@pytest.mark.parametrize(("name", "kind", "edges"), [("smollm2", "Q4_1", 70_651), ("gemma3", "Q4_K_M", 5_644)])
def test_gguf_files_are_models(name: str, kind: str, edges: int, real: Callable[[str], cf.Model]) -> None:
    model = real(name)
    assert (model.graph.n_edges, model.dequantised) == (edges, f"float32 from GGUF {kind}")
    assert all(one.holds for one in identities(model))
    bound = cf.task("ioi", model, n=4).on(model)
    found = cf.summarise(model, bound)
    assert found.accuracy >= 0.75 and found.clean > 1 > -1 > found.corrupted
    assert bound.bos == ("none" if name == "smollm2" else "added by the tokenizer")


def test_scores_are_those_of_the_saved_weights(
    real: Callable[[str], cf.Model], gguf_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Saved and opened again, and as transformers' own `gguf_file=` gives them, marked as quantised."""
    model, path = real("smollm2"), gguf_of("smollm2")
    task = unequal(model)
    expected = cf.attribute(model, task, "eap").values
    model.hf.save_pretrained(tmp_path)
    with gguf_files.reading(str(path), path.name):  # only for speed
        own = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    assert own.config.quantization_config.quant_method == "gguf"
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for hf in (own, saved):
        other = cf.wrap(hf, model.tokenizer)
        np.testing.assert_array_equal(cf.attribute(other, task, "eap").values, expected)


# -------------------------------------------------------------------- unequal lengths, padding, grouped queries
@pytest.mark.parametrize("name", BOTH)
def test_padding_on_either_side_changes_nothing(name: str, real: Callable[[str], cf.Model]) -> None:
    model = real(name)
    bound = unequal(model).on(model)
    alone = [cf.attribute(model, bound.subset([row]), "eap").values for row in range(2)]
    batch = bound.batch
    short, length = int(batch.clean.mask[0].sum()), batch.clean.ids.shape[1]
    left = [side.ids.clone() for side in (batch.clean, batch.corrupted)]
    mask = batch.clean.mask.clone()
    for ids in (*left, mask):
        ids[0] = ids[0].roll(length - short)
    answers, wrong = batch.answers[:, 0], batch.wrong[:, 0]
    on_the_left = cf.Task(*left, answers, wrong, attention_mask=mask, metric="logit_diff")
    for task in (bound, on_the_left):
        scores = cf.attribute(model, task, "eap", batch_size=2)
        assert off_scores(scores, torch.from_numpy(np.mean(alone, 0))) < 1e-4


@pytest.mark.parametrize("name", BOTH)
def test_scores_equal_autograd_through_split_readers(name: str, real: Callable[[str], cf.Model]) -> None:
    model = real(name)
    task = unequal(model)
    scores = cf.attribute(model, task, "eap", batch_size=2)
    literal = split_reader_scores(model.hf, task.on(model).batch, lambda logits: logit_diff(logits, task, model) / 2)
    assert off_scores(scores, as_matrix(model.graph, literal)) < 1e-4


@pytest.mark.parametrize("name", BOTH)
def test_exact_effects_and_circuits_equal_the_literal_runs(name: str, real: Callable[[str], cf.Model]) -> None:
    model = real(name)
    task = unequal(model)
    batch, literal = task.on(model).batch, Literal(model.hf)
    with torch.no_grad():
        clean, corrupted = (literal.run(Inputs(*side)) for side in (batch.clean, batch.corrupted))
    change = {writer: corrupted.writers[writer] - value for writer, value in clean.writers.items()}
    before = logit_diff(clean.logits, task, model)
    for edge in GROUPED[name]:
        writer, reader = edge.split("->")
        expected = before - logit_diff(patch_edge(literal, batch.clean, change, writer, reader), task, model)
        found = cf.path_patch(model, task, [writer], [reader], batch_size=2).per_example
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-4 * float(before.abs().max()))
    circuit = cf.attribute(model, task, "eap").top(150)
    kept = {tuple(edge.split("->")) for edge in model.graph.names(circuit.mask)}
    expected = logit_diff(run_circuit(literal, batch.clean, kept, corrupted.writers), task, model)
    found = Evaluator.of(model, task).run(circuit.mask[None]).metric[0]
    assert off(torch.from_numpy(found), expected) < 1e-4
