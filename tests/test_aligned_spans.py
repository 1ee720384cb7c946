"""Pairs whose prompts differ in length, aligned by spans, against literal runs with the corrupted values gathered.

The correspondence of the pairs below is written out by hand; the twins gather by it row after row.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpe import reader
from families import VOCAB
from helpers import off
from oracles import run_circuit
from patching_twin import PatchingTwin
from test_circuit_run import kept_edges, prepared_for, random_masks
from test_cli import Run, run  # noqa: F401  (a fixture)
from test_eap_ig_activations import holding, modules_of, outputs
from torch import Tensor
from toys import FOUR, Twin, ablated_literally, entering, gradients_at, id_task, off_scores, wrapped

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.masked_run import run_masked
from circuitfind.engine.sites import capture_site, site_means
from circuitfind.errors import ScoreError, TaskError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.metrics import METRICS
from circuitfind.tasks.spans import counterparts

CLOSE = 1e-5
CLEAN_SPANS = [{"a": (2, 5), "unused": (0, 3)}, {"a": (1, 2)}, {"a": (0, 1), "b": (3, 5)}]
CORRUPTED_SPANS = [{"a": (2, 3)}, {"a": (1, 4)}, {"a": (0, 2), "b": (4, 5)}]
LENGTHS = (7, 4, 6), (5, 6, 6)
# the first pair loses two tokens, the second gains two, the third gains one and loses one: one length, other places
COUNTERPARTS = [[0, 1, 2, 2, 2, 3, 4], [0, 3, 4, 5], [1, 2, 3, 4, 4, 5]]


def unequal_task(seed: int = 0, **more: Any) -> cf.Task:
    """Three random pairs of unequal lengths, with two answers and one wrong answer each."""
    generator = torch.Generator().manual_seed(seed)
    sides, masks = [], []
    for lengths in LENGTHS:
        masks.append(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
        sides.append(torch.randint(3, VOCAB, masks[-1].shape, generator=generator) * masks[-1])
    answers = torch.stack([torch.randperm(VOCAB - 3, generator=generator)[:3] + 3 for _ in range(3)])
    fields = {"spans": CLEAN_SPANS, "corrupted_spans": CORRUPTED_SPANS, "align": "spans", **more}
    return cf.Task(
        *sides, answers[:, :2], answers[:, 2], attention_mask=masks[0], corrupted_attention_mask=masks[1], **fields
    )


def gathered(value: Tensor) -> Tensor:
    """`[batch, pos, ...]` of the corrupted prompts at the clean prompts' positions; zero at padding."""
    moved = torch.zeros_like(value)
    for row, positions in enumerate(COUNTERPARTS):
        for at, counterpart in enumerate(positions):
            moved[row, at] = value[row, counterpart]
    return moved


class AlignedTwin(Twin):
    """Carries what the corrupted run left at the counterpart of each token."""

    def __init__(self, name: str, ablation: str = "corrupted") -> None:
        super().__init__(wrapped(name), unequal_task().on(wrapped(name)))
        if ablation == "corrupted":
            self.carried = {name: gathered(value) for name, value in self.corrupted.writers.items()}
        else:
            self.carried = ablated_literally(self.corrupted, self.batch.corrupted.mask, ablation)

    def estimates(self, alphas: list[float]) -> Tensor:
        low, high = self.carried["input"], self.clean.writers["input"]
        points = [low + alpha * (high - low) for alpha in alphas]
        return self.scored([gradients_at(self.literal, self.batch.clean, self.metric, at) for at in points])

    def activations(self, steps: int) -> Tensor:
        """EAP-IG over activations, one component held at a time."""
        clean, corrupted = (outputs(self, side) for side in (self.batch.clean, self.batch.corrupted))
        passes, low, high = [], self.carried["input"], self.clean.writers["input"]
        for alpha in (k / steps for k in range(1, steps + 1)):
            at = low + alpha * (high - low)
            passes.append(gradients_at(self.literal, self.batch.clean, self.metric, at))
            for module, whole, other in zip(modules_of(self), clean, corrupted, strict=True):
                moved = gathered(other.view(3, 7, -1)).view(other.shape)  # OPT's MLPs have no axis of positions
                with holding(module, moved + alpha * (whole - moved)):
                    passes.append(gradients_at(self.literal, self.batch.clean, self.metric, unused=True))
        return self.scored(passes)

    def scored(self, passes: list[dict[str, Tensor]]) -> Tensor:
        mean = {reader: sum(one[reader] for one in passes) / len(passes) for reader in passes[0]}
        change = {name: value - self.carried[name] for name, value in self.clean.writers.items()}
        mask = self.batch.clean.mask.unsqueeze(-1)
        return self._matrix(lambda writer, reader: (change[writer] * mean[reader] * mask).sum() / len(self.batch))


