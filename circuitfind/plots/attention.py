"""Heads' attention patterns: queries down, keys across, from 0 (white) to 1 (blue); each row sums to at most 1.

Several heads are panels of one figure, in the order given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.plots.heat import LETTER, axis, cells, colour_bar, heat
from circuitfind.plots.panels import Panel, heading, panels
from circuitfind.plots.style import LONGEST, Caption, Side, caption, safe, tokens_at

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.patching.attention import AttentionPattern

CELL, SMALLEST, LARGEST = 20, 200, 520  # pixels: of a token in a panel, and of panels
UNIT = "attention"


def attention(found: AttentionPattern | Sequence[AttentionPattern]) -> Figure:
    """Token by token.

    Raises:
        ScoreError: a pattern is not of its tokens.
    """
    several = list(found) if isinstance(found, Sequence) else [found]
    sides = [tokens_at(one.tokens) for one in several]
    texts = [_hover(one, labels) for one, labels in zip(several, sides, strict=True)]
    words = _words(several)
    if len(several) == 1:
        (one,), (labels,), (text,) = several, sides, texts
        return heat(one.pattern, Side("query", labels), Side("key", labels), text, words, UNIT, signed=False, most=1.0)
    size = float(np.clip(CELL * max(map(len, sides)), SMALLEST, LARGEST))
    parts: list[Panel] = []
    for one, labels, text in zip(several, sides, texts, strict=True):
        bar = {"showscale": not parts, "colorbar": colour_bar(UNIT, size)}
        cell = size / max(len(labels), 1)
        axes = axis(Side("key", labels), cell, across=True), axis(Side("query", labels), cell, across=False)
        parts.append(Panel(heading(one.head), [cells(one.pattern, text, 1.0, signed=False, **bar)], *axes))
    longest = LETTER * min(LONGEST, max((len(label) for labels in sides for label in labels), default=0))
    return panels(parts, words, size, size, (longest + 60, longest + 90), legend=90)


def _hover(one: AttentionPattern, labels: Sequence[str]) -> list[list[str]]:
    values = np.asarray(one.pattern, dtype=np.float64)
    if values.shape != (len(labels), len(labels)):
        raise ScoreError(
            f"an attention pattern of {len(labels)} tokens is [{len(labels)}, {len(labels)}], this one is"
            f" {list(values.shape)}: give one head's pattern on one prompt, without padding"
        )
    return [
        [
            f"<b>{safe(query)}</b> attends to <b>{safe(key)}</b><br>{value:.4f}"
            for key, value in zip(labels, row, strict=True)
        ]
        for query, row in zip(labels, values, strict=True)
    ]


def _words(found: Sequence[AttentionPattern]) -> Caption:
    heads = [one.head for one in found]
    names = ", ".join(heads) if len(heads) <= 4 else f"{len(heads)} heads"
    settings = found[0].record.settings
    side = f"{settings['side']} prompt" if "side" in settings else "prompt"
    prompts = {(one.tokens, one.record.settings.get("example")) for one in found}
    which = [f"{side} {settings['example']}"] if "example" in settings and len(prompts) == 1 else []
    return caption(f"Attention of {names}", replace(found[0].record, n_examples=0, metric=""), *which)
