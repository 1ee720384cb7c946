"""Models in which some layers have a mixer in place of attention: the graph, files, places and drawings of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import HYBRIDS, build, swept
from helpers import off
from patching_twin import PatchingTwin
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.errors import FileError, ModelError, ScoreError
from circuitfind.graph import Graph

GRAPH = Graph(3, 2, 1, 8, mixers=(1,))


def test_a_mixer_is_one_writer_and_one_reader() -> None:
    assert GRAPH.writer_names == ("input", "a0.h0", "a0.h1", "m0", "s1", "m1", "a2.h0", "a2.h1", "m2")
    assert GRAPH.reader_names[4:8] == ("m0", "s1", "m1", "a2.h0<q>")
    sees = {reader: GRAPH.writer_names[: GRAPH.limits[at]][-1] for at, reader in enumerate(GRAPH.reader_names)}
    assert (sees["s1"], sees["m1"], sees["a2.h0<q>"], sees["logits"]) == ("m0", "s1", "m1", "m2")
    assert [GRAPH.layer_of(u) for u in range(GRAPH.n_writers)] == [-1, 0, 0, 0, 1, 1, 2, 2, 2]
    assert [GRAPH.reader(r)[:2] for r in (0, 5, 6, 11)] == [(0, "q"), (1, "mixer"), (1, "mlp"), (2, "mlp")]
    assert GRAPH.node_names[GRAPH.serves[5].argmax()] == "s1" and GRAPH.serves[5].sum() == 1
    assert GRAPH.n_edges == sum(GRAPH.limits) and str(GRAPH).startswith("3 layers, 1 of them with a mixer in place")
    assert replace(GRAPH, mixers=()).as_dict() == {
        "n_layers": 3,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_model": 8,
        "parallel": False,
    }
    with pytest.raises(FileError, match="no such graph: 3 layers, and mixers in layers"):
        replace(GRAPH, mixers=(3,))


def test_files_keep_the_mixers(tmp_path: Path) -> None:
    model, task = wrapped("lfm2"), id_task((6, 5))
    scores = cf.attribute(model, task, "eap")
    scores.save(tmp_path / "scores.safetensors")
    assert cf.Scores.open(tmp_path / "scores.safetensors").graph == scores.graph == model.graph
    circuit = scores.top(10)
    circuit.save(tmp_path / "circuit.json")
    assert cf.Circuit.open(tmp_path / "circuit.json") == circuit
    sweep = cf.patch(model, task, "attn", by_position=False)
    assert sweep.names() == ["s0", "a1"]
    with pytest.raises(FileError, match=r"EAP-IG's files hold heads and MLPs only.*\(layer 0\)"):
        circuit.save(tmp_path / "other.json", format="eap-ig")


@pytest.mark.parametrize("name", swept(HYBRIDS))
def test_places_of_a_layer_with_a_mixer(name: str) -> None:
    """What it writes is patched as attention is; it has no heads."""
    model = wrapped(name)
    bound = id_task((6, 6)).on(model)
    assert model.graph.mixers == (0,)
    for what in ("mlp", "resid-mid", "resid"):
        sweep = cf.patch(model, bound, what, by_position=True)
        found = torch.from_numpy(sweep.per_example.reshape(2, 1, 6, 2))
        assert off(found, torch.from_numpy(PatchingTwin(model, bound).effects(what, True))) < 1e-4, what
    heads = cf.patch(model, bound, "heads", by_position=False)
    assert heads.names() == [f"a1.h{head}" for head in range(4)]
    with pytest.raises(ScoreError, match=r"no heads but a mixer in layers 0: patch what='attn' there"):
        cf.patch(model, bound, "v", layers=0)
    assert (cf.attribute(model, bound, "exact", level="node")["s0"]) == pytest.approx(
        cf.patch(model, bound, "attn", by_position=False).effects[0], rel=1e-4, abs=1e-5
    )


def test_results_are_drawn_and_shown() -> None:
    model, task = wrapped("lfm2"), id_task((7, 5, 6, 7))
    nodes, scores = cf.attribute(model, task, "atp", level="node"), cf.attribute(model, task, "eap")
    assert np.isnan(nodes.heads()[0]).all() and np.isfinite(nodes.heads()[1]).all()
    assert "mixer" in nodes._repr_html_()
    for found in (nodes, scores, scores.top(20), cf.direct_effects(model, task)):
        assert cf.plot(found).data
    drawn = cf.Circuit.of(model.graph, ["input->s0", "s0->m0", "m0->logits"]).to_dot()
    assert '"s0"' in drawn and "into mixer" in drawn
    with pytest.raises(ScoreError, match="a mixer has no queries, keys and values"):
        cf.attribute(model, task, "weights")


def test_what_cannot_be_covered_is_said() -> None:
    hf = build("granitemoehybrid")
    hf.config.num_local_experts = 4
    with pytest.raises(ModelError, match="experts and a shared MLP are added side by side"):
        cf.wrap(hf, None)
    hf = build("deepseek_v3")
    hf.config.model_type, hf.config.index_topk = "deepseek_v32", 2048
    with pytest.raises(ModelError, match="its indexer reads the stream beside q, k and v"):
        cf.wrap(hf, None)
    hf = build("lfm2")
    with pytest.raises(ModelError, match=r"'model\.layers\.1' has a mixer beside its attention"):
        hf.model.layers[1].conv = hf.model.layers[0].conv
        cf.wrap(hf, None)
    hf = build("lfm2")
    hf.model.layers, hf.config.num_hidden_layers = hf.model.layers[:1], 1
    with pytest.raises(ModelError, match="it has no attention at all"):
        cf.wrap(hf, None)
