"""A model that runs as a circuit for its user, against exact circuit runs and the literal oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, build
from helpers import means_of
from oracles import Literal, run_circuit
from test_aligned_spans import AlignedTwin, unequal_task
from test_circuit_run import kept_edges
from toys import FOUR, id_task, some_circuits, wrapped

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare


def _expected(model: cf.Model, task: cf.Task, circuit: cf.Circuit, ablation: str = "corrupted") -> torch.Tensor:
    batch = task.on(model).batch
    prepared = prepare(model.adapter, batch, ablation, means_of(model.adapter, batch, ablation))
    return run_circuits(prepared, circuit.mask[None])[0]


@pytest.mark.parametrize(
    ("name", "ablation"),
    [(name, "corrupted") for name in (*FOUR, "opt", "falcon", "bloom", "gpt_oss")]
    + [("llama", "zero"), ("gpt2", "mean"), ("opt", "zero")],
)
def test_logits_are_the_circuits(name: str, ablation: str) -> None:
    model, task = wrapped(name), id_task((6, 4, 5))
    for circuit in (*some_circuits(model.graph), cf.Circuit.empty(model.graph), cf.Circuit.full(model.graph)):
        expected = _expected(model, task, circuit, ablation)
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
        with cf.only(model, circuit, task, ablation=ablation) as held:
            torch.testing.assert_close(held.logits(), expected, **close)
            for rows in ([2, 0], [1, 2]):  # the second without the longest prompt
                torch.testing.assert_close(held.logits(rows), expected[rows], **close)


def test_every_position_of_the_users_own_forward_is_the_circuits() -> None:
    """By the oracle, which reads wherever it is told to."""
    model = wrapped("llama")
    ids = torch.randint(3, VOCAB, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    task = cf.Task(ids[0], ids[1], [5, 6], [7, 8])
    circuit = some_circuits(model.graph)[2]
    literal, batch = Literal(model.hf), task.on(model).batch
    everywhere = batch.clean._replace(read=torch.arange(5).expand(2, 5))
    with torch.no_grad():
        ablated = literal.run(batch.corrupted).writers
    kept = {tuple(edge.split("->")) for edge in circuit.edges}
    expected = run_circuit(literal, everywhere, kept, ablated)
    with cf.only(model, circuit, task):
        torch.testing.assert_close(model.hf(ids[0]).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.hf(input_ids=ids[0][1:]).logits, expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_pairs_aligned_by_spans(name: str) -> None:
    """By the oracle, with what the corrupted run left at each token's counterpart."""
    model, twin = wrapped(name), AlignedTwin(name)
    circuit = some_circuits(model.graph)[2]
    expected = run_circuit(twin.literal, twin.batch.clean, kept_edges(model.graph, circuit.mask), twin.carried)
    close = {"rtol": 1e-4, "atol": 1e-4}
    with cf.only(model, circuit, unequal_task()) as held:
        torch.testing.assert_close(held.logits(), expected, **close)
        torch.testing.assert_close(held.logits([2, 1]), expected[[2, 1]], **close)
        torch.testing.assert_close(model.hf(twin.batch.clean.ids[:1]).logits[:, -1:], expected[:1], **close)


def test_half_precision() -> None:
    model, task = wrapped("gpt2", torch.bfloat16), id_task((6, 4, 5))
    for circuit in (some_circuits(model.graph)[2], cf.Circuit.empty(model.graph), cf.Circuit.full(model.graph)):
        with cf.only(model, circuit, task) as held:
            found = held.logits()
        assert found.dtype == torch.bfloat16
        expected = _expected(model, task, circuit).float()
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_token_is_generated(name: str) -> None:
    model, task = wrapped(name), id_task((5, 5, 5))
    circuit = some_circuits(model.graph)[1]
    best = _expected(model, task, circuit)[:, -1].argmax(-1)
    with cf.only(model, circuit, task) as held:
        assert held.next_token() == best.tolist()
        generated = model.hf.generate(held.inputs([0, 2])["input_ids"], max_new_tokens=1, do_sample=False)
    assert generated[:, -1].tolist() == best[[0, 2]].tolist()
    with cf.only(model, circuit, id_task((5, 4))) as held, pytest.raises(cf.TaskError, match="prompts of one length"):
        model.hf.generate(**held.inputs(), max_new_tokens=1, do_sample=False)


