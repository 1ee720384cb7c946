"""What people hand in by mistake: one line that names the offending thing and the remedy, never a bare traceback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from safetensors.numpy import save_file
from test_circuit import GROUPED, PLAIN
from test_scores import random_scores
from test_task import IOI, TWINS, pairs_of_ids, pairs_of_text
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.circuit import as_circuit
from circuitfind.engine.experiment import bind
from circuitfind.errors import CircuitfindError, FileError, ModelError, ScoreError, TaskError
from circuitfind.graph import Graph
from circuitfind.models import tiny
from circuitfind.scores import NodeScores, Scores
from circuitfind.tasks.spelling import Spelled


def refused(make: Callable[[], Any], kind: type[CircuitfindError], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def embedded() -> cf.Model:
    return cf.load("tiny", check=False)


# -------------------------------------------------------------------- a model and a task that meet
def test_bind_takes_tasks_and_bound_tasks() -> None:
    model = wrapped("gpt2")
    bound = bind(model, id_task())
    assert bound.model == model.name and bound.vocabulary == model.vocabulary
    assert bind(model, bound) is bound and bind(model, bound.subset([0])).model == model.name


def test_bind_refuses_what_is_no_model() -> None:
    task = id_task()
    refused(lambda: bind("tiny", task), ModelError, r"model is the text 'tiny': load it: cf\.load\('tiny'\)")
    message = r"bare GPT2LMHeadModel: wrap it: cf\.wrap\(hf_model, tokenizer\)"
    refused(lambda: bind(build("gpt2"), task), ModelError, message)
    refused(lambda: bind(None, task), ModelError, "model is a NoneType: give what cf.load or cf.wrap returned")
    refused(lambda: bind(task, wrapped("gpt2")), ModelError, "model is a Task")


def test_bind_refuses_what_is_no_task() -> None:
    model = wrapped("gpt2")
    refused(lambda: bind(model, "ioi"), TaskError, r"task is the text 'ioi': .* cf\.task\('ioi', model\)")
    refused(lambda: bind(model, None), TaskError, "task is a NoneType: make a task")
    refused(lambda: bind(model, {"clean": ["a"]}), TaskError, "task is a dict")


def test_bind_refuses_a_task_of_another_model() -> None:
    model = wrapped("gpt2")
    bound = bind(model, id_task())
    message = "was bound to model '.*' .* this one is 'another' .* give the unbound task"
    refused(lambda: bind(dataclasses.replace(model, name="another"), bound), TaskError, message)
    other = dataclasses.replace(bound, vocabulary=bound.vocabulary + 1)
    refused(lambda: bind(model, other), TaskError, "was bound to model")


def test_loading(embedded: cf.Model) -> None:
    assert cf.load(Path(tiny.PATH), check=False).name == str(tiny.PATH)
    refused(lambda: cf.load(None), ModelError, "loaded by its name or folder, not by a NoneType")
    refused(lambda: cf.load(build("gpt2")), ModelError, "a model in memory goes to cf.wrap")
    refused(lambda: cf.load("tiny", dtpye="float32"), ModelError, "cannot load 'tiny': keyword 'dtpye' is unknown")
    for dtype in ("int32", torch.int32, "nn", 32):
        refused(lambda dtype=dtype: cf.load("tiny", dtype=dtype), ModelError, "dtype .* is unknown. Known: float32")
    refused(lambda: cf.wrap(embedded), ModelError, "model 'tiny' is wrapped already: use it as it is")
    refused(lambda: cf.wrap("tiny"), ModelError, r"load it: cf\.load\('tiny'\)")
    refused(lambda: cf.task("ioi", embedded.hf), ModelError, "bare GPT2LMHeadModel: wrap it")
    refused(lambda: cf.task("ioi", "tiny"), ModelError, "load it")
    refused(lambda: cf.task(None, embedded), TaskError, "or given as a TaskBuilder, not as a NoneType")


# -------------------------------------------------------------------- scores
@pytest.mark.parametrize("n", [-1, 2.0, "3", None, True])
def test_counts_of_edges(n: Any) -> None:
    scores = random_scores(PLAIN)
    for cut in (scores.top, scores.greedy, scores.of_nodes().top):
        refused(lambda cut=cut: cut(n), ScoreError, ": give a whole number, 0 or more")
    assert scores.top(np.int64(3), prune=False) == scores.top(3, prune=False)


def test_thresholds() -> None:
    scores = random_scores(PLAIN)
    for t in (float("nan"), "0.1", None):
        refused(lambda t=t: scores.threshold(t), ScoreError, "is not a threshold: give a number")
    assert scores.threshold(-np.inf, prune=False) == cf.Circuit.full(PLAIN)  # not the cells that are no edges
    assert len(scores.threshold(np.float32(np.inf))) == 0


def test_thresholds_of_acdc_are_several(embedded: cf.Model) -> None:
    task = cf.task("ioi", embedded, n=2)
    refused(lambda: cf.acdc_scores(embedded, task, thresholds=0.1), ScoreError, "thresholds=0.1 are not a grid")
    refused(lambda: cf.acdc_scores(embedded, task, thresholds=[0.1, 0.1]), ScoreError, r"\[0.1, 0.1\] are not a grid")


def test_seeds(embedded: cf.Model) -> None:
    task = cf.task("ioi", embedded, n=4)
    for seed in (-1, 0.5, None):
        refused(lambda seed=seed: cf.find(embedded, task, seed=seed), TaskError, f"seed={seed} is no seed")
        refused(lambda seed=seed: cf.compare(embedded, task, seed=seed), TaskError, "is no seed")
        refused(lambda seed=seed: cf.evaluate(embedded, task, [], seed=seed), TaskError, "is no seed")


def test_values_that_are_no_scores() -> None:
    values = np.zeros(PLAIN.real.shape, np.float32)
    values[PLAIN.edge("m0->a1.h2<v>")] = -np.inf
    refused(lambda: Scores(PLAIN, values), ScoreError, r"the score of m0->a1.h2<v> is infinite \(1 of \d+ are\)")
    refused(lambda: NodeScores(PLAIN, values[:, 0] + np.inf), ScoreError, "the score of input is infinite")
    refused(lambda: Scores(PLAIN, values.tolist()), ScoreError, "scores are a list: give a numpy array")
    refused(lambda: Scores(PLAIN, torch.zeros(3)), ScoreError, "scores are a Tensor: give a numpy array")
    refused(lambda: Scores(PLAIN, PLAIN.real), ScoreError, "scores are an array of bool: give a numpy array of numbers")
    refused(lambda: NodeScores(PLAIN, [1.0]), ScoreError, "scores are a list")
    refused(lambda: NodeScores(PLAIN, np.float32([])), ScoreError, "node scores for 0 writers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "version 2 of the format, this circuitfind reads 1: upgrade"),
        ({"version": None}, "version None of the format"),
        ({"graph": None}, "its header has no 'graph'"),
        ({"record": None}, "its header has no 'record'"),
        ({"graph": "{"}, "its header cannot be read"),
        ({"graph": '{"n_layers": 0, "n_heads": 1, "n_kv_heads": 1, "d_model": 8}'}, "cannot be read: no such graph"),
        ({"record": '{"mdoel": "x"}'}, "its header cannot be read: .*'mdoel'"),
        ({"record": "3"}, "its header cannot be read"),
    ],
)
def test_headers_of_score_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    graph = json.dumps(dataclasses.asdict(PLAIN))
    header = {"format": "circuitfind.scores", "version": "1", "level": "edge", "graph": graph, "record": "{}"}
    path = tmp_path / "scores.safetensors"
    kept = {key: value for key, value in (header | changes).items() if value is not None}
    save_file({"values": np.zeros(PLAIN.real.shape, np.float32)}, path, metadata=kept)
    refused(lambda: Scores.open(path), FileError, rf"scores\.safetensors: .*{message}")


def test_records_with_numpy_numbers_and_paths(tmp_path: Path) -> None:
    scores = random_scores(PLAIN)
    settings = {"steps": np.int64(5), "t": np.float32(0.5), "from": Path("a/b"), "sizes": np.arange(3), "nan": np.nan}
    scores = Scores(PLAIN, scores.values, scores.record.with_settings(**settings))
    opened = Scores.open(scores.save(tmp_path / "s.safetensors"))
    assert opened.record.settings == {"steps": 5, "t": 0.5, "from": "a/b", "sizes": [0, 1, 2], "nan": None}


def test_infinite_effects_are_named() -> None:
    """A metric that is infinite as soon as the second pair's logit moves: the effects are, not the clean run."""
    model, bound = wrapped("gpt2"), id_task((4, 4)).on(wrapped("gpt2"))
    with torch.no_grad():
        clean = model.hf(bound.batch.clean.ids).logits[1, -1, 0]

    def steep(logits: torch.Tensor, _: Any) -> torch.Tensor:
        moved = (logits[:, 0] - clean).abs() > 1e-5
        return torch.where(moved & (torch.arange(len(logits)) == 1), torch.inf, logits[:, 0])

    bound, after = bound.with_metric(steep), "is infinite on example 1 of the batch: look for inf or NaN"
    refused(lambda: cf.patch(model, bound, "resid"), ScoreError, f"the effect of resid in layer 0, unit 0 {after}")
    refused(lambda: cf.path_patch(model, bound, "m0"), ScoreError, f"the effect of a path from m0 {after}")
    for level, name in (("edge", "input->a0.h0<q>"), ("node", "input")):
        message = f"the effect of {name} {after}"
        refused(lambda level=level: cf.attribute(model, bound, "exact", level=level), ScoreError, message)
    refused(lambda: cf.evaluate(model, bound, []), ScoreError, "metric 'steep' is infinite on example 1: ")


