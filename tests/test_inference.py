"""Rows that are inferred by a model's modules, rows that are named, and rows that are wrong."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import build
from helpers import off, random_pairs
from oracles import Literal, patch_edges
from test_restart import Edges
from torch import nn

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.engine.identities import check_identities
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import observe
from circuitfind.models.families import FAMILIES, Family, family_of
from circuitfind.models.heads import HEADS, READERS
from circuitfind.models.inference import row_of

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "families.py"


def _script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("family_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["family_table"] = module
    spec.loader.exec_module(module)
    return module


TYPES = _script()


PAGE = SCRIPT.parents[1] / "docs" / "family-table.md"
SAID = {line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
FIGURES = re.compile(r"[\d.]+(e-\d+)?( \(allowed|(?= \|))")
WRONG: list[tuple[str, dict[str, Any], str]] = [  # a model, changes of its row, the identity that must fail
    ("llama", {"attn_norm": "post_attention_layernorm", "mlp_norm": "input_layernorm"}, "all edges in = clean run"),
    ("llama", {"mlp_norm": None}, "all edges in = clean run"),
    ("llama", {"k": "self_attn.v_proj", "v": "self_attn.k_proj"}, HEADS),
    ("opt", {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}, HEADS),
    ("gpt2", {"layout": "per_head"}, HEADS),
    ("bloom", {"layout": "concat"}, HEADS),
    ("codegen", {"layout": "concat"}, HEADS),
    ("falcon-new", {"layout": "concat"}, HEADS),
    ("gptj", {"parallel": False}, "all edges in = clean run"),
    ("gpt_neox", {"variants": (), "parallel": False}, "all edges in = clean run"),
    ("gpt_neox-sequential", {"parallel": True}, "all edges in = clean run"),
    ("cohere", {"parallel": False}, "all edges in = clean run"),
    ("gemma2", {"post_attn_norm": None}, "writers + output biases = residual stream"),
    ("olmo2", {"post_mlp_norm": None, "mlp_norm": "post_feedforward_layernorm"}, "residual stream"),
    ("granite", {"residual_multiplier": None}, "writers + output biases = residual stream"),
]
READ = (
    "apertus",
    "biogpt",
    "exaone4",
    "gemma4_text",
    "glm4_moe",
    "hyperclovax",
    "jais2",
    "nemotron",
    "vaultgemma",
    "xglm",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES.KINDS)
def test_every_causal_type_loads_right_or_is_refused_in_a_sentence(kind: str) -> None:
    """As the table in docs says, but for figures."""
    if kind in TYPES.NOT_BUILT:
        assert TYPES.NOT_BUILT[kind] in SAID[kind]
        return
    found = TYPES.verdict(kind)
    if found.error is None:
        assert "\n" not in found.why and "not covered" in found.why
    else:
        assert found.error < 1e-5
    assert FIGURES.sub("", TYPES.cells(found)) == FIGURES.sub("", SAID[kind])


def test_the_table_holds_every_type_and_most_load() -> None:
    assert list(SAID) == TYPES.KINDS
    loads = sum("| loads;" in line for line in SAID.values())
    assert f"{loads} load." in PAGE.read_text(encoding="utf-8") and loads >= 80


@pytest.mark.parametrize("name, changes, identity", WRONG)
def test_a_wrong_row_is_caught(name: str, changes: dict[str, Any], identity: str) -> None:
    model = build(name)
    row = replace(family_of(model.config), **changes)
    with pytest.raises(cf.ModelError, match=re.escape(identity)):
        cf.wrap(model, family=row)


def test_what_the_other_identities_do_not_see() -> None:
    """A wrong order of features, and an output gate that reads the stream, too: both are whole as sums."""
    for model, row in ((build("gpt2"), replace(FAMILIES["gpt2"], layout="per_head")), (TYPES.build("afmoe"), None)):
        found = inferred_row(model) if row is None else row
        adapter = Adapter(model, found)
        observe(adapter)
        failing = {one.name for one in check_identities(adapter) if not one.holds}
        assert failing and failing <= {HEADS, READERS}


def inferred_row(model: nn.Module) -> Family:
    row, how = row_of(model)
    assert row is not None and how.startswith("inferred as ")
    return row


@pytest.mark.parametrize("kind", READ)
def test_exact_edges_of_inferred_rows_equal_a_forward_pass_of_their_own(kind: str) -> None:
    """One edge into each kind of reader of the last layer, and into one of the first."""
    model, pairs = TYPES.build(kind), random_pairs(left=(0, 0), right=(0, 3))
    adapter = cf.wrap(model).adapter
    literal, patched = Literal(model, family=adapter.family), Edges(adapter, pairs.clean, pairs.corrupted)
    edges = [edge for edge in literal.edges() if edge[0] in ("input", "a0.h2", "m0")]
    edges = [edge for edge in edges if edge[1] in ("logits", "m1", "a0.h3<q>") or edge[1].startswith("a1.")]
    with torch.no_grad():
        run, source = literal.run(pairs.clean), literal.run(pairs.corrupted)
    change = {name: source.writers[name] - value for name, value in run.writers.items()}
    literal.check_unchanged(pairs.clean, run)
    found = [
        patched.patch(adapter.graph.reader_names.index(reader), [adapter.graph.writer(writer)])[0]
        for writer, reader in edges
    ]
    expected = patch_edges(literal, pairs.clean, change, edges)
    assert off(torch.stack(found), expected) < 1e-5
    assert off(torch.stack(found) - patched.base.logits, expected - run.logits) < 1e-4


def test_the_row_is_told() -> None:
    model = cf.wrap(TYPES.build("apertus"), check=False)
    row = "inferred as llama with attn_norm='attention_layernorm', mlp_norm='feedforward_layernorm'"
    assert f"apertus ({row})" in repr(model)
    task = cf.Task(torch.tensor([[3, 4, 5]]), torch.tensor([[3, 6, 5]]), [7], [8])
    assert f"family: {row}" in cf.attribute(model, task, "eap").record.settings["notes"]
    own = cf.wrap(build("llama"))
    assert "(" not in repr(own).split(",")[0].removeprefix("Model(") and own.row == ""


def test_a_row_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("cohere")
    assert cf.wrap(model, family="cohere").graph == cf.wrap(model).graph
    assert "cohere (as cohere)" in repr(cf.wrap(model, family="cohere"))
    monkeypatch.setitem(sys.modules, "own_rows", types.ModuleType("own_rows"))
    sys.modules["own_rows"].ROW = FAMILIES["cohere"]
    assert cf.wrap(model, family="own_rows:ROW").graph == cf.wrap(model).graph
    with pytest.raises(cf.ModelError, match="family 'lama' is unknown: did you mean 'llama'"):
        cf.wrap(model, family="lama")
    with pytest.raises(cf.ModelError, match="self-check failed"):
        cf.wrap(model, family=replace(FAMILIES["cohere"], parallel=False))


def test_a_row_is_named_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "tiny", "--family", "gpt2"]) == 0
    assert "gpt2 (as gpt2)" in capsys.readouterr().out
    assert main(["doctor", "tiny", "--family", "gpt3"]) != 0
    assert "family 'gpt3' is unknown" in capsys.readouterr().err


def test_an_inferred_row_is_proved_whether_or_not_a_check_is_asked_for() -> None:
    with pytest.raises(cf.ModelError, match=r"'afmoe' is not covered: inferred as .* 'nothing but q, k, v and MLP"):
        cf.wrap(TYPES.build("afmoe"), check=False)


def test_a_folder_of_another_kind_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    TYPES.config_of("mamba").save_pretrained(tmp_path)
    with pytest.raises(cf.ModelError, match="'mamba' is not covered: no row of the family table fits"):
        cf.load(tmp_path)


def test_a_head_that_is_no_linear_map_has_no_direct_effects() -> None:
    model = cf.wrap(build("modernbert-decoder"))
    task = cf.Task(torch.tensor([[3, 4, 5]]), torch.tensor([[3, 6, 5]]), [7], [8])
    with pytest.raises(cf.ScoreError, match="not a linear map of its final norm's output"):
        cf.attribute(model, task, "direct", level="node")
    with pytest.raises(cf.ScoreError, match="not a linear map of its final norm's output"):
        cf.attribute(model, task, "weights")


@pytest.mark.parametrize("positions", [2, 3])
def test_models_of_few_positions_are_proved(positions: int) -> None:
    config = hf.GPT2Config(vocab_size=20, n_positions=positions, n_embd=16, n_layer=2, n_head=2)
    assert cf.wrap(hf.GPT2LMHeadModel(config), None).graph.n_layers == 2