def test_the_embedded_model_speaks() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("greater_than", model, n=3)
    with cf.only(model, cf.Circuit.full(model.graph), task) as held:
        tokens = held.next_token()
    with torch.no_grad():
        logits = model.hf(**model.adapter.keywords(task.on(model).batch.clean)).logits[:, -1]
    assert tokens == [model.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]


def test_probes_see_the_circuit() -> None:
    """A hook of the user's on an MLP sees the MLP's part in the circuit; a node outside writes its ablated value."""
    model, task = wrapped("gpt2"), id_task((5, 5))
    mlp, seen = model.hf.transformer.h[1].mlp, []
    corrupted = task.on(model).batch.corrupted.ids
    with torch.no_grad(), _noted(mlp, seen):
        model.hf(corrupted)
    circuit = cf.Circuit.full(model.graph)
    circuit.mask[:, model.graph.readers(1, "mlp")] = False
    with cf.only(model, circuit, task) as held, _noted(mlp, seen):
        held.logits()
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    assert len(seen) == 2, "no hidden passes"


class _noted:
    def __init__(self, module: torch.nn.Module, seen: list[torch.Tensor]) -> None:
        self.handle = module.register_forward_hook(lambda _, __, output: seen.append(output))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def test_other_pairs_bring_their_twins() -> None:
    model, task, other = wrapped("gemma2"), id_task((5, 5)), id_task((6, 4, 6), seed=1)
    circuit = some_circuits(model.graph)[1]
    with cf.only(model, circuit, task) as held:
        torch.testing.assert_close(held.run(other), _plain_run(model, other, circuit), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held.logits(), held.run(task), rtol=1e-4, atol=1e-4)


def _plain_run(model: cf.Model, task: cf.Task, circuit: cf.Circuit) -> torch.Tensor:
    """By a second copy of the model, which no circuit is in force on."""
    return _expected(cf.wrap(build("gemma2"), None), task, circuit)


def test_the_model_is_left_as_it_was_found() -> None:
    model, task = cf.wrap(build("gpt2").train(), None), id_task((5, 5))
    held = None
    with pytest.raises(RuntimeError, match="mine"):  # noqa: SIM117
        with cf.only(model, some_circuits(model.graph)[0], task) as held:
            assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
            raise RuntimeError("mine")
    assert held is not None and model.hf.training and all(p.requires_grad for p in model.hf.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.hf.modules())
    plain = model.hf.eval()(id_task((5, 5), seed=3).clean).logits
    torch.testing.assert_close(plain, build("gpt2")(id_task((5, 5), seed=3).clean).logits)


def test_prompts_that_the_task_does_not_hold() -> None:
    model, task = wrapped("gpt2"), id_task((5, 4, 5))
    clean = task.clean
    with cf.only(model, some_circuits(model.graph)[1], task) as held:
        expected = held.logits()
        with pytest.raises(cf.TaskError, match="row 1 is not among the task's clean prompts"):
            model.hf(torch.stack([clean[0], task.corrupted[0]]))
        with pytest.raises(cf.TaskError, match="row 0 is not among"):
            model.hf(clean[1:2])  # its padding without its mask
        with pytest.raises(cf.TaskError, match="input_ids="):
            model.hf(inputs_embeds=torch.zeros(1, 2, 32))
        torch.testing.assert_close(held.logits(), expected, msg="a refused prompt leaves nothing behind")
        short = model.hf(clean[1:2, :4]).logits[:, -1:]  # a shorter batch than the task's
        torch.testing.assert_close(short, expected[1:2], rtol=1e-4, atol=1e-5)


def test_a_pass_that_never_began_leaves_nothing_behind() -> None:
    model, task = wrapped("gpt2"), id_task((5, 5, 5))

    def stop(*_: Any) -> None:
        raise RuntimeError("mine")

    with cf.only(model, some_circuits(model.graph)[2], task) as held:
        expected = held.logits()
        handle = model.hf.register_forward_pre_hook(stop, prepend=True)
        with pytest.raises(RuntimeError, match="mine"):
            held.logits([2])
        handle.remove()
        torch.testing.assert_close(model.hf(task.clean[:1]).logits[:, -1:], expected[:1])


