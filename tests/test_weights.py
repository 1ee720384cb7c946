"""Weight composition against the products of whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from torch import Tensor, nn
from toys import FOUR, Twin, id_task, off_scores, wrapped

import circuitfind as cf
from circuitfind.errors import ScoreError

CLOSE = 1e-5
CENTRED = {"gpt2": True, "gpt_neox": True, "llama": False, "gemma2": False}  # LayerNorm or RMSNorm


class Matrices:
    """The matrices that a model's writers write with and its readers read with, whole, in float64."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, build(name)
        self.twin = Twin(wrapped(name), id_task((4, 4)).on(wrapped(name))).literal
        self.group = self.twin.n_heads // self.twin.n_kv_heads

    def at(self, layer: int, name: str) -> Tensor:
        """`[in, out]`."""
        module = self.model.get_submodule(self.twin.family.layers)[layer].get_submodule(name)
        return (module.weight.T if isinstance(module, nn.Linear) else module.weight).detach().double()

    def normed(self, norm: nn.Module, weight: Tensor) -> Tensor:
        """A weight `[in, out]` behind a norm: the stream loses its mean first (LayerNorm), then is scaled."""
        factors = norm.weight.detach().double() + (1 if "gemma" in self.name else 0)
        centring = torch.eye(len(weight), dtype=torch.float64) - CENTRED[self.name] / len(weight)
        return centring @ (factors[:, None] * weight)

    def norm(self, layer: int, name: str) -> nn.Module:
        return self.model.get_submodule(self.twin.family.layers)[layer].get_submodule(name)

    def projection(self, layer: int, kind: str, head: int) -> Tensor:
        """`[d_model, d_head]` of a query, or key/value head, behind the attention's norm."""
        family = self.twin.family
        weight = self.at(layer, family.qkv or getattr(family, kind))[:, self.twin._features(kind, head)]
        return self.normed(self.norm(layer, family.attn_norm), weight)

    def output(self, layer: int, head: int) -> Tensor:
        """`[d_head, d_model]` of a head, a post-norm's weight included."""
        width = self.twin.d_head
        weight = self.at(layer, self.twin.family.o)[head * width : (head + 1) * width]
        return self.behind(weight, layer, self.twin.family.post_attn_norm)

    def behind(self, weight: Tensor, layer: int, post_norm: str | None) -> Tensor:
        return weight if post_norm is None else weight * (1 + self.norm(layer, post_norm).weight.detach().double())

    def written_by(self, writer: str) -> Tensor:
        """`[*, d_model]`."""
        if writer == "input":
            return self.model.get_input_embeddings().weight.detach().double()
        layer = int(writer[1:].split(".")[0])
        if writer.startswith("m"):
            return self.behind(self.at(layer, self.twin.family.down), layer, self.twin.family.post_mlp_norm)
        head = int(writer.split(".h")[1])
        return self.projection(layer, "v", head // self.group) @ self.output(layer, head)

    def read_by(self, reader: str) -> Tensor:
        """`[d_model, *]`."""
        if reader == "logits":
            head = self.model.get_output_embeddings().weight.detach().double().T
            return self.normed(self.model.get_submodule(self.twin.family.final_norm), head)
        layer = int(reader[1:].split(".")[0])
        if reader.startswith("m"):
            inner = {"gpt2": ["c_fc"], "gpt_neox": ["dense_h_to_4h"]}.get(self.name, ["gate_proj", "up_proj"])
            weight = torch.cat([self.at(layer, f"mlp.{name}") for name in inner], dim=1)
            return self.normed(self.norm(layer, self.twin.family.mlp_norm), weight)
        kind, head = reader[-2], int("".join(c for c in reader.split(".")[1][:-3] if c.isdigit()))
        if kind == "q":
            return self.projection(layer, "q", head) @ self.projection(layer, "k", head // self.group).T
        if kind == "k":
            served = range(head * self.group, (head + 1) * self.group)
            key = self.projection(layer, "k", head)
            return torch.cat([key @ self.projection(layer, "q", query).T for query in served], dim=1)
        served = range(head * self.group, (head + 1) * self.group)
        value = self.projection(layer, "v", head)
        return torch.cat([value @ self.output(layer, query) for query in served], dim=1)


@pytest.mark.parametrize("name", FOUR)
def test_weight_composition_equals_the_product_of_whole_matrices(name: str) -> None:
    model, whole = wrapped(name), Matrices(name)
    expected = torch.zeros(model.graph.real.shape, dtype=torch.float64)
    for writer, reader in whole.twin.edges():
        written, read = whole.written_by(writer), whole.read_by(reader)
        if CENTRED[name]:
            written = written - written.mean(-1, keepdim=True)
        score = (written @ read).norm() / (written.norm() * read.norm())
        expected[model.graph.edge(f"{writer}->{reader}")] = score
    scores = cf.attribute(model, id_task((4, 4)), "weights")
    assert off_scores(scores, expected) < CLOSE
    real = scores.values[model.graph.real]
    assert real.min() > 0 and real.max() <= 1 and not scores.values[~model.graph.real].any()


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon", "falcon-new", "phi3", "granite", "olmo2", "gptj"])
def test_weights_of_other_layouts_are_found(name: str) -> None:
    scores = cf.attribute(wrapped(name), id_task((4, 4)), "weights")
    assert (scores.values[scores.graph.real] > 0.01).all() and scores.values.max() <= 1


def test_weights_need_no_particular_prompts_and_no_positive_factor_matters() -> None:
    hf = build("llama")
    before = cf.attribute(cf.wrap(hf, None), id_task(), "weights").values
    np.testing.assert_array_equal(cf.attribute(cf.wrap(hf, None), id_task((5, 6), seed=3), "weights").values, before)
    with torch.no_grad():
        hf.model.layers[0].self_attn.o_proj.weight.mul_(3)
        hf.model.layers[1].mlp.up_proj.weight.mul_(2)
        hf.model.layers[1].mlp.gate_proj.weight.mul_(2)
    after = cf.attribute(cf.wrap(hf, None), id_task(), "weights").values
    assert np.abs(after - before).max() < 1e-5 * before.max()


def test_experts_have_no_single_matrix() -> None:
    with pytest.raises(ScoreError, match=r"'weights' cannot score this model: its MLPs are mixtures of experts"):
        cf.attribute(wrapped("mixtral"), id_task(), "weights")


def test_keys_of_a_latent_have_no_single_matrix() -> None:
    with pytest.raises(ScoreError, match=r"'weights' cannot score this model: a norm stands between two projections"):
        cf.attribute(wrapped("youtu"), id_task(), "weights")
