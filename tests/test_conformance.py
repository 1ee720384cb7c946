"""Against the field's reference results, and on the three trained models of the folder `shared`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import off_scores

import circuitfind as cf
from circuitfind.graph import Graph

pytestmark = pytest.mark.shared


# -------------------------------------------------------------------- the EAP-IG library's files
@pytest.fixture(scope="module")
def gpt2_tiny(shared: Path) -> cf.Model:
    return cf.load(str(shared / "conformance/gpt2-tiny"), dtype="float32")


@pytest.fixture(scope="module")
def eight_pairs(shared: Path) -> cf.Task:
    content = json.loads((shared / "conformance/gpt2-tiny/data_n8.json").read_text())
    ids = {side: torch.tensor(content[side]) for side in ("clean", "corrupted")}
    return cf.Task(**ids, answers=content["answer"], wrong_answers=content["wrong"])


def reference(shared: Path, name: str, graph: Graph) -> torch.Tensor:
    """`[writers, readers]` effects of a file: minus its changes of the metric."""
    content = json.loads((shared / f"conformance/eap-ig/tiny_n8_{name}.json").read_text())
    changes = content.get("scores", content)
    assert sorted(changes) == sorted(graph.names(graph.real))
    matrix = torch.zeros(graph.n_writers, graph.n_readers, dtype=torch.float64)
    for name, change in changes.items():
        matrix[graph.edge(name)] = -change
    return matrix


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("EAP", "eap"),
        ("EAP-IG-inputs5", "eap-ig-inputs"),  # steps=5 and rule="left" are the defaults
        ("EAP-IG-activations5", "eap-ig-activations"),
        ("clean-corrupted", "clean-corrupted"),
        ("exact", "exact"),
    ],
)
def test_reference_scores(gpt2_tiny: cf.Model, eight_pairs: cf.Task, shared: Path, file: str, method: str) -> None:
    scores = cf.attribute(gpt2_tiny, eight_pairs, method)
    assert off_scores(scores, reference(shared, file, gpt2_tiny.graph)) < 1e-5
    assert len(scores.to_dict()) == 479


def test_reference_metric(gpt2_tiny: cf.Model, eight_pairs: cf.Task) -> None:
    evaluation = cf.evaluate(gpt2_tiny, eight_pairs, [])
    assert evaluation.metric_full == pytest.approx(6.15096, abs=1e-5)
    assert evaluation.metric_empty == evaluation.metric == pytest.approx(-3.45859, abs=1e-5)


# -------------------------------------------------------------------- a language model: gendered pronouns
PEOPLE = [("Lily", "Tim"), ("a girl", "a boy"), ("Mia", "Max"), ("Lucy", "Jack")]  # of equal token length
PLACES = ["{} was happy.", "One day, {} went to the park.", "Once upon a time, there was {}."]


@pytest.fixture(scope="module")
def stories(shared: Path) -> cf.Model:
    return cf.load(str(shared / "models/stories260K"))


@pytest.fixture(scope="module")
def pronouns(stories: cf.Model, tmp_path_factory: pytest.TempPathFactory) -> cf.Task:
    """24 pairs through a jsonl file."""
    rows = []
    for place in PLACES:
        for people in PEOPLE:
            she, he = (place.format(person) for person in people)
            she, he = she[0].upper() + she[1:], he[0].upper() + he[1:]
            rows.append({"clean": she, "corrupted": he, "answer": "She", "wrong": "He"})
            rows.append({"clean": he, "corrupted": she, "answer": "He", "wrong": "She"})
    path = tmp_path_factory.mktemp("data") / "pronouns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cf.Task.from_file(path, stories)


def test_the_language_model_does_pronouns(stories: cf.Model, pronouns: cf.Task) -> None:
    summary = cf.summarise(stories, pronouns)
    assert (summary.n, summary.accuracy, summary.lowered) == (24, 1.0, 1.0)
    assert summary.clean == pytest.approx(-summary.corrupted, rel=1e-4) and summary.clean > 3  # every pair both ways
    assert pronouns.on(stories).batch.clean.padded


def test_estimates_beside_the_exact_effects_of_all_edges(stories: cf.Model, pronouns: cf.Task) -> None:
    some, real = pronouns.on(stories).subset(range(8, 16)), stories.graph.real  # of one place: four times two ways
    exact = cf.attribute(stories, some, "exact")
    assert len(exact) == real.sum() == 1701
    for method, least in (("eap", 0.8), ("eap-ig-inputs", 0.95)):
        estimates = cf.attribute(stories, some, method)
        assert least < np.corrcoef(estimates.values[real], exact.values[real])[0, 1] <= 1, method
    checks = cf.verify(stories, some, estimates, top=40, random=2)
    for check in checks.edges:
        assert check.exact == pytest.approx(exact[check.name], abs=1e-4)


def test_a_circuit_for_pronouns(stories: cf.Model, pronouns: cf.Task) -> None:
    result = cf.find(stories, pronouns, random=5)
    facts = result.circuit.facts
    assert 0 < len(result.circuit) < 300 and result.circuit == result.circuit.connected()
    assert abs(1 - facts["faithfulness_on_search_pairs"]) <= 0.15
    assert 0.6 < result.checks.faithfulness < 1.3 and result.checks.beaten == 5
    assert result.checks.correlation > 0.9
    values = {edge.partition("->")[2] for edge in result.circuit.edges}
    assert any(".kv" in reader for reader in values), "grouped key/value heads are readers of their own"


# -------------------------------------------------------------------- textbook induction
def induction(pairs: int) -> cf.Task:
    """`... q b ... u c ... q`: b follows. In the corrupted prompt q and u have changed places, so c does.

    Tokens stand at positions 1 to 6 once each (the model is unreliable about what follows position 0).
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    while len(rows) < pairs:
        words, places = torch.randperm(26, generator=generator)[:7], torch.randperm(5, generator=generator)[:2] + 1
        here, there = places.tolist()
        if abs(here - there) > 1:
            clean = torch.cat([words, words[here : here + 1]])
            corrupted = clean.clone()
            corrupted[[here, there]] = clean[[there, here]]
            rows.append((clean, corrupted, int(clean[here + 1]), int(clean[there + 1])))
    clean, corrupted, answers, wrong = zip(*rows, strict=True)
    return cf.Task(torch.stack(clean), torch.stack(corrupted), answers, wrong, name="induction")