@pytest.mark.parametrize("call", ["evaluate", "direct_effects", "only"])
def test_no_other_run_of_circuitfind_takes_place_inside(call: str) -> None:
    """Every prompt here is a clean one, too: what ran inside would measure the circuit and call it the model."""
    model, pairs = wrapped("llama"), id_task((5, 5))
    both = torch.cat([pairs.clean, pairs.corrupted])
    task = cf.Task(both, both.roll(2, 0), [5, 6, 7, 8], [9, 9, 9, 9], metric="kl")
    circuit = some_circuits(model.graph)[2]
    functions: dict[str, Any] = {
        "evaluate": lambda: cf.evaluate(model, task, circuit),
        "direct_effects": lambda: cf.direct_effects(model, task),
        "only": lambda: cf.only(model, [], task).__enter__(),
    }
    with cf.only(model, circuit, task) as held:
        expected = held.logits()
        with pytest.raises(cf.ModelError, match=r"inside cf\.only the model runs as a circuit"):
            functions[call]()
        torch.testing.assert_close(held.logits(), expected, rtol=0, atol=0)
    functions["evaluate"]()


def test_what_is_not_the_circuits_is_not_taken_for_it() -> None:
    model, task = wrapped("llama"), id_task((5, 5))
    with cf.only(model, some_circuits(model.graph)[2], task) as held:
        expected = held.logits()
        with pytest.raises(cf.TaskError, match="call the whole model"):
            model.hf.model(task.clean)
        assert model.hf.lm_head(model.hf.model.norm(torch.ones(1, 2, 32))).shape == (1, 2, VOCAB)
        with pytest.raises(cf.TaskError, match=r"\[rows, positions\]"):
            model.hf(task.clean[0])
    with pytest.raises(cf.TaskError, match=r"the block of cf\.only has been left"):
        held.logits()
    torch.testing.assert_close(held.run(task), expected, rtol=1e-4, atol=1e-4)


def test_twins_matter_only_where_they_decide() -> None:
    model = wrapped("llama")
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    task = cf.Task(ids[[0, 0]], ids[[1, 2]], [5, 6], [7, 8])
    with cf.only(model, some_circuits(model.graph)[2], task, ablation="zero") as held:
        torch.testing.assert_close(model.hf(ids[:1]).logits[:, -1:], held.logits([1]), rtol=1e-4, atol=1e-4)
    spans: dict[str, Any] = {"align": "spans", "spans": [{"a": (1, 3)}, {"a": (2, 4)}]}
    spans["corrupted_spans"] = [{"a": (1, 4)}, {"a": (2, 5)}]
    longer = torch.cat([ids[1], ids[2, :1]]).repeat(2, 1)
    task = cf.Task(ids[[0, 0]], longer, [5, 6], [7, 8], **spans)
    with (
        cf.only(model, some_circuits(model.graph)[2], task),
        pytest.raises(cf.TaskError, match="rows 0, 1, with different corrupted prompts"),
    ):
        model.hf(ids[:1])


def test_one_prompt_with_several_twins() -> None:
    model = wrapped("llama")
    ids = torch.randint(3, VOCAB, (4, 5), generator=torch.Generator().manual_seed(0))
    task = cf.Task(ids[[0, 1, 0]], ids[[2, 3, 3]], [5, 6, 5], [7, 8, 7])
    circuit = some_circuits(model.graph)[2]
    expected = _expected(model, task, circuit)
    assert not np.allclose(expected[0], expected[2], atol=1e-3)
    with cf.only(model, circuit, task) as held:
        for rows in ([0], [2], [2, 1], [0, 1, 2]):
            torch.testing.assert_close(held.logits(rows), expected[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.hf(task.clean).logits[:, -1:], expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(cf.TaskError, match="rows 0, 2, with different corrupted prompts"):
            model.hf(ids[:1])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitfind.patching import only

    model, task = wrapped("gpt2"), id_task((5, 5))
    other = cf.Circuit.full(wrapped("llama").graph)
    with pytest.raises(cf.FileError, match="another model"), cf.only(model, other, task):
        pass
    with pytest.raises(cf.ModelError, match="bare GPT2LMHeadModel"), cf.only(model.hf, [], task):
        pass
    with pytest.raises(cf.TaskError, match="ablation 'half'"), cf.only(model, [], task, ablation="half"):
        pass
    monkeypatch.setattr(only, "KEPT_RUNS", 40_000)
    with pytest.raises(cf.TaskError, match=r"at most 1, task.on\(model\).subset\(range"), cf.only(model, [], task):
        pass