# -------------------------------------------------------------------- files
@pytest.mark.parametrize("kind", [cf.Scores, NodeScores, cf.Circuit, cf.Sweep, cf.PathEffects, cf.Comparison])
def test_folders_are_no_files(kind: Any, tmp_path: Path) -> None:
    refused(lambda: kind.open(tmp_path), FileError, f"{tmp_path.name}: this is a folder: name a file in it")
    refused(lambda: kind.open(tmp_path / "absent"), FileError, "absent: no such file")


def test_files_that_are_no_circuits(tmp_path: Path) -> None:
    scores, node = random_scores(PLAIN), tmp_path / "nodes.safetensors"
    path = scores.save(tmp_path / "scores.safetensors")
    cut = r"find --scores' searches them, 'circuitfind export --top N --to json' or Scores\.open\(path\)\.top"
    refused(lambda: cf.Circuit.open(path), FileError, rf"scores\.safetensors: holds edge scores: .*{cut}")
    assert cf.Circuit.open(cf.Scores.open(path).top(3, prune=False).save(tmp_path / "c.json")).edges
    scores.of_nodes().save(node)
    refused(lambda: cf.PathEffects.open(node), FileError, "holds node scores: 'circuitfind show' draws them")
    save_file({"a": np.zeros(2)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    refused(
        lambda: cf.Circuit.open(tmp_path / "m.safetensors"), FileError, "holds tensors .* not a result of circuitfind"
    )
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    refused(lambda: cf.Circuit.open(picture), FileError, r"p\.png: not JSON: this is no text file")


# -------------------------------------------------------------------- circuits and graphs
def test_one_name_is_one_edge() -> None:
    for circuit in (as_circuit(PLAIN, "a0.h1->m2"), cf.Circuit.of(PLAIN, "a0.h1->m2")):
        assert circuit.edges == ["a0.h1->m2"]


def test_what_is_no_circuit() -> None:
    for given in (None, random_scores(PLAIN), 7):
        message = rf"as a circuit or as a list of names, not as a {type(given).__name__} \(from scores cut a circuit"
        refused(lambda given=given: as_circuit(PLAIN, given), FileError, message)
    refused(lambda: as_circuit(PLAIN, [3]), FileError, "3 is not an edge: give its name, such as 'a0.h1->m2'")
    refused(lambda: as_circuit(PLAIN, [("a0.h1", "m2")]), FileError, "is not an edge: give its name")
    refused(lambda: as_circuit(PLAIN, np.ones(2)), FileError, "is not an edge")


def test_set_operations_need_circuits() -> None:
    circuit = cf.Circuit.full(PLAIN)
    message = r"another circuit, not with a list: make one of edge names with Circuit\.of"
    for operation in (circuit.__or__, circuit.__and__, circuit.__sub__, circuit.jaccard):
        refused(lambda operation=operation: operation(["input->logits"]), FileError, message)
    refused(lambda: circuit | cf.Circuit.full(GROUPED), FileError, "different graphs")


def test_masks_that_are_no_masks() -> None:
    refused(lambda: cf.Circuit(PLAIN, PLAIN.real.tolist()), FileError, "circuit mask is a list: give a numpy array")
    refused(lambda: cf.Circuit(PLAIN, None), FileError, "circuit mask is a NoneType: give a numpy array")
    refused(lambda: cf.Circuit(PLAIN, PLAIN.real.astype(int)), FileError, "mask holds int64: give booleans")
    refused(lambda: cf.Circuit(PLAIN, PLAIN.real, exact=[1.0]), FileError, "circuit exact is a list")


@pytest.mark.parametrize("numbers", [(2.0, 4, 4, 16), ("2", 4, 4, 16), (2, None, 4, 16), (0, 4, 4, 16), (2, 4, 3, 16)])
def test_numbers_that_are_no_graph(numbers: Any) -> None:
    refused(lambda: Graph(*numbers), FileError, "no such graph")


# -------------------------------------------------------------------- tasks
def test_an_answer_given_twice_counts_once(embedded: cf.Model) -> None:
    once = pairs_of_text().on(embedded).batch.answers
    for names in ([["Mary", "Mary"], ["Aaron"]], [["Mary"], ["Aaron", "Aaron"]]):
        assert torch.equal(pairs_of_text(answers=names).on(embedded).batch.answers, once)
    ids = Spelled(["given"], [{"Mary": [5], " Mary": [5], "John": [6]}], {})  # two spellings of one id
    assert ids.sequences(0, ["Mary", " Mary", "John"]) == [[5], [6]]


def test_an_answer_id_given_twice_counts_once() -> None:
    model = wrapped("gpt2")
    batch = pairs_of_ids(answers=[[20, 20], [21, 21], [22, 23]]).on(model).batch
    assert batch.answers[:, 0].tolist() == [[20, -1], [21, -1], [22, 23]]
    sets = [[[20, 20], [21, 5]], [[6, 6], [7, 7]], [[8, -1], [9, 9]]]
    batch = pairs_of_ids(positions=[[1, 2]] * 3, answers=sets, metric="logprob", wrong_answers=None).on(model).batch
    assert batch.answers.tolist() == [[[20, -1], [21, 5]], [[6, -1], [7, -1]], [[8, -1], [9, -1]]]


CLEAN = torch.arange(3, 18).view(3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": CLEAN.float()}, "prompts as ids are a tensor of torch.float32: token ids are whole numbers"),
        ({"clean": CLEAN > 4}, "prompts as ids are a tensor of torch.bool"),
        ({"clean": torch.tensor(5)}, "clean is a Tensor without dimensions: give a list or tensor"),
        ({"answers": torch.tensor(5)}, "answers is a Tensor without dimensions"),
        ({"answers": torch.tensor([1.0, 2, 3])}, "row 0: answers must be token ids, as the prompts are"),
        ({"answers": [True, False, True]}, "row 0: answers must be token ids, as the prompts are"),
        ({"answers": 5}, "answers is a int: give a list or tensor"),
        ({"positions": torch.zeros(3, 0, dtype=torch.long)}, "positions are whole numbers"),
        ({"positions": [[], [], []]}, "positions are whole numbers"),
        ({"positions": [True, False, True]}, "positions are whole numbers"),
        ({"attention_mask": [[1, 1], [1]]}, "attention_mask is not a table of numbers"),
        ({"attention_mask": "all"}, "attention_mask is not a table of numbers"),
        ({"attention_mask": [[1, 1]] * 3}, r"attention_mask has shape \[3, 2\], the prompts \[3, 5\]"),
        ({"bos": True}, "bos is for prompts as text"),
        ({"metric": ["kl"]}, "metric is a list: give one name or a callable"),
        ({"metric": None}, "metric is None: give one name"),
        ({"positions": [[1, 2]] * 3, "answers": torch.ones(3, 2).bool()}, "answers must be token ids for each read"),
    ],
)
def test_ids_that_are_no_task(changes: dict[str, Any], message: str) -> None:
    refused(lambda: pairs_of_ids(**changes).on(wrapped("gpt2")), TaskError, message)


def test_an_attention_mask_as_lists() -> None:
    model, mask = wrapped("gpt2"), [[0, 1, 1, 1, 1]] * 3
    given = [pairs_of_ids(attention_mask=m).on(model).batch.clean.ids for m in (mask, torch.tensor(mask))]
    assert torch.equal(*given) and given[0].shape == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": None}, "clean is None: give a list or tensor with one entry per pair"),
        ({"clean": {"a": 1, "b": 2}}, "clean is a dict"),
        ({"clean": set(IOI)}, "clean is a set"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask is for prompts as token ids"),
        ({"corrupted_attention_mask": [[1]]}, "attention_mask is for prompts as token ids"),
    ],
)
def test_text_that_is_no_task(changes: dict[str, Any], message: str) -> None:
    refused(lambda: pairs_of_text(**changes), TaskError, message)


