"""The circuit itself, to be explored: drawings at a few sizes, the controls around them, and the data for the script.

1. The slider's positions are the report's sizes; each says the faithfulness that was measured of precisely that
   circuit, or that none was.
2. One drawing serves several positions (the arrows that come later are hidden), but no drawing has many times more
   edges than what is shown of it: a hundred edges among the places of a thousand cannot be read. So there is one for
   up to 30 edges, one for up to 120, up to 400, and one for all, as far as each is needed.
3. What the script needs to know stands in one block of JSON: every edge's ends, effects and first position, the words
   of every position, and the attention patterns. Without the script the first drawing stands there alone.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from circuitfind.circuit import Circuit
from circuitfind.export.picture import joints, known
from circuitfind.report.drawing import draw
from circuitfind.report.sizes import Size, say, sizes_of

if TYPE_CHECKING:
    from circuitfind.report.page import ReportData

BANDS = (30, 120, 400)  # edges of a drawing of its own
START = 120  # edges that are shown at first, if there are more
KINDS = {"q": "query", "k": "key", "v": "value", "mlp": "into MLP", "logits": "into logits"}
DIGITS = 5  # of an effect; a tooltip shows three


def picture(data: ReportData) -> str:
    """The section: controls, drawings, the side panel, and the data block."""
    sizes = list(data.sizes) or sizes_of(data.circuit, data.faithfulness, data.interval)
    circuit = sizes[-1].circuit
    start = first_shown(sizes)
    hint = "Point at a node or an edge for its numbers; click a node for its strongest inputs and outputs."
    keys = "Arrow keys walk from node to node, Enter opens one, + − 0 zoom."
    if not len(circuit):
        hint, keys = "No edge is in this circuit.", ""
    elif data.sizes:
        hint = f"{hint} Each size holds the strongest edges, as far as they are connected, and was run exactly."
    if len(circuit) < len(data.circuit):
        hint = f"The picture holds the strongest {len(circuit):,} of {len(data.circuit):,} edges. {hint}"
    parts = {"controls": _controls(circuit, sizes, start), "drawings": _drawings(sizes, start)}
    return _filled("explorer.html", **parts, hint=hint, keys=keys, data=_json(_content(data, sizes)))


def first_shown(sizes: Sequence[Size]) -> int:
    """The position to start from: the largest that can be read, or the smallest there is."""
    readable = [i for i, size in enumerate(sizes) if len(size.circuit) <= START]
    return readable[-1] if readable else 0


def drawn_at(sizes: Sequence[Size]) -> list[int]:
    """Positions that have a drawing of their own, the last one always: each serves those up to it."""
    lengths = [len(size.circuit) for size in sizes]
    result = [len(sizes) - 1]
    for band in reversed(BANDS):
        fitting = [i for i, length in enumerate(lengths) if length <= band]
        if fitting and lengths[fitting[-1]] <= 0.6 * lengths[result[0]]:
            result.insert(0, fitting[-1])
    return result


def _drawings(sizes: Sequence[Size], start: int) -> str:
    parts, shown = [], False
    for last in drawn_at(sizes):
        circuit = sizes[last].circuit
        here, shown = not shown and last >= start, shown or last >= start
        drawing = draw(circuit.graph, circuit.rows(), circuit.nodes)
        parts.append(f'<div class="plate" data-last="{last}"{"" if here else " hidden"}>{drawing}</div>')
    return "\n".join(parts)


def _content(data: ReportData, sizes: Sequence[Size]) -> dict[str, object]:
    """What the script knows. An edge: from, to, kind, estimate, exact, its interval's two ends, first position."""
    circuit, graph = sizes[-1].circuit, data.circuit.graph
    first: dict[str, int] = {}
    for position in reversed(range(len(sizes))):
        first |= dict.fromkeys(sizes[position].circuit.edges, position)
    edges = {}
    rows = circuit.rows()
    for row in rows:
        name, reader = graph.edge_name(row.writer, row.reader), graph.reader(row.reader)
        ends = (graph.writer_names[row.writer], graph.reader_names[row.reader].partition("<")[0])
        low, high = data.effect_intervals.get(name, (None, None))
        numbers = [_short(value) for value in (row.estimate, row.exact, low, high)]
        edges[name] = [*ends, reader.kind, *numbers, first[name]]
    shared: dict[str, list[str]] = {}
    for key_value, head in joints(graph, rows, circuit.nodes):
        shared.setdefault(key_value, []).append(head)
    return {
        "whole": len(data.circuit),
        "edges": edges,
        "shared": shared,
        "sizes": [
            {"edges": len(size.circuit), "said": say(sizes, position, data.level)}
            for position, size in enumerate(sizes)
        ],
        "attention": [
            {
                "prompt": example.prompt,
                "tokens": example.tokens,
                "heads": {name: b64encode(weights).decode() for name, weights in example.heads.items()},
            }
            for example in data.attention
        ],
        "note": data.attention_note or "Its attention pattern is not in this page.",
    }


def _controls(circuit: Circuit, sizes: Sequence[Size], start: int) -> str:
    if not len(circuit):
        return ""
    used = {circuit.graph.reader(row.reader).kind for row in circuit.rows()}
    chip = '<label class="chip"><input type="checkbox" data-kind="{0}" checked><i class="key {0}"></i>{1}</label>'
    kinds = "".join(chip.format(kind, name) for kind, name in KINDS.items() if kind in used)
    return _filled("controls.html", kinds=kinds, last=len(sizes) - 1, start=start)


def _filled(name: str, **values: object) -> str:
    """A template of this package with its values, which are HTML."""
    text = files("circuitfind.report").joinpath(name).read_text(encoding="utf-8").strip()
    return Template(text).substitute(values)


def _short(value: float | None) -> float | None:
    value = known(value)
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _json(content: object) -> str:
    """JSON that cannot end the block it stands in."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
