"""A layer with a mixer in place of attention: a convolution, a state space, linear attention.

A mixer has no queries and keys that a graph could name. Like an MLP it is one node, but it moves information between
tokens. The engine treats it as attention with one head. This head's output is the input of the mixer's output
projection. Its only reader is q, which has no projection: its value is the normed stream, the input of the mixer's
module.

Some mixers (biased convolutions, as in Recurrent Gemma) treat left padding as tokens; tasks are padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuitfind.models.layer import Heads, LayerView, Layout, shape_of


@dataclass(frozen=True)
class MixerLayout(Layout):
    """One head, whose query is the mixer's input; no keys and values."""

    def parts(self, site: str, value: Tensor) -> dict[str, Tensor]:
        return {"q": value.unsqueeze(-2)}

    def gather(self, outputs: Mapping[str, Tensor]) -> Heads:
        return _alone(outputs["mixer"])

    def whole(self, site: str, parts: Mapping[str, Tensor], own: Tensor | None = None) -> Tensor:
        return parts["q"].squeeze(-2)


@dataclass(frozen=True, eq=False)
class MixerView(LayerView):
    """A block with a mixer."""

    @classmethod
    def of(cls, view: LayerView) -> MixerView:
        """Return the mixer's view from a general view of its block."""
        layout = MixerLayout("mixer", 1, 0, shape_of(view.module(view.family.o))[0])
        return cls(**{**vars(view), "layout": layout})

    @property
    def d_read(self) -> int:
        return shape_of(self.module(self.family.o))[1]

    def _reading(self) -> dict[str, Any]:
        return {}

    def projected(self, x: Tensor) -> Heads:
        return _alone(x)

    def qkv_weight(self) -> Heads:
        return _alone(torch.eye(self.d_read, dtype=self.work, device=self.device))


def _alone(read: Tensor) -> Heads:
    q = read.unsqueeze(-2)
    return Heads(q, q[..., :0, :], q[..., :0, :])