# -------------------------------------------------------------------- which tokens correspond
def test_counterparts_are_those_written_by_hand() -> None:
    for clean, corrupted, lengths, expected in zip(
        CLEAN_SPANS, CORRUPTED_SPANS, zip(*LENGTHS, strict=True), COUNTERPARTS, strict=True
    ):
        assert counterparts(clean, corrupted, lengths) == expected
    batch = unequal_task().on(wrapped("gpt2")).batch
    assert [row[: len(own)] for row, own in zip(batch.alignment.tolist(), COUNTERPARTS, strict=True)] == COUNTERPARTS
    assert batch.clean.read.tolist() == [[6], [3], [5]] and batch.corrupted.read.tolist() == [[4], [5], [5]]


def test_positions_are_counted_in_the_clean_prompt() -> None:
    task = unequal_task(metric="kl", positions=[[1, 5], [0, 1], [2, 3]])
    batch = replace(task, answers=None, wrong_answers=None).on(wrapped("gpt2")).batch
    assert batch.corrupted.read.tolist() == [[1, 3], [0, 3], [3, 4]]


@pytest.mark.parametrize(
    ("clean", "corrupted", "lengths", "message"),
    [
        ({"a": (1, 2)}, {"a": (2, 3)}, (5, 5), "the text before span 'a' has 1 tokens in the clean prompt, 2 in the"),
        ({"a": (1, 2)}, {"a": (1, 3)}, (5, 5), "the text after span 'a' has 3 tokens in the clean prompt, 2 in the"),
        ({"a": (0, 1), "b": (2, 3)}, {"a": (0, 1), "b": (3, 4)}, (4, 5), "the text between spans 'a' and 'b' has 1"),
        ({"a": (0, 1), "b": (2, 3)}, {"b": (0, 1), "a": (2, 3)}, (4, 4), "in the same order"),
        (
            {"a": (0, 2), "b": (1, 3)},
            {"a": (0, 1), "b": (1, 3)},
            (4, 4),
            "'b' begins before span 'a' ends in the clean",
        ),
        ({"a": (0, 1)}, {"b": (0, 1)}, (4, 4), "span 'b' is named in the corrupted prompt only"),
        ({"a": (0, 1)}, {}, (4, 5), "the prompt has 4 tokens in the clean prompt, 5 in the corrupted one"),
    ],
)
def test_what_cannot_be_aligned(
    clean: dict[str, Any], corrupted: dict[str, Any], lengths: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        counterparts(clean, corrupted, lengths)
    ids = [torch.arange(3, 3 + length).unsqueeze(0) for length in lengths]
    task = cf.Task(*ids, [9], [10], spans=[clean], corrupted_spans=[corrupted], align="spans")
    with pytest.raises(TaskError, match=f"row 0: .*{message}"):
        replace(task, corrupted=task.corrupted + 20).on(wrapped("gpt2"))


# -------------------------------------------------------------------- scores
@pytest.mark.parametrize("name", FOUR)
def test_scores_equal_their_definitions(name: str) -> None:
    twin, model = AlignedTwin(name), wrapped(name)
    exact = cf.attribute(model, twin.bound, "exact", batch_size=2)
    assert off_scores(exact, twin.exact()) < CLOSE
    assert off_scores(cf.attribute(model, twin.bound, "eap", batch_size=2), twin.estimates([1.0])) < CLOSE
    found = cf.attribute(model, twin.bound, "eap-ig-inputs", steps=3)
    assert off_scores(found, twin.estimates([0.0, 1 / 3, 2 / 3])) < CLOSE
    assert off_scores(cf.attribute(model, twin.bound, "clean-corrupted"), twin.estimates([0.0, 1.0])) < CLOSE


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_averages_over_activations_equal_their_definition(name: str) -> None:
    found = cf.attribute(wrapped(name), unequal_task(), "eap-ig-activations", steps=2)
    assert off_scores(found, AlignedTwin(name).activations(2)) < CLOSE


def test_input_scores_add_up_to_the_change_of_embedding() -> None:
    """Completeness: to the metric between the clean run and the clean prompt with the corrupted embedding."""
    twin = AlignedTwin("gpt2")
    with torch.no_grad(), entering(twin.literal, twin.carried["input"]):
        at_low = twin.metric(twin.literal.run(twin.batch.clean).logits).mean()
    change = float(twin.metric(twin.clean.logits).mean() - at_low)
    scores = cf.attribute(wrapped("gpt2"), twin.bound, "eap-ig-inputs", steps=40, rule="midpoint")
    assert scores.values[0].sum() == pytest.approx(change, rel=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sweeps_equal_one_run_a_place(name: str) -> None:
    """Against `PatchingTwin` with the other side's values gathered; nodes too, where both measure the same."""
    model = wrapped(name, torch.float64)  # effects of some places are as small as the rounding of logits
    bound = unequal_task().on(model)
    for what in ("heads", "resid", "v", "mlp"):
        twin = AlignedPatching(model, bound)
        sweep = cf.patch(model, bound, what=what, by_position=False)
        expected = twin.effects(what, by_position=False)
        assert sweep.per_example.shape == expected.squeeze().shape
        np.testing.assert_allclose(sweep.per_example, expected.squeeze(), atol=1e-5 * np.abs(expected).max())
    heads = cf.patch(model, bound, what="heads", by_position=False)
    nodes = cf.attribute(model, bound, "exact", level="node").values
    of_heads = nodes[1:].reshape(model.graph.n_layers, -1)[:, : model.graph.n_heads]
    np.testing.assert_allclose(heads.effects, of_heads, atol=1e-5 * np.abs(of_heads).max())


def test_means_of_places_are_over_the_corrupted_prompts_tokens() -> None:
    experiment = Experiment.of(wrapped("llama"), unequal_task(), {"ablation": "mean", "batch_size": 2})
    corrupted = experiment.batch.corrupted
    (value,) = capture_site(experiment.adapter, corrupted, "z", [1])[1].values()
    found = site_means(experiment, "z", [1])[1]
    assert off(found[0, 0], value[corrupted.mask].mean(0)) < CLOSE
    assert not torch.equal(corrupted.mask, experiment.batch.clean.mask)


def test_estimates_of_places_are_sums_over_edges() -> None:
    model, bound = wrapped("llama"), unequal_task().on(wrapped("llama"))
    sums = cf.attribute(model, bound, "eap").values.sum(1)
    nodes = cf.attribute(model, bound, "atp", level="node").values
    np.testing.assert_allclose(nodes, sums, atol=1e-5 * np.abs(sums).max())
    heads = cf.attribute(model, bound, "atp", level="node", what="heads", by_position=False).effects
    of_heads = sums[1:].reshape(model.graph.n_layers, -1)[:, : model.graph.n_heads]
    np.testing.assert_allclose(heads, of_heads, atol=1e-5 * np.abs(of_heads).max())


class AlignedPatching(PatchingTwin):
    """Another side's values are those of the counterparts."""

    def _carried(self, *args: Any) -> Tensor:
        return gathered(super()._carried(*args))


# -------------------------------------------------------------------- circuits
@pytest.mark.parametrize(("name", "ablation"), [*((name, "corrupted") for name in FOUR), ("llama", "mean")])
def test_circuits_equal_their_definition_in_both_forms(name: str, ablation: str) -> None:
    twin, adapter = AlignedTwin(name, ablation), wrapped(name).adapter
    prepared, graph = prepared_for(adapter, twin.bound.batch, ablation), adapter.graph
    assert not prepared.interchange
    masks = np.stack([np.zeros_like(graph.real), *random_masks(graph), graph.real])
    expected = [run_circuit(twin.literal, twin.batch.clean, kept_edges(graph, mask), twin.carried) for mask in masks]
    for sparse in (False, True):
        found = run_circuits(prepared, masks, sparse)
        for one, literal in zip(found, expected, strict=True):
            assert off(one, literal) < CLOSE
    soft = run_masked(prepared, torch.from_numpy(masks[2]).to(adapter.work))
    assert off(soft, expected[2]) < CLOSE
    assert torch.equal(run_circuits(prepared, graph.real[None], sparse=False)[0], prepared.clean.logits)
    assert torch.equal(run_circuits(prepared, masks[:1])[0], prepared.empty.logits)
    if ablation == "corrupted":  # the unembedding reads the corrupted stream
        assert off(prepared.empty.logits, twin.corrupted.logits) < CLOSE


def test_faithfulness_runs_from_the_empty_circuit_to_the_model() -> None:
    model, twin = wrapped("gpt2"), AlignedTwin("gpt2")
    evaluator = Evaluator.of(model, twin.bound.with_metric("kl"), batch_size=2)
    found = evaluator.evaluate(cf.Circuit(model.graph, model.graph.real))
    expected = METRICS["kl"](twin.corrupted.logits, twin.batch)
    np.testing.assert_allclose(found.per_example.empty, expected.numpy(), rtol=1e-4)
    assert found.faithfulness == 1 and found.metric == found.metric_full == 0


# -------------------------------------------------------------------- equal lengths
def test_an_alignment_of_each_token_with_itself_is_the_ordinary_path() -> None:
    spans = [{"a": (1, 3)}] * 3
    aligned = id_task((7, 5, 6), spans=spans, corrupted_spans=spans, align="spans").on(wrapped("llama"))
    assert aligned.batch.alignment is None and not any("aligned" in note for note in aligned.notes)
    plain = id_task((7, 5, 6)).on(wrapped("llama"))
    positions = torch.arange(7).expand(3, 7)
    forced = replace(plain, batch=replace(plain.batch, alignment=positions))
    for method in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "exact"):
        ordinary, gathered = (cf.attribute(wrapped("llama"), bound, method) for bound in (plain, forced))
        assert np.array_equal(ordinary.values, gathered.values), method
    runs = [prepared_for(wrapped("llama").adapter, bound.batch, "corrupted") for bound in (plain, forced)]
    masks = random_masks(wrapped("llama").graph)
    assert [prepared.interchange for prepared in runs] == [True, False]
    assert off(run_circuits(runs[1], masks), run_circuits(runs[0], masks)) < CLOSE


def test_pairs_of_equal_length_lose_their_alignment() -> None:
    spans = {"spans": [*CLEAN_SPANS[:2], {}], "corrupted_spans": [*CORRUPTED_SPANS[:2], {}]}
    bound = unequal_task(**spans).on(wrapped("gpt2"))
    assert bound.batch.alignment is not None and bound.subset([2]).batch.alignment is None
    assert bound.subset([0, 2]).batch.alignment.shape == (2, 7) and bound.subset([1]).batch.alignment.shape == (1, 6)


# -------------------------------------------------------------------- refused
def test_what_has_no_meaning_is_refused() -> None:
    model, bound = wrapped("gpt2"), unequal_task().on(wrapped("gpt2"))
    refused = "direction 'denoising' is not defined between prompts aligned by spans"
    for method in ("eap", "exact"):
        with pytest.raises(TaskError, match=refused):
            cf.attribute(model, bound, method, direction="denoising")
    for level in ("edge", "node"):
        with pytest.raises(TaskError, match=refused):
            cf.attribute(model, bound, "exact", level=level, direction="denoising")
    with pytest.raises(TaskError, match=refused):
        cf.patch(model, bound, what="heads", by_position=False, direction="denoising")
    with pytest.raises(TaskError, match="a corrupted pattern is not defined between"):
        cf.patch(model, bound, what="pattern", by_position=False)
    with pytest.raises(ScoreError, match="by_position=True needs prompts of one length"):
        cf.attribute(model, bound, "atp", level="node", by_position=True)
    one_length = bound.subset([2])
    for ablation in ("resample", "mean-position"):
        with pytest.raises(TaskError, match=f"ablation '{ablation}' is not defined between prompts aligned by spans"):
            cf.attribute(model, one_length, "eap", ablation=ablation)


def test_a_request_that_is_incomplete_is_refused() -> None:
    with pytest.raises(TaskError, match="align='spans' needs spans and corrupted_spans"):
        unequal_task(corrupted_spans=None)
    with pytest.raises(TaskError, match="align is 'left': use 'spans'"):
        unequal_task(align="left")
    with pytest.raises(TaskError, match=r"row 0: the clean prompt has 7 tokens.* give align='spans'"):
        unequal_task(align=None).on(wrapped("gpt2"))


# -------------------------------------------------------------------- text
CLEAN = ["When Mary and John went to the store, John gave a drink to", "Then Kate met Luke"]
CORRUPTED = ["When Mary and the old doctor went to the store, John gave a drink to", "Then Kate met Paul"]


@pytest.fixture(scope="module")
def english() -> cf.Model:
    return reader()


def text_task(**more: Any) -> cf.Task:
    spans = [{"who": "Mary and John"}, {}]
    others = [{"who": "Mary and the old doctor"}, {}]
    fields = {"metric": "kl", "spans": spans, "corrupted_spans": others, "align": "spans", **more}
    return cf.Task(CLEAN, CORRUPTED, **fields)


@pytest.mark.parametrize("bos", [None, True])
def test_words_of_several_tokens(english: cf.Model, bos: bool | None, tmp_path: Path) -> None:
    """Outside the span each token stands for the same token, and the span's last for the span's last."""
    bound = text_task(bos=bos).on(english)
    clean, corrupted, index = bound.batch.clean.ids[0], bound.batch.corrupted.ids[0], bound.batch.alignment[0]
    start, stop = bound.spans[0]["who"]
    length = int(bound.batch.clean.mask[0].sum())
    outside = [*range(start), *range(stop, length)]
    assert torch.equal(clean[outside], corrupted[index[outside]])
    assert english.tokenizer.decode([int(corrupted[index[stop - 1]])]).strip() == "doctor"
    assert "prompts aligned by spans: 1 of 2 pairs differ in length" in bound.notes
    again = cf.Task.from_file(text_task().save(tmp_path / "pairs.jsonl"), metric="kl", align="spans", bos=bos)
    assert torch.equal(again.on(english).batch.alignment, bound.batch.alignment)


def test_rows_that_cannot_be_aligned_are_left_out_on_request(english: cf.Model) -> None:
    task = text_task(corrupted_spans=[{}, {}], unusable="drop")
    with pytest.warns(UserWarning, match="1 of 2 pairs left out, such as row 0: the prompt has"):
        bound = task.on(english)
    assert bound.prompts == (CLEAN[1],) and bound.batch.alignment is None


def test_errors_name_the_side(english: cf.Model) -> None:
    with pytest.raises(TaskError, match="row 0: span 'who': 'Kate' occurs 0 times in the corrupted prompt"):
        text_task(corrupted_spans=[{"who": "Kate"}, {}]).on(english)


def test_the_command_line_takes_a_file_of_unequal_pairs(run: Run, tmp_path: Path) -> None:  # noqa: F811
    clean, corrupted = "Then Mary met Luke. Then Mary met", "Then Mary met her friend Anna. Then Mary met"
    spans = {"spans": [{"who": "Luke"}] * 2, "corrupted_spans": [{"who": "her friend Anna"}] * 2}
    task = cf.Task([clean] * 2, [corrupted] * 2, ["Luke"] * 2, ["Anna"] * 2, **spans)
    path = str(task.save(tmp_path / "pairs.jsonl"))
    found = run("attribute", "--data", path, "--align", "spans", "--method", "eap", "--json")
    assert found.code == 0
    notes = cf.Scores.open("circuitfind-out/scores.safetensors").record.settings["notes"]
    assert "prompts aligned by spans: 2 of 2 pairs differ in length" in notes
    refused = run("attribute", "--data", path, "--method", "eap")
    assert refused.code != 0 and "align='spans'" in " ".join(refused.err.split())
    refused = run("attribute", "--align", "spans")
    assert refused.code != 0 and "--align spans belongs to pairs of a file (--data)" in " ".join(refused.err.split())
