"""A model on several devices, or one that loads its weights as it needs them, gives the numbers of the whole one."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from families import VOCAB, build
from second_device import THERE, no_waiting, put_there, second_device
from torch import Tensor, nn

import circuitfind as cf
from circuitfind.models import backends, load
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import undisturbed

Found = dict[str, Any]
DIVIDED = Path(__file__).with_name("divided.py")


def pairs_of(hf: Any) -> cf.Task:
    """Pairs whose answers are what a model says to each side."""
    ids = torch.randint(3, VOCAB, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    ids[1, :, :2] = ids[0, :, :2]
    with torch.no_grad():
        clean, corrupted = (hf(side).logits[:, -1] for side in ids)
    right, wrong = ((one - other).argmax(-1) for one, other in ((clean, corrupted), (corrupted, clean)))
    return cf.Task(clean=ids[0], corrupted=ids[1], answers=right.tolist(), wrong_answers=wrong.tolist())


def everything(model: cf.Model, pairs: cf.Task) -> Found:
    """What each room of the package computes from a model."""
    scores, real = cf.attribute(model, pairs, "eap"), model.graph.real
    circuit, few = scores.top(40), scores.top(8)
    return {
        "eap": scores.values[real],
        "ig": cf.attribute(model, pairs, "eap-ig-inputs", steps=2).values[real],
        "nodes": cf.attribute(model, pairs, "atp", level="node").values,
        "exact": [row.exact for row in cf.verify(model, pairs, scores, circuit=circuit, top=4, random=0).edges],
        "corrupted": cf.evaluate(model, pairs, circuit).metric,
        "mean": cf.evaluate(model, pairs, circuit, ablation="mean").metric,
        "acdc": cf.acdc(model, pairs, threshold=0.01, order=few.edges).edges,
        "find": cf.find(model, pairs, edges=20, random=0, knockouts=0, max_checks=2).circuit.edges,
    }


def by_other_ways(model: cf.Model, pairs: cf.Task) -> Found:
    """What hooks of its own, other rules back, or weights alone make of a model."""
    kinds, methods = ("heads", "pattern"), {"gim": "edge", "direct": "node"}
    sweeps = {kind: cf.patch(model, pairs, kind).effects for kind in kinds}
    scores = {name: cf.attribute(model, pairs, name, level=level).values for name, level in methods.items()}
    return {**sweeps, **scores, "weights": cf.attribute(model, pairs, "weights").values}


def last_block(hf: Any) -> str:
    blocks = next(path for path, module in hf.named_modules() if isinstance(module, nn.ModuleList))
    return f"{blocks}.{hf.config.num_hidden_layers - 1}"


def offloaded(hf: Any, folder: Path) -> Any:
    """The last block and every norm on disk."""
    last = f"{last_block(hf)}."
    leaves = [path for path, module in hf.named_modules() if [*module.parameters(recurse=False)]]
    places = {path: "disk" if path.startswith(last) or "norm" in path or "ln_" in path else "cpu" for path in leaves}
    return dispatch_model(hf, places, offload_dir=str(folder))


@pytest.mark.parametrize(("name", "backend"), [("gpt2", "hooks"), ("gemma2", "nnsight")])
def test_weights_on_disk_give_the_same_bits(name: str, backend: str, tmp_path: Path) -> None:
    whole, hf = build(name), offloaded(build(name), tmp_path)
    before = [(path, weight.is_meta, weight.requires_grad) for path, weight in hf.named_parameters()]
    assert any(is_meta for _, is_meta, _ in before)
    model, pairs = cf.wrap(hf, backend=backend, name=name), pairs_of(whole)
    expected = everything(cf.wrap(whole, backend=backend, name=name), pairs)
    for key, value in everything(model, pairs).items():
        assert np.array_equal(value, expected[key]), key
    assert [(path, weight.is_meta, weight.requires_grad) for path, weight in hf.named_parameters()] == before
    assert not model.adapter.state.hooks  # accelerate's are no hooks of the user's


@pytest.mark.slow
def test_no_tensor_is_formed_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build("llama")
    whole.set_attn_implementation("eager")  # another kind of device may take another kernel
    pairs, model = pairs_of(whole), cf.wrap(whole, backend="hooks", name="llama")
    expected = everything(model, pairs) | by_other_ways(model, pairs)
    monkeypatch.setattr("circuitfind.models.adapter.Adapter._check_weights", lambda self: None)
    with second_device():
        hf = build("llama")
        hf.set_attn_implementation("eager")
        put_there(hf, last_block(hf))
        assert {weight.device for weight in hf.parameters()} == {torch.device("cpu"), THERE}
        model = cf.wrap(hf, backend="hooks", name="llama")
        for key, value in (everything(model, pairs) | by_other_ways(model, pairs)).items():
            assert np.array_equal(value, expected[key]), key


@pytest.mark.slow
def test_nothing_waits_for_the_device_inside_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a pass's first site and its last, and on the way back, what is done is asked for and not waited for."""
    whole = build("llama")
    whole.set_attn_implementation("eager")
    pairs, sites = pairs_of(whole), []
    monkeypatch.setattr("circuitfind.models.adapter.Adapter._check_weights", lambda self: None)
    monkeypatch.setattr("circuitfind.engine.memory_plan._free", lambda device: 2**30)

    def strict(adapter: Adapter, visit: Any) -> Any:
        def visited(site: str, layer: int, value: Tensor) -> Any:
            sites.append(site)
            with no_waiting():
                return visit(site, layer, value)

        return visited

    back = torch.autograd.grad

    def strict_back(*args: Any, **kwargs: Any) -> Any:
        with no_waiting():
            return back(*args, **kwargs)

    with second_device():
        model = cf.wrap(whole.to(THERE), backend="hooks", name="llama")
        monkeypatch.setattr(backends, "_at_home", strict)
        monkeypatch.setattr(torch.autograd, "grad", strict_back)
        for method in ("relp", "gim", "eap-ig-activations"):
            cf.attribute(model, pairs, method)
        cf.learn_masks(model, pairs, "edge-pruning", steps=2, batch_size=2)
        for kind in ("heads", "q", "resid", "mlp"):
            cf.patch(model, pairs, kind)
        scores = cf.attribute(model, pairs, "eap")
        for ablation in ("corrupted", "zero"):
            cf.evaluate(model, pairs, scores.top(40), ablation=ablation)
        cf.acdc(model, pairs, threshold=0.01, order=scores.top(6).edges)
        cf.find(model, pairs, edges=20, random=0, knockouts=0, max_checks=0)
    assert len(sites) > 1000


