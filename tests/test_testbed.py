"""The testbed: models do their task, their truths hold under exact patching, and a wrong truth is noticed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.testbed import Blueprint, Drawing, Known, Offset, build, names, prove
from circuitfind.testbed.trained import SUFFIX, folder_of

COUNTS = {  # of true edges, counted by hand
    "induction": 5,
    "saturated": 5,
    "ioi": 9,
    "ioi-negative": 13,
    "ioi-backup": 14,
    "backup": 5,
    "and": 5,
    "or": 5,
    "cancelling": 8,
    "copy-suppression": 6,
    "greater-than": 3,
    "frac-prevs": 3,
    "histogram": 4,
    "reverse": 3,
    "sort": 4,
}
TRAINED = [("induction-trained", "gpt2"), ("or-trained", "gpt2"), ("greater-than-trained", "llama")]
OTHERS = [("induction", "gpt2", "real"), ("cancelling", "gpt2", "real"), ("ioi", "llama", "identity")]
OTHERS += [("or", "llama", "identity"), ("copy-suppression", "llama", "identity")]


def accuracy(known: Known) -> float:
    return cf.summarise(known.model, known.task).accuracy


def test_every_circuit_is_counted() -> None:
    assert {*COUNTS, *(name for name, form in TRAINED if form == "gpt2")} == set(names())
    both = {*COUNTS} - {"reverse", "sort"}
    assert {*both, *(name for name, form in TRAINED if form == "llama")} == set(names("llama"))


@pytest.mark.parametrize(("name", "form", "norm"), [*((name, "gpt2", "identity") for name in COUNTS), *OTHERS])
def test_truth(name: str, form: str, norm: str) -> None:
    known = build(name, n=32, form=form, norm=norm)
    assert len(known.truth) == COUNTS[name]
    assert accuracy(known) == 1
    proof = prove(known, 4)
    assert proof.weakest[0] >= 0.02
    assert proof.strongest[0] <= (5e-3 if norm == "real" else 1e-5)


@pytest.mark.parametrize(("name", "form"), TRAINED)
def test_trained(name: str, form: str) -> None:
    known, drawn = (build(one, n=200, seed=7, form=form) for one in (name, name.removesuffix(SUFFIX)))
    assert known.truth.edges == drawn.truth.edges
    assert known.task.clean == drawn.task.clean
    assert accuracy(known) >= 0.98
    proof = prove(known, 16)
    assert proof.weakest[0] >= 0.02
    assert 1e-5 < proof.strongest[0] <= known.inert == 0.01  # not as clean as a compiled one
    kind, norms = {"gpt2": ("GPT2LMHeadModel", 1e-5), "llama": ("LlamaForCausalLM", 1e-6)}[form]
    assert type(known.model.hf).__name__ == kind
    assert norms in (getattr(known.model.config, key, None) for key in ("layer_norm_epsilon", "rms_norm_eps"))
    assert (folder_of(name.removesuffix(SUFFIX), form) / "model.safetensors").stat().st_size < 1_000_000


def test_what_stands_in_shows_only_where_the_other_path_is_cut() -> None:
    known = build("or", n=8)
    with pytest.raises(cf.ScoreError, match=r"ablating the true edge \S+ changes the metric by 0.00%"):
        prove(replace(known, contexts=((),)))


@pytest.mark.parametrize("edge", ["input->a1.h0<q>", "a1.h1->logits"])
def test_a_wrong_truth_is_noticed(edge: str) -> None:
    """One true edge less, or an edge more that does nothing."""
    known = build("induction", n=8)
    changed = known.truth.mask ^ known.truth.graph.mask([edge])
    with pytest.raises(cf.ScoreError, match=edge.replace("<", ".").replace(">", ".")):
        prove(replace(known, truth=known.truth.with_mask(changed)))


def test_distractors_carry_differences() -> None:
    """What is not in the circuit is not idle: it writes other things after the corrupted prompts."""
    known = build("ioi", n=8)
    bound = known.task.on(known.model)
    with torch.no_grad():
        written = []
        block = known.model.hf.transformer.h[1]
        hook = block.mlp.register_forward_hook(lambda *args: written.append(args[2]))
        for side in (bound.batch.clean, bound.batch.corrupted):
            known.model.hf(side.ids)
        hook.remove()
    assert (written[0] - written[1]).abs().max() > 0.1
    assert "m1" not in known.truth.nodes


@pytest.mark.parametrize(("edges", "proved"), [(10, True), (60, True), (1000, False)])
def test_layered(edges: int, proved: bool) -> None:
    known = build(f"layered-{edges}", n=16)
    assert len(known.truth) == edges == len(known.truth.connected())
    assert accuracy(known) == 1
    if proved:
        prove(known, 4)
    scores = np.abs(cf.attribute(known.model, known.task, method="eap").values)
    truth = known.truth.mask
    assert scores[truth].min() > 100 * scores[~truth].max()


def test_a_seed_decides() -> None:
    first, again, other = (build("layered-30", n=8, seed=seed) for seed in (0, 0, 1))
    assert first.task == again.task
    for one, same in zip(first.model.hf.parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(one, same)
    assert (first.truth.mask.shape != other.truth.mask.shape) or (first.truth.mask != other.truth.mask).any()


def test_a_drawing_of_ones_own() -> None:
    plan = Blueprint(["<s>", "a", "b", "c"], 3, heads=2)
    plan.head(0, [Offset(1)], plan.word(), {plan.output: 5})

    def draw(rng: random.Random) -> cf.Pair:
        right, wrong = rng.sample("abc", 2)
        return cf.Pair(f"{right} {right}", f"{wrong} {wrong}", (right,), (wrong,), flips=True)

    known = build(Drawing(plan, draw), n=6)
    assert known.truth.edges == ["input->a0.h0<v>", "a0.h0->logits"]
    prove(known)
    assert cf.agreement(cf.attribute(known.model, known.task), known.reference).auroc == 1


def test_wrong_input() -> None:
    with pytest.raises(cf.ScoreError, match="'xor' is unknown: did you mean 'or'"):
        build("xor")
    with pytest.raises(cf.ScoreError, match="10 to 10,000 edges, not 5"):
        build("layered-5")
    for call in (lambda: build("or", form="gpt3"), lambda: names("gpt3")):
        with pytest.raises(cf.ScoreError, match="testbed form 'gpt3' is unknown"):
            call()
    with pytest.raises(cf.ScoreError, match="testbed circuit 'sort-trained' is unknown"):
        build("sort-trained")
    with pytest.raises(cf.ScoreError, match="testbed norm"):
        build("or", norm="none")
    with pytest.raises(cf.ScoreError, match="norm='real' is for form='gpt2'"):
        build("or", form="llama", norm="real")
    with pytest.raises(cf.ScoreError, match=r"a0\.h0 reads positions"):
        build("reverse", form="llama")
    with pytest.raises(cf.ScoreError, match="layer 0 has only 1 heads"):
        plan = Blueprint(["<s>", "a"], 2, heads=1)
        for _ in range(2):
            plan.head(0, [], plan.word(), {plan.output: 1})
    with pytest.raises(cf.ScoreError, match="a variable 'token' already"):
        Blueprint(["<s>", "a"], 2).variable("token")
