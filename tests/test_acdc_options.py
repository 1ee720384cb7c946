"""ACDC's options: dangling nodes, screening, thresholds as scores, edges without effect, and running out of memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_acdc import equal, literal, literal_masks, model_of as model_of, some_pairs, telling
from test_aligned_spans import unequal_task

import circuitfind as cf
from circuitfind.engine.revision import CircuitState
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.graph import Graph
from circuitfind.search import acdc as acdc_module
from circuitfind.search.acdc import acdc_scores
from circuitfind.search.acdc_rule import CUT_OFF, DANGLING, UNREACHED, SkipCheck, edges_in_order


def padded_pairs(seed: int = 0) -> cf.Task:
    """Four pairs of unequal lengths."""
    clean, corrupted = torch.randint(3, 128, (2, 4, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(7)[None] < torch.tensor([7, 5, 6, 7])[:, None]
    answers = list(range(3, 7)), list(range(20, 24))
    return cf.Task(clean * mask, corrupted * mask, *answers, attention_mask=mask.long())


# -------------------------------------------------------------------- dangling nodes
def without_inputs(model: cf.Model, mask: np.ndarray) -> set[int]:
    """The nodes that no kept edge leads to; a norm after attention ties a layer's heads to each other's inputs."""
    graph, coupled = model.graph, model.adapter.family.post_attn_norm is not None
    found = set()
    for node in range(1, graph.n_writers):
        layer = graph.layer_of(node)
        tied = list(range(*graph.heads(layer).indices(graph.n_writers))) if coupled else []
        nodes = tied if node in tied else [node]
        readers = [r for r in range(graph.n_readers) if any(graph.serves[r, other] for other in nodes)]
        if not mask[:, readers].any():
            found.add(node)
    return found


def literal_dangling(
    model: cf.Model, task: cf.Task, threshold: float, edges: list, tested: bool, absolute: bool = False, **options
) -> tuple[np.ndarray, float, int, dict]:
    """The textbook loop, and after each removal the edges of nodes that it left without inputs, breadth first.

    Returns what is left, its metric, how many dangling edges went, and the effect of every edge tried.
    """
    evaluator, mask = Evaluator.of(model, task, **options), model.graph.real.copy()
    metric = lambda: float(evaluator.run(mask[None]).metric[0].mean())  # noqa: E731
    current, removed, effects = metric(), 0, {}

    def attempt(edge: tuple[int, int], anyway: bool = False) -> list[int]:
        """Removes an edge if it may go, and says which nodes that has left without inputs."""
        nonlocal current
        before = without_inputs(model, mask)
        mask[edge] = False
        after = metric()
        effect = current - after
        effects[edge] = effect = 0.0 if abs(effect) < 5e-7 else effect  # rounding around an effect of exactly 0
        if not anyway and not (abs(effect) if absolute else effect) < threshold:
            mask[edge] = True
            return []
        current = after
        return sorted(without_inputs(model, mask) - before)

    for edge in edges:
        pending = attempt(edge) if mask[edge] else []
        while pending:
            node = pending.pop(0)
            for reader in np.flatnonzero(mask[node]):
                pending += attempt((node, int(reader)), anyway=not tested)
                removed += not mask[node, reader]
    return mask, current, removed, effects


@pytest.mark.parametrize(
    ("name", "how"), (("gpt2", "tested"), ("llama", "untested"), ("gpt_neox", "tested"), ("gemma2", "untested"))
)
def test_dangling_nodes_go_as_in_the_literal_loop(name, how, model_of):
    model, task = model_of(name), some_pairs()
    edges, threshold = edges_in_order(model.graph, "reverse-topological-shuffled", 1), 3 * telling(model, task)
    mask, current, removed, _ = literal_dangling(model, task, threshold, edges, how == "tested")
    options = {"metric": None, "order": "reverse-topological-shuffled", "seed": 1}
    plain = cf.acdc(model, task, threshold, **options)
    for at_once in (1, 4):
        circuit = cf.acdc(model, task, threshold, remove_dangling=how, side_by_side=at_once, **options)
        equal(circuit, mask)
        assert circuit.facts["metric"] == pytest.approx(current, abs=2e-5)
        assert circuit.facts["without_a_run"].get(DANGLING, 0) == removed
        assert not circuit.mask[sorted(without_inputs(model, circuit.mask))].any()
    assert (removed > 0) == (plain != circuit), "an interchanged dangling node has no other influence"


@pytest.mark.parametrize(
    ("ablation", "absolute", "factor"), (("zero", False, 24), ("zero", True, 24), ("mean", False, 3))
)
def test_dangling_nodes_are_tested_where_they_still_carry_something(ablation, absolute, factor, model_of):
    model, task = model_of("gpt2"), padded_pairs(2)
    edges = edges_in_order(model.graph, "shuffled", 1)
    threshold = factor * telling(model, task, ablation=ablation)
    mask, current, removed, _ = literal_dangling(model, task, threshold, edges, True, absolute, ablation=ablation)
    options = {"order": "shuffled", "seed": 1, "ablation": ablation, "absolute": absolute, "batch_size": 3}
    circuit = cf.acdc(model, task, threshold, metric=None, remove_dangling="tested", **options)
    equal(circuit, mask)
    plain = cf.acdc(model, task, threshold, metric=None, **options)
    assert removed and circuit.facts["trials_run"] > plain.facts["trials_run"], "their effects are not known to be 0"
    assert circuit.facts["metric"] == pytest.approx(current, abs=2e-5)
    assert circuit.record.settings["remove_dangling"] == "tested"
    with pytest.raises(cf.ScoreError, match=rf"'{ablation}' .* use remove_dangling='tested'"):
        cf.acdc(model, task, ablation=ablation, remove_dangling="untested")


@pytest.mark.parametrize("at_once", (1, 4, 64))
def test_dangling_nodes_go_before_the_next_edge_and_in_their_order(at_once, model_of):
    """One head feeds another head and an MLP alone: it dangles, then those two, between edges tried side by side."""
    model, task = model_of("gpt2", None), padded_pairs(1)
    graph = model.graph
    fed = [name for name in graph.reader_names if name.startswith("a1.h0") or name == "m1"]
    others = [
        e for e in graph.names(graph.real) if e.split("->")[1] in fed and e not in ("a0.h1->a1.h0<q>", "a0.h1->m1")
    ]
    names = [*others, *(f"input->a0.h1<{kind}>" for kind in "qkv"), "input->logits", "m0->logits", "a0.h0->logits"]
    edges = [graph.edge(name) for name in names]
    mask, _, removed, effects = literal_dangling(model, task, 1e6, edges, True, ablation="zero")
    assert removed > 10 and {graph.edge(f"{writer}->logits") for writer in ("a1.h0", "m1")} <= set(effects)
    options = {"ablation": "zero", "metric": None, "order": names, "remove_dangling": "tested"}
    circuit = cf.acdc(model, task, 1e6, side_by_side=at_once, **options)
    equal(circuit, mask)
    for edge, effect in effects.items():
        assert circuit.exact[edge] == pytest.approx(effect, abs=2e-5), graph.edge_name(*edge)


def test_aligned_pairs_are_no_interchange(model_of):
    """Prompts of unequal length: a node without inputs is not what it is in the corrupted run."""
    model, task = model_of("llama"), unequal_task()
    edges = edges_in_order(model.graph, "reverse-topological")
    mask, _ = literal(model, task, 0.02, edges)
    circuit = cf.acdc(model, task, 0.02, metric=None)
    equal(circuit, mask)
    assert set(circuit.facts["without_a_run"]) == {CUT_OFF}
    with pytest.raises(cf.ScoreError, match=r"'corrupted' of aligned pairs .* use remove_dangling='tested'"):
        cf.acdc(model, task, remove_dangling="untested")


def test_untested_removal_asks_no_rule(model_of):
    """Under a metric that rises with every run all that is tested goes at threshold 0; an effect of 0 stays, tested."""
    model, task = model_of("gpt2", None), some_pairs()
    found = {}
    for how in (None, "tested", "untested"):
        rising = itertools.count()
        metric = lambda logits, batch, rising=rising: torch.full((len(batch),), float(next(rising)))  # noqa: E731
        order = [f"input->a0.h2<{kind}>" for kind in "qkv"]
        found[how] = cf.acdc(model, task, 0.0, metric=metric, order=order, remove_dangling=how, side_by_side=1)
    head = model.graph.writer("a0.h2")
    assert found["tested"] == found[None] and np.array_equal(found[None].mask[head], model.graph.real[head])
    assert not found["untested"].mask[head].any()
    assert len(found[None]) == model.graph.n_edges - 3 == len(found["untested"]) + model.graph.real[head].sum()
    assert found["untested"].facts["metric"] == found[None].facts["metric"]
    with pytest.raises(cf.ScoreError, match="remove_dangling='always' is unknown: use None, 'tested' or 'untested'"):
        cf.acdc(model, task, remove_dangling="always")


# -------------------------------------------------------------------- edges without effect
@pytest.mark.parametrize(
    ("name", "order", "why"),
    [
        ("gpt_neox", "reverse-topological-earliest", CUT_OFF),
        ("gemma2", "reverse-topological-earliest", CUT_OFF),
        ("gpt2", "shuffled", UNREACHED),
        ("llama", "shuffled", UNREACHED),
    ],
)
def test_edges_decided_without_a_run_have_no_effect(name, order, why, model_of):
    model, task = model_of(name, None if name == "llama" else 2), padded_pairs()
    edges, threshold = edges_in_order(model.graph, order, 1), 32 * telling(model, padded_pairs())
    mask, effects = literal(model, task, threshold, edges)
    circuit = cf.acdc(model, task, threshold, metric=None, order=order, seed=1)
    equal(circuit, mask)
    reasons = circuit.facts["without_a_run"]
    assert reasons[why] and sum(reasons.values()) == circuit.facts["decided_without_a_run"]
    assert circuit.facts["trials_run"] + circuit.facts["decided_without_a_run"] == model.graph.n_edges
    idle = [edge for edge in edges if circuit.exact[edge] == 0]
    assert len(idle) >= circuit.facts["decided_without_a_run"], "and what was measured to be exactly 0"
    assert max(abs(effects[edge]) for edge in idle) < 1e-6


def test_a_writer_without_inputs_still_carries_something_under_zero_ablation(model_of):
    model, task = model_of("llama", None), some_pairs(2)
    threshold = 32 * telling(model, task, ablation="zero")
    edges = edges_in_order(model.graph, "shuffled", 1)
    mask, _ = literal(model, task, threshold, edges, ablation="zero")
    circuit = cf.acdc(model, task, threshold, metric=None, order="shuffled", seed=1, ablation="zero")
    equal(circuit, mask)
    assert UNREACHED not in circuit.facts["without_a_run"]


def test_states_computed_anew_change_no_decision(model_of, monkeypatch):
    model, task = model_of("gemma2"), padded_pairs(1)
    threshold = telling(model, task)
    whole = cf.acdc(model, task, threshold, metric=None)
    monkeypatch.setattr("circuitfind.search.acdc_pruning.RUNS_BETWEEN_STATES", 5)
    often = cf.acdc(model, task, threshold, metric=None)
    equal(often, whole.mask)
    np.testing.assert_allclose(often.exact, whole.exact, atol=1e-5)


# -------------------------------------------------------------------- screening
def estimates(model: cf.Model, task: cf.Task, **settings: object) -> cf.Scores:
    """Estimates that are far off for every seventh edge."""
    scores = cf.attribute(model, task, "exact", **settings)
    values = scores.values.copy()
    values[:, ::7] *= 1e-6
    return replace(scores, values=values)


def literal_screened(
    model: cf.Model, task: cf.Task, threshold: float, edges: Iterable, screened: np.ndarray
) -> tuple[np.ndarray, dict]:
    """The textbook loop in which screened edges go, and what each of them would have measured at that moment."""
    evaluator, mask = Evaluator.of(model, task), model.graph.real.copy()
    metric = lambda: float(evaluator.run(mask[None]).metric[0].mean())  # noqa: E731
    current, skipped = metric(), {}
    for edge in edges:
        mask[edge] = False
        after = metric()
        if screened[edge]:
            skipped[edge], current = current - after, after
        elif current - after < threshold:
            current = after
        else:
            mask[edge] = True
    return mask, skipped


def test_screened_edges_go_untested_and_are_checked_exactly(model_of):
    model, task = model_of("llama"), padded_pairs()
    scores, threshold = estimates(model, task), telling(model, task)
    screened = (np.abs(scores.values) < 0.5 * threshold) & model.graph.real
    order = edges_in_order(model.graph, "shuffled", 4)
    mask, skipped = literal_screened(model, task, threshold, order, screened)
    circuit = cf.acdc(model, task, threshold, metric=None, order="shuffled", seed=4, screen=0.5, scores=scores)
    equal(circuit, mask)
    facts = circuit.facts["screening"]
    assert circuit.record.settings["screen"] == 0.5
    assert facts["skipped"] == circuit.facts["without_a_run"]["screened"] > facts["runs"] > 0
    checked = {edge for edge in skipped if circuit.exact[edge] == circuit.exact[edge] != 0}
    for edge in checked:
        assert circuit.exact[edge] == pytest.approx(skipped[edge], abs=1e-5)
    assert facts["checked"] == min(100, facts["skipped"]) and len(checked) <= facts["checked"]
    wrong = {model.graph.edge(row["edge"]) for row in facts["wrong"]}
    assert wrong == {edge for edge in checked if skipped[edge] >= threshold} and wrong
    assert facts["rate"] == len(wrong) / facts["checked"]
    assert facts["interval"][0] <= facts["rate"] <= facts["interval"][1]


def test_screening_is_off_by_default_and_compares_estimates_of_the_same_effects(model_of):
    model, task = model_of("gpt2"), some_pairs()
    scores = cf.attribute(model, task, "eap-ig-inputs")
    plain = cf.acdc(model, task, 0.01, scores=scores)
    assert plain.record.settings["screen"] is None and "screening" not in plain.facts
    given = cf.acdc(model, task, screen=0.1, scores=cf.attribute(model, task, "eap-ig-inputs", metric="kl"))
    assert cf.acdc(model, task, screen=0.1) == given
    with pytest.raises(cf.ScoreError, match="screen= needs scores="):
        cf.acdc(model, task, screen=0.1, scores=cf.attribute(model, task, "weights"))
    with pytest.raises(cf.ScoreError, match="needs ablation='corrupted'"):
        cf.acdc(model, task, screen=0.1, ablation="zero")
    with pytest.raises(cf.ScoreError, match="with metric 'logit_diff', but acdc tries edges with 'kl'"):
        cf.acdc(model, task, screen=0.1, scores=scores)
    with pytest.raises(cf.ScoreError, match="with ablation 'corrupted', but acdc tries edges with 'zero'"):
        cf.acdc(model, task, screen=0.1, scores=scores, metric=None, ablation="zero")
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(cf.ScoreError, match="is not a fraction of the threshold"):
            cf.acdc(model, task, screen=factor, scores=scores, metric=None)


def test_the_rate_of_wrong_skips_has_wilsons_interval():
    edges = [(0, reader) for reader in range(20)]
    none, half = (SkipCheck(1000, dict.fromkeys(edges[:10], 0.0), tuple(edges[:k])) for k in (0, 5))
    assert none.interval == pytest.approx((0, 0.27754), abs=1e-4)
    assert half.interval == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert SkipCheck(10, dict.fromkeys(edges[:10], 0.0), (edges[0],)).interval == (0.1, 0.1), "all were measured"
    assert SkipCheck(0, {}, ()).facts(None) == {"skipped": 0, "checked": 0, "wrong": []}  # type: ignore[arg-type]


# -------------------------------------------------------------------- thresholds as scores
@pytest.mark.parametrize(("name", "absolute", "factors"), (("gpt2", False, (0.2, 1, 4)), ("llama", True, (1, 4))))
def test_scores_are_the_smallest_thresholds_at_which_edges_go(name, absolute, factors, model_of):
    model, task = model_of(name), some_pairs()
    middle = telling(model, task)
    grid = [float(np.float32(middle * factor)) for factor in factors]
    scores = acdc_scores(model, task, grid, metric=None, absolute=absolute)
    edges = edges_in_order(model.graph, "reverse-topological")
    masks = literal_masks(model, task, grid, edges, absolute)
    beyond = scores.record.settings["beyond"]
    assert beyond == pytest.approx(16 * middle) and 0 < masks[-1].sum() < masks[0].sum() < model.graph.n_edges
    for edge in edges:
        gone = [threshold for threshold, mask in zip(grid, masks, strict=True) if not mask[edge]]
        assert scores.values[edge] == np.float32(min([*gone, beyond]))
    settings = scores.record.settings
    assert settings["thresholds"] == grid and settings["kept"] == [mask.sum() for mask in masks]
    cuts = [scores.threshold(t, prune=False).mask for t in (*grid[1:], beyond)]
    assert settings["differ"] == [int((a != b).sum()) for a, b in zip(cuts, masks, strict=True)]
    assert np.array_equal(cuts[0], masks[0]), "above the first threshold are the edges that its run kept"
    assert not scores.record.is_effect


def test_kept_sets_that_are_not_nested_are_reported(model_of):
    """Here one edge goes at the first threshold and stays at the second."""
    grid = np.geomspace(3e-5, 3e-2, 13)[6:9].tolist()
    scores = acdc_scores(model_of("gpt2", None), some_pairs(1), grid, metric=None)
    first, second = (cf.acdc(model_of("gpt2", None), some_pairs(1), t, metric=None) for t in grid[:2])
    assert len(second - first) == 1 and scores.record.settings["differ"] == [0, 1, 0]
    assert scores[(second - first).edges[0]] == np.float32(grid[0])


def test_grids_that_do_not_rise_are_refused(model_of):
    model, task = model_of("gpt2"), some_pairs()
    for grid in ([], [0.0, 1], [0.1, 0.1], [0.2, 0.1], [float("nan")], ["a"]):
        with pytest.raises(cf.ScoreError, match="give positive numbers in ascending order"):
            acdc_scores(model, task, grid)
    one = acdc_scores(model, task, [0.5], metric=None)
    assert one.record.settings["beyond"] == 5 and set(one.values[model.graph.real].tolist()) <= {0.5, 5}


def test_no_threshold_and_no_number_of_trials_are_refused(model_of):
    model, task = model_of("gpt2"), some_pairs()
    for threshold in (float("nan"), "0.1", None):
        with pytest.raises(cf.ScoreError, match=f"threshold={threshold!r} is not a threshold"):
            cf.acdc(model, task, threshold)  # type: ignore[arg-type]
    with pytest.raises(cf.ScoreError, match="side_by_side=0: give a whole number, 1 or more"):
        cf.acdc(model, task, side_by_side=0)


def test_scores_of_nodes_are_refused(model_of):
    model, task = model_of("gpt2"), some_pairs()
    nodes = cf.attribute(model, task, "atp", level="node")
    for options in ({"order": "scores"}, {"screen": 0.1}):
        with pytest.raises(cf.ScoreError, match=r"needs scores=: .*edge"):
            cf.acdc(model, task, 0.01, metric=None, scores=nodes, **options)


# -------------------------------------------------------------------- memory
def test_running_out_of_memory_costs_a_warning_only(model_of, monkeypatch):
    model, task = model_of("llama"), some_pairs(n=6)
    threshold, attempt, sizes = telling(model, task), CircuitState.attempt, []
    names = [model.graph.edge_name(*edge) for edge in edges_in_order(model.graph, "reverse-topological")[:30]]
    options = {"metric": None, "order": names, "side_by_side": 4}
    whole = cf.acdc(model, task, threshold, **options)

    def tight(state: CircuitState, removals: list) -> torch.Tensor:
        sizes.append((len(removals), len(state.prepared.batch)))
        if len(removals) * len(state.prepared.batch) > 2:
            raise torch.OutOfMemoryError
        return attempt(state, removals)

    monkeypatch.setattr(CircuitState, "attempt", tight)
    with pytest.warns(UserWarning) as warned:
        circuit = cf.acdc(model, task, threshold, **options)
    equal(circuit, whole.mask)
    assert {str(w.message) for w in warned} >= {
        "out of memory: going on with batches of 3",
        "out of memory: going on with batches of 1",
        "out of memory: going on with 2 trials side by side",
    }
    assert sizes[-1] in ((1, 1), (2, 1)) and 0 < sum(circuit.mask[model.graph.edge(name)] for name in names) < 30
    monkeypatch.setattr(CircuitState, "attempt", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.warns(UserWarning), pytest.raises(cf.ModelError, match="out of memory on cpu with a batch of 1 pair"):
        cf.acdc(model, task, threshold, metric=None)


def test_pairs_that_cannot_fit_are_refused_before_anything_runs(model_of, monkeypatch):
    monkeypatch.setattr(acdc_module, "obtainable", lambda device: 1000)
    with pytest.raises(cf.TaskError, match=r"ACDC holds the runs of all 4 pairs, .* give fewer or shorter pairs"):
        cf.acdc(model_of("gpt2"), some_pairs())
    assert isinstance(model_of("gpt2").graph, Graph)