def test_the_second_device_is_one() -> None:
    with second_device():
        there = torch.ones(2, 3).to(THERE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        assert (there + 1).to("cpu").sum() == 12
        ones = there[0].long()
        waiting: list[Any] = [there.sum().item, there.cpu, there.tolist, there.nonzero, lambda: bool(there.any())]
        waiting += [lambda: there[there > 0], lambda: there.masked_select(there > 0), lambda: torch.equal(there, there)]
        waiting += [lambda: there[:, torch.tensor([0, 1])], lambda: there[:, np.array([0, 1])], there.unique]
        waiting += [lambda: torch.tensor([1, 2], device=THERE), lambda: ones.repeat_interleave(ones), ones.bincount]
        waiting += [lambda: there.copy_(torch.ones(2, 3)), lambda: torch.ones(2, 3).copy_(there)]
        for waits in waiting:
            with pytest.raises(RuntimeError, match="waits for the device"), no_waiting():
                waits()
        with no_waiting():
            at = torch.tensor([0, 1]).to(THERE, non_blocking=True)
            there[:, at] = there[:, at] + there.index_select(1, at)
            there.masked_fill_(there > 1, 0).where(there > 0, 1).sort()


def test_autograd_keeps_no_offloaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Tensor]] = []
    load_weights = AlignDevicesHook.pre_forward

    def note(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load_weights(hook, module, *args, **kwargs)
        loaded.extend(
            weakref.ref(weight) for weight in module._parameters.values() if hook.offload and weight is not None
        )
        return result

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", note)
    gradients = []
    for hf in (build("llama"), offloaded(build("llama"), tmp_path)):
        start = hf.get_input_embeddings()(torch.arange(3, 9)[None]).detach().requires_grad_()
        with undisturbed(hf):
            logits = hf(inputs_embeds=start, use_cache=False).logits
        gc.collect()
        assert not any(weight() is not None for weight in loaded)
        gradients.append(torch.autograd.grad(logits.square().sum(), start)[0])
    assert loaded and torch.equal(*gradients)


def test_what_a_device_map_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cf.ModelError, match="device_map= places every part of 'tiny', and device='cpu' the whole"):
        cf.load("tiny", device="cpu", device_map="auto")
    with pytest.raises(cf.ModelError, match=r"cannot load .* found nowhere"):
        cf.load("tiny", device_map="nowhere")
    assert cf.load("tiny", device_map="cpu", check=False).place == "cpu"
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(
        cf.ModelError, match=r"accelerate, which is not installed: pip install 'circuitfind\[devices\]'"
    ):
        cf.load("tiny", device_map="auto")


@pytest.mark.parametrize("wrong", [{}, {"": "disk"}, {"": None}, ["cpu"]])
def test_a_device_map_without_a_device_is_refused(wrong: object) -> None:
    with pytest.raises(cf.ModelError, match="puts no part of 'tiny' on a device"):
        cf.load("tiny", device_map=wrong)


def test_a_device_map_of_another_model_is_refused() -> None:
    """Its places would silently not be those of any part."""
    with pytest.raises(cf.ModelError, match=r"names 'model.layers.0', which 'tiny' does not have: it has tr"):
        cf.load("tiny", device_map={"": "cpu", "model.layers.0": "disk"}, offload_folder="unused")


@pytest.mark.slow
def test_heads_divided_among_processes_give_the_same_scores(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(DIVIDED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4 and max(errors.values()) < 1e-5, errors