HALF = "a\ud800b"


@pytest.mark.parametrize("side", ["clean", "corrupted", "answers", "wrong_answers", "spans"])
def test_halves_of_surrogate_pairs_in_a_task(side: str) -> None:
    given = [["x"] if side.endswith("answers") else "x", [HALF] if side.endswith("answers") else HALF]
    changes = {side: [{"who": "x"}, {HALF: "x"}] if side == "spans" else given}
    refused(
        lambda: pairs_of_text(**changes), TaskError, rf"row 1: {side}: .*a\\ud800b.* holds half of a surrogate pair"
    )


@pytest.mark.parametrize("name", ["c.json", "c.html", "c.neuronpedia.json", "pairs.jsonl"])
def test_halves_of_surrogate_pairs_in_a_file(name: str, tmp_path: Path) -> None:
    circuit = random_scores(PLAIN).top(9).with_group(HALF, ["input"])
    task = pairs_of_text(spelling="given")
    object.__setattr__(task, "clean", [HALF, "x"])
    saved = {"c.html": lambda path: circuit.report(None, None, path), "pairs.jsonl": task.save}
    refused(lambda: saved.get(name, circuit.save)(tmp_path / name), FileError, rf"{name}: .*a\\ud800b.* surrogate pair")
    assert not list(tmp_path.iterdir())
    drawn = circuit.to_dot(title=HALF)
    assert drawn == drawn.encode(errors="ignore").decode(), "pictures leave it out, as control characters"