def test_the_textbook_circuit_is_found(shared: Path) -> None:
    model, task = cf.load(str(shared / "models/induction_2x1")), induction(48)
    assert model.tokenizer is None and cf.summarise(model, task).accuracy == 1
    result = cf.find(model, task)
    assert result.circuit.edges == ["input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"]
    assert result.checks.faithfulness == pytest.approx(1, abs=0.01)

    exact = cf.attribute(model, task, "exact")
    dummies = [edge for edge in exact.to_dict() if ".h1" in edge or "m0" in edge or "m1" in edge]
    assert len(dummies) > 20 and max(abs(exact[edge]) for edge in dummies) < 1e-3 < 100 < exact["a0.h0->a1.h0<k>"]
    # saturated attention: the gradient at the clean run misses the very edge that integrated gradients find
    eap, integrated = (cf.attribute(model, task, method)["a0.h0->a1.h0<k>"] for method in ("eap", "eap-ig-inputs"))
    assert eap < 0.01 * integrated


def test_zero_ablating_an_induction_head_destroys_it(shared: Path) -> None:
    model, task = cf.load(str(shared / "models/induction_2x1")), induction(48)
    graph = model.graph
    for head, expected in (("a0.h0", 0), ("a1.h0", 0), ("a0.h1", 1), ("a1.h1", 1)):
        mask = graph.real.copy()
        mask[graph.writer(head)] = False
        evaluation = cf.evaluate(model, task, cf.Circuit(graph, mask), ablation="zero")
        assert evaluation.faithfulness == pytest.approx(expected, abs=0.02), head
        assert evaluation.accuracy == 1 if expected else evaluation.accuracy < 0.7  # half is chance


# -------------------------------------------------------------------- sorting: six answer positions
def sorting(pairs: int) -> cf.Task:
    """Six letters and the first five of them sorted; each sorted letter is an answer at the position before it."""
    letters = torch.randint(3, (2, pairs, 6), generator=torch.Generator().manual_seed(0))
    ordered = letters.sort(-1).values
    clean, corrupted = torch.cat([letters, ordered[..., :5]], dim=-1)
    wrong = torch.stack([(ordered[0] + 1) % 3, (ordered[0] + 2) % 3], dim=-1)
    return cf.Task(clean, corrupted, ordered[0], wrong, positions=torch.arange(5, 11).expand(pairs, 6), name="sorting")


def test_six_answer_positions(shared: Path) -> None:
    model, task = cf.load(str(shared / "models/sort_3x3")), sorting(24)
    summary = cf.summarise(model, task)
    assert (summary.accuracy, summary.top1) == (1, 1)
    bound = task.on(model)
    assert bound.batch.clean.read.shape == (24, 6) and bound.batch.wrong.shape == (24, 6, 2)
    result = cf.find(model, bound, random=3)
    assert abs(1 - result.circuit.facts["faithfulness_on_search_pairs"]) <= 0.15
    assert 0.6 < result.checks.faithfulness < 1.3

    # the metric averages the positions: so do the effects
    exact = cf.attribute(model, bound, "exact").values
    alone = []
    for at in range(6):
        one = cf.Task(task.clean, task.corrupted, task.answers[:, at], task.wrong_answers[:, at], positions=at + 5)
        alone.append(cf.attribute(model, one, "exact").values)
    np.testing.assert_allclose(np.mean(alone, axis=0), exact, atol=1e-5 * np.abs(exact).max())
