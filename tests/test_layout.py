"""Fused projections taken apart into heads, against features counted out one by one."""

from __future__ import annotations

import pytest
import torch

from circuitfind.models.layer import Heads, Layout

LAYOUTS = [
    Layout("concat", 4, 4, 3),
    Layout("concat", 6, 2, 3),
    Layout("per_head", 4, 4, 3),
    Layout("grouped", 6, 2, 3),
    Layout("grouped", 4, 1, 3),
    Layout("grouped", 4, 4, 3),
]


def owners(layout: Layout) -> list[tuple[str, int, int]]:
    """(kind, head, feature) of each output feature, in order."""
    h, g = layout.n_heads, layout.n_kv_heads
    if layout.kind == "concat":
        runs = [("q", i) for i in range(h)] + [("k", i) for i in range(g)] + [("v", i) for i in range(g)]
    elif layout.kind == "per_head":
        runs = [(kind, i) for i in range(h) for kind in "qkv"]
    else:
        runs = []
        for group in range(g):
            runs += [("q", group * (h // g) + i) for i in range(h // g)] + [("k", group), ("v", group)]
    return [(kind, head, e) for kind, head in runs for e in range(layout.d_head)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_feature_lands_at_its_head(layout: Layout) -> None:
    owned = owners(layout)
    features = torch.arange(len(owned)) + torch.zeros(2, 5, 1, dtype=torch.long)
    heads = layout.split(features)
    assert heads.q.shape == (2, 5, layout.n_heads, layout.d_head)
    assert heads.k.shape == heads.v.shape == (2, 5, layout.n_kv_heads, layout.d_head)
    for index, (kind, head, e) in enumerate(owned):
        assert (getattr(heads, kind)[..., head, e] == index).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("leading", [(), (7,), (2, 5)])
def test_join_undoes_split(layout: Layout, leading: tuple[int, ...]) -> None:
    features = torch.randn(*leading, len(owners(layout)), generator=torch.Generator().manual_seed(0))
    assert torch.equal(layout.join(layout.split(features)), features)
    assert torch.equal(layout.join(Heads(*(part.clone() for part in layout.split(features)))), features)