def test_prompts_from_a_generator(embedded: cf.Model) -> None:
    task = pairs_of_text(clean=(text for text in IOI), corrupted=iter(TWINS), answers=iter(["Mary", "Aaron"]))
    assert task.on(embedded).prompts == tuple(IOI) and len(task.on(embedded)) == 2  # may be bound twice


def test_files_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"clean": "a", "corrupted": "b"}))
    refused(
        lambda: cf.Task.from_file(path, metrik="kl"), TaskError, "keyword 'metrik' is unknown: did you mean 'metric'"
    )
    refused(lambda: cf.Task.from_file(None), FileError, "pairs are read from a path, not from None")


def test_parts_of_a_task() -> None:
    bound = pairs_of_ids().on(wrapped("gpt2"))
    refused(lambda: bound.subset(1), TaskError, "subset: rows are a list, such as \\[0\\], not 1")
    refused(lambda: bound.subset([]), TaskError, "subset: no rows are given; there are 3")
    for row in (99, 3, -4, 1.0, True, "0"):
        refused(lambda row=row: bound.subset([row]), TaskError, "subset: there is no row .* there are 3")
    assert bound.subset(i for i in (np.int64(2), -1)).batch.clean.ids.tolist() == [[13, 14, 15, 16, 17]] * 2
    for fraction in (float("nan"), float("inf"), "half", None):
        refused(lambda fraction=fraction: bound.split(fraction), TaskError, "3 pairs cannot be split at")
