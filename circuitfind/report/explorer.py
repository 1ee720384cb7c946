"""The circuit, to be explored: drawings at a few sizes, the controls around them, and the data for the script.

1. The slider's positions are the report's sizes; each says the faithfulness measured of that circuit, or that none was.
2. One drawing serves several positions (later arrows are hidden). A hundred edges among the places of a thousand cannot
   be read, so there is one for up to 30 edges, for up to 120, up to 400, and for all, as far as each is needed.
3. One block of JSON holds what the script needs: every edge's ends, effects and first position, the words of every
   position, and the attention patterns. Without the script the first drawing stands there alone.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from circuitfind.circuit import Circuit
from circuitfind.export.picture import joints, known
from circuitfind.graph import ends_of
from circuitfind.report.drawing import draw
from circuitfind.report.sizes import Size, say, sizes_of

if TYPE_CHECKING:
    from circuitfind.report.page import ReportData

BANDS = (30, 120, 400)  # edges of a drawing of its own
START = 120  # edges that are shown at first, if there are more
KINDS = {"q": "query", "k": "key", "v": "value", "mixer": "into mixer", "mlp": "into MLP", "logits": "into logits"}
DIGITS = 5  # of an effect; a tooltip shows three


def picture(data: ReportData) -> str:
    """The section: controls, drawings, the side panel, and the data block."""
    sizes = list(data.sizes) or sizes_of(data.circuit, data.faithfulness, data.interval)
    circuit, start = sizes[-1].circuit, first_shown(sizes)
    hint = "Point at a node or an edge for its numbers; click a node for its strongest inputs and outputs."
    keys = "Arrow keys walk from node to node, Enter opens one, + − 0 zoom."
    if not len(circuit):
        hint, keys = "No edge is in this circuit.", ""
    elif data.sizes:
        hint = f"{hint} Each size holds the strongest edges, as far as they are connected, and was run exactly."
    if len(circuit) < len(data.circuit):
        hint = f"The picture holds the strongest {len(circuit):,} of {len(data.circuit):,} edges. {hint}"
    parts = {"controls": _controls(circuit, sizes, start), "drawings": _drawings(sizes, start)}
    return filled("explorer.html", **parts, hint=hint, keys=keys, data=_json(_content(data, sizes)))


def first_shown(sizes: Sequence[Size]) -> int:
    """The position to start from: the largest that can be read, or the smallest there is."""
    return max((i for i, size in enumerate(sizes) if len(size.circuit) <= START), default=0)


def drawn_at(sizes: Sequence[Size]) -> list[int]:
    """Positions that have a drawing of their own, the last one always: each serves those up to it."""
    lengths, result = [len(size.circuit) for size in sizes], [len(sizes) - 1]
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
    positions = list(enumerate(sizes))
    first = {name: position for position, size in reversed(positions) for name in size.circuit.edges}
    edges, rows = {}, circuit.rows()
    for name, row in zip(circuit.edges, rows, strict=True):
        writer, reader = ends_of(name)
        numbers = (row.estimate, row.exact, *data.effect_intervals.get(name, (None, None)))
        kind = graph.reader(row.reader).kind
        edges[name] = [writer, reader.partition("<")[0], kind, *map(_short, numbers), first[name]]
    shared = defaultdict(list)
    for key_value, head in joints(graph, rows, circuit.nodes):
        shared[key_value].append(head)
    heads = [{name: b64encode(weights).decode() for name, weights in one.heads.items()} for one in data.attention]
    return {
        "whole": len(data.circuit),
        "edges": edges,
        "shared": shared,
        "sizes": [{"edges": len(size.circuit), "said": say(sizes, i, data.level)} for i, size in positions],
        "attention": [one._asdict() | {"heads": packed} for one, packed in zip(data.attention, heads, strict=True)],
        "note": data.attention_note or "Its attention pattern is not in this page.",
    }


def _controls(circuit: Circuit, sizes: Sequence[Size], start: int) -> str:
    if not len(circuit):
        return ""
    used = {circuit.graph.reader(row.reader).kind for row in circuit.rows()}
    chip = '<label class="chip"><input type="checkbox" data-kind="{0}" checked><i class="key {0}"></i>{1}</label>'
    kinds = "".join(chip.format(kind, name) for kind, name in KINDS.items() if kind in used)
    return filled("controls.html", kinds=kinds, last=len(sizes) - 1, start=start)


def filled(name: str, **values: object) -> str:
    """A template of this package with its values, which are HTML."""
    return Template(pieces(name)).substitute(values)


def pieces(*names: str) -> str:
    """Files of this package, one after the other."""
    folder = files("circuitfind.report")
    return "\n\n".join(folder.joinpath(name).read_text(encoding="utf-8").strip() for name in names)


def _short(value: float | None) -> float | None:
    value = known(value)
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _json(content: object) -> str:
    """JSON that cannot end the block it stands in."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
