"""SmolLM2-135M (Llama, three key/value heads) and Gemma 3 270M (post-norms, q/k norms, one key/value head, BOS).

Real weights have what random ones lack: streams of very unequal size, saturated attention, scores over four decades.
Padding, unequal lengths and grouped queries are tested on them against the literal twins, with few pairs and edges.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import as_matrix, off
from oracles import Literal, patch_edges, run_circuit, split_reader_scores
from toys import off_scores

import circuitfind as cf
from circuitfind.batch import Batch, Inputs
from circuitfind.cli.app import main
from circuitfind.evaluation.faithfulness import Evaluator

pytestmark = [pytest.mark.real, pytest.mark.slow]

BOTH = ("smollm2", "gemma3")
GIVEN = "Mary and John went to the store. {} gave a drink to"
LONGER = "Yesterday, after a long day at work, Mary and John went to the old store. {} gave a drink to"
GROUPED = {  # edges into a key and a value that several heads share
    "smollm2": ["m0->a8.kv1<k>", "m0->a23.kv1<v>"],
    "gemma3": ["m0->a5.kv0<k>", "m2->a11.kv0<v>"],
}


def unequal(model: cf.Model) -> cf.Task:
    """Two pairs of unequal length."""
    templates = (GIVEN, LONGER)
    clean, corrupted = ([text.format(name) for text in templates] for name in ("John", "Mary"))
    return cf.Task(clean, corrupted, answers=["Mary"] * 2, wrong_answers=["John"] * 2)


def logit_diff(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """`[batch]`, from the definition."""
    right, wrong = (logits[:, 0].gather(1, ids[:, 0]) for ids in (batch.answers, batch.wrong))
    return (right - wrong).squeeze(1)


# -------------------------------------------------------------------- loading
@pytest.mark.parametrize(("name", "kind", "edges"), [("smollm2", "Q4_1", 70_651), ("gemma3", "Q4_K_M", 5_644)])
def test_gguf_files_are_models(name: str, kind: str, edges: int, real: Callable[[str], cf.Model]) -> None:
    model = real(name)  # its identities hold, or it would not load
    assert (model.graph.n_edges, model.dequantised) == (edges, f"float32 from GGUF {kind}")
    bound = cf.task("ioi", model, n=4).on(model)
    found = cf.summarise(model, bound)
    assert found.accuracy >= 0.75 and found.clean > 1 > -1 > found.corrupted
    assert bound.bos == ("none" if name == "smollm2" else "added by the tokenizer")


def test_scores_are_those_of_the_saved_weights(real: Callable[[str], cf.Model], tmp_path: Path) -> None:
    model = real("smollm2")
    task = unequal(model)
    model.hf.save_pretrained(tmp_path)
    saved = cf.wrap(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model.tokenizer)
    scores = [cf.attribute(each, task, "eap").values for each in (model, saved)]
    np.testing.assert_array_equal(*scores)


# -------------------------------------------------------------------- unequal lengths, padding, grouped queries
@pytest.mark.parametrize("name", BOTH)
def test_padded_pairs_equal_autograd_through_split_readers_of_each_alone(
    name: str, real: Callable[[str], cf.Model]
) -> None:
    model = real(name)
    bound = unequal(model).on(model)
    expected: Any = 0
    for row in range(2):
        alone = bound.subset([row]).batch
        short = int(alone.clean.mask.sum())  # without its padding
        sides = (
            Inputs(side.ids[:, :short], side.mask[:, :short], side.read) for side in (alone.clean, alone.corrupted)
        )
        twin = split_reader_scores(model.hf, Batch(*sides, alone.answers, alone.wrong), partial(logit_diff, alone))
        expected = expected + as_matrix(model.graph, twin) / 2
    on_the_right, batch = cf.attribute(model, bound, "eap", batch_size=2), bound.batch
    assert off_scores(on_the_right, expected) < 1e-4
    left = torch.stack([side.ids for side in (batch.clean, batch.corrupted)]), batch.clean.mask.clone()
    for ids in (*left[0], left[1]):
        ids[0] = ids[0].roll(ids.shape[1] - int(batch.clean.mask[0].sum()))
    answers = batch.answers[:, 0], batch.wrong[:, 0]
    on_the_left = cf.Task(*left[0], *answers, attention_mask=left[1], metric="logit_diff")
    assert off_scores(cf.attribute(model, on_the_left, "eap", batch_size=2), expected) < 1e-4


@pytest.mark.parametrize("name", BOTH)
def test_exact_effects_and_circuits_equal_the_literal_runs(name: str, real: Callable[[str], cf.Model]) -> None:
    model = real(name)
    task = unequal(model)
    batch, literal = task.on(model).batch, Literal(model.hf)
    with torch.no_grad():
        clean, corrupted = (literal.run(Inputs(*side)) for side in (batch.clean, batch.corrupted))
    change = {writer: corrupted.writers[writer] - value for writer, value in clean.writers.items()}
    before = logit_diff(batch, clean.logits)
    for edge in GROUPED[name]:
        writer, reader = edge.split("->")
        (patched,) = patch_edges(literal, batch.clean, change, [(writer, reader)])
        expected = before - logit_diff(batch, patched)
        found = cf.path_patch(model, task, [writer], [reader], batch_size=2).per_example
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-4 * float(before.abs().max()))
    if name == "gemma3":  # the other one's 70,651 edges, added one by one, take long
        circuit = cf.attribute(model, task, "eap").top(150)
        kept = {tuple(edge.split("->")) for edge in model.graph.names(circuit.mask)}
        expected = logit_diff(batch, run_circuit(literal, batch.clean, kept, corrupted.writers))
        found = Evaluator.of(model, task).run(circuit.mask[None]).metric[0]
        assert off(torch.from_numpy(found), expected) < 1e-4


# -------------------------------------------------------------------- by query head
def test_smollm2s_file_by_query_head(real: Callable[[str], cf.Model], tmp_path: Path) -> None:
    model = real("smollm2")
    task = cf.task("ioi", model, n=4)
    scores = cf.attribute(model, task, "eap", ungrouped=True)
    path = scores.save(tmp_path / "smollm2.json", format="eap-ig")
    assert cf.Scores.open(path).to_dict() == scores.to_dict()
    assert scores.graph.n_edges == model.graph.ungrouped().n_edges
    back = cf.Scores.open(path, graph=model.graph)
    assert off_scores(back, torch.from_numpy(cf.attribute(model, task, "eap").values)) < 1e-4


# -------------------------------------------------------------------- the main job
def test_a_search_ends_with_a_small_faithful_circuit(real: Callable[[str], cf.Model]) -> None:
    """Fewer than 150 of 70,651 edges, far nearer to the model than as many of the strongest by score."""
    model = real("smollm2")
    task = cf.task("ioi", model, n=12, template="abba-3")
    result = cf.find(model, task, method="relp", edges=150, max_checks=4, random=1, knockouts=0)
    found = result.checks
    assert 50 < len(result.circuit) <= 150 and abs(1 - found.faithfulness) < 0.35
    assert found.ranked is not None and abs(1 - found.faithfulness) < abs(1 - found.ranked)
    assert found.beaten == 1 and abs(found.random[0]) < 0.05
    assert result.checks.sign_errors == 0 and result.checks.evaluation.accuracy >= 0.5


# -------------------------------------------------------------------- chats and answers of several tokens
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_page_shows_what_is_printed(
    real: Callable[[str], cf.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of docs/tasks.md: the finance example, a chat file, and answers of two tokens."""
    model = real("smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load", lambda *_, **__: model)
    monkeypatch.setenv("COLUMNS", "120")
    finance = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "revenue" in block)
    exec(finance, {"cf": cf, "model": model})
    blocks = re.findall(r"```(text|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert ("text", capsys.readouterr().out) in blocks
    shown = 0
    for name in ("turns.jsonl", "capitals.jsonl"):
        content = next(text for kind, text in blocks if kind == "text" and text.startswith('{"clean"'))
        blocks.remove(("text", content))
        Path(name).write_text(content)
    for (kind, command), (_, expected) in pairwise(blocks):
        if kind == "sh" and command.startswith("circuitfind doctor SmolLM2"):
            assert main(command.split()[1:]) == 0
            said = capsys.readouterr()
            lines = "\n".join(line.rstrip() for line in [*said.err.splitlines(), *said.out.splitlines()])
            assert expected in lines + "\n", command
            shown += 1
    assert shown == 3


@torch.no_grad()
def test_chats_and_long_answers_equal_the_same_ids(real: Callable[[str], cf.Model]) -> None:
    model = real("smollm2")
    tokenizer, ask = model.tokenizer, "What is the capital of {}? Answer with one word."
    texts = [ask.format("Germany")], [ask.format("Spain")]
    chats = [[{"role": "user", "content": side[0]}] for side in texts]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    own, other = (tokenizer(text)["input_ids"] for text in ("Berlin", "Madrid"))
    assert len(own) == len(other) == 2 and own[0] != other[0], "the test needs answers of two tokens"
    words = {"answers": ["Berlin"], "wrong_answers": ["Madrid"], "chat": True, "spelling": "none"}
    first = (
        cf.Task(*texts, **words, answer="first"),
        cf.Task(*map(torch.tensor, ([ids[0]], [ids[1]])), [own[0]], [other[0]]),
    )
    longer = [torch.tensor([side + own[:-1]]) for side in ids]
    places = cf.Task(*longer, [own], [other], positions=[[-2, -1]])
    for (text, same), times in ((first, 1), ((cf.Task(*texts, **words, answer="all"), places), 2)):
        scores = [cf.attribute(model, task, "eap").values for task in (text, same)]
        np.testing.assert_allclose(scores[0], scores[1] * times, atol=1e-5 * float(np.abs(scores[0]).max()))
    logits = [model.hf(torch.tensor([ids[0] + own[:at]])).logits[0, -1].double().log_softmax(-1) for at in (0, 1)]
    expected = float(logits[0][own[0]] + logits[1][own[1]])
    found = cf.summarise(model, cf.Task(*texts, **words, answer="all", metric="logprob"), warn=False)
    assert found.clean == pytest.approx(expected, rel=1e-4)
