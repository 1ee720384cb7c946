"""The interactive section of the circuit: drawings at a few sizes, controls, and the data for the script.

1. The slider's positions are the report's sizes. Each shows the measured faithfulness of its circuit, or says
   that it was not measured.
2. One drawing serves several positions: arrows of larger sizes are hidden. A hundred edges in a layout made for a
   thousand would be illegible, so up to three drawings are made: for up to 30, 120 and 400 edges. The script shows
   larger sizes as a matrix of layers.
3. A block of JSON holds the script's data: the ends, effects and first position of every edge, the text of every
   position, and the attention patterns. Without the script only the first drawing is shown.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.export.arrows import joints, known
from circuitfind.export.graphs import EdgeRow
from circuitfind.graph import ends_of
from circuitfind.report.drawing import draw
from circuitfind.report.sizes import Size, say, sizes_of, strongest

if TYPE_CHECKING:
    from circuitfind.report.page import ReportData

BANDS = (30, 120, 400)  # most edges in each drawing
START = 120  # most edges in the size shown first
KINDS = {"q": "query", "k": "key", "v": "value", "mixer": "into mixer", "mlp": "into MLP", "logits": "into logits"}
MARKS = {"both": "in both", "here": "only in this circuit", "there": "only in the other"}
MOST_PLACES = 16  # with more places there are no checkboxes for them
DIGITS = 5  # significant digits of an effect in the data; tooltips show three


def picture(data: ReportData) -> str:
    """Return the section as HTML: controls, drawings, side panel and data block."""
    both, marks = compared(data.circuit, data.beside)
    sizes = list(data.sizes) or sizes_of(both, None if marks else data.faithfulness, data.interval)
    circuit, start = sizes[-1].circuit, first_shown(sizes)
    hint = "Point at a node or an edge for its numbers; click a node for its strongest inputs and outputs."
    keys = "Keys: arrows move between nodes, Enter opens a node, + and − zoom, 0 fits the picture to its frame."
    if not len(circuit):
        hint, keys = "This circuit has no edges.", ""
    elif data.sizes:
        hint = f"{hint} Each size on the slider is a circuit of the strongest connected edges, and was run exactly."
    if len(circuit) < len(both):
        hint = f"The picture shows the strongest {len(circuit):,} of {len(both):,} edges. {hint}"
    if data.beside is not None:
        other = data.beside.record
        of = f" for {other.task}" * bool(other.task) + f" in {other.model}" * bool(other.model)
        agree = f"{data.circuit.jaccard(data.beside):.2f} of the edges of both together are shared (Jaccard)"
        hint = f"The other circuit: {len(data.beside):,} edges{escape(of)}; {agree}. {hint}"
    controls, drawings = _controls(circuit, sizes, start, marks, data.places), _drawings(sizes, start, marks)
    told = {"controls": controls, "drawings": drawings, "hint": hint, "keys": keys}
    return filled("explorer.html", **told, data=_json(_content(data, sizes, both, marks)))


def compared(circuit: Circuit, beside: Circuit | None) -> tuple[Circuit, dict[str, str]]:
    """Return the union of two circuits, and by edge whether it is in `both`, only `here` (`circuit`) or only `there`
    (`beside`). Effects are those of `circuit` where it has any, else those of `beside`."""
    if beside is None:
        return circuit, {}
    both = circuit | beside
    rows: dict[str, EdgeRow] = {}
    for one in (beside, circuit):
        named = zip(one.edges, one.rows(), strict=True)
        rows |= {name: row for name, row in named if row.effect is not None or name not in rows}
    effects = np.full((2, *both.mask.shape), np.nan, dtype=np.float32)
    for row in rows.values():
        effects[:, row.writer, row.reader] = row.estimate, row.exact
    here, there = set(circuit.edges), set(beside.edges)
    marks = {name: "both" if name in here & there else "here" if name in here else "there" for name in both.edges}
    return replace(both, estimates=effects[0], exact=effects[1]), marks


def first_shown(sizes: Sequence[Size]) -> int:
    """The position shown first: the largest of at most `START` edges, or the smallest."""
    return max((i for i, size in enumerate(sizes) if len(size.circuit) <= START), default=0)


def drawn_at(sizes: Sequence[Size]) -> list[int]:
    """Positions with a drawing, which also serves the smaller positions; if all circuits are larger than the largest
    drawing, only the first, of which the strongest edges are drawn."""
    lengths, result = [len(size.circuit) for size in sizes], list[int]()
    for band in reversed(BANDS):
        fitting = [i for i, length in enumerate(lengths) if length <= band]
        if fitting and (not result or lengths[fitting[-1]] <= 0.6 * lengths[result[0]]):
            result.insert(0, fitting[-1])
    return result or [0]


def _drawings(sizes: Sequence[Size], start: int, marks: Mapping[str, str]) -> str:
    parts, shown = [], False
    for last in drawn_at(sizes):
        circuit = strongest(sizes[last].circuit, BANDS[-1])
        here, shown = not shown and last >= start, shown or last >= start
        drawing = draw(circuit.graph, circuit.rows(), circuit.nodes, marks)
        parts.append(f'<div class="plate" data-last="{last}"{"" if here else " hidden"}>{drawing}</div>')
    return "\n".join(parts)


def _content(data: ReportData, sizes: Sequence[Size], both: Circuit, marks: Mapping[str, str]) -> dict[str, object]:
    """The script's data. An edge is a list: from, to, kind, estimate, exact, the two ends of its interval, its first
    position, and in a comparison its mark."""
    circuit, graph = sizes[-1].circuit, data.circuit.graph
    positions = list(enumerate(sizes))
    first = {name: position for position, size in reversed(positions) for name in size.circuit.edges}
    edges, rows = {}, circuit.rows()
    for name, row in zip(circuit.edges, rows, strict=True):
        writer, reader = ends_of(name)
        numbers = (row.estimate, row.exact, *data.effect_intervals.get(name, (None, None)))
        kind = graph.reader(row.reader).kind
        edges[name] = [writer, reader.partition("<")[0], kind, *map(_short, numbers), first[name]]
        edges[name] += [marks[name]] if marks else []
    shared = defaultdict(list)
    for key_value, head in joints(graph, rows, circuit.nodes):
        shared[key_value].append(head)
    heads = [{name: b64encode(weights).decode() for name, weights in one.heads.items()} for one in data.attention]
    return {
        "whole": len(both),
        "level": f"{data.level:.0%}",
        "edges": edges,
        "shared": shared,
        "groups": data.circuit.groups,
        "places": {name: [(place, _short(value)) for place, value in data.places.get(name, ())] for name in edges},
        "direct": {name: _short(value) for name, value in data.direct.items()},
        "sizes": [{"edges": len(size.circuit), "said": say(sizes, i, data.level)} for i, size in positions],
        "attention": [one._asdict() | {"heads": packed} for one, packed in zip(data.attention, heads, strict=True)],
        "note": data.attention_note or "This page does not contain its attention pattern.",
    }


def _controls(
    circuit: Circuit,
    sizes: Sequence[Size],
    start: int,
    marks: Mapping[str, str],
    places: Mapping[str, Sequence[tuple[str, float]]],
) -> str:
    if not len(circuit):
        return ""
    used, counts = {circuit.graph.reader(row.reader).kind for row in circuit.rows()}, Counter(marks.values())
    at = dict.fromkeys(found[0][0] for name in circuit.edges if (found := places.get(name)))
    # in a comparison, colours show which circuit an edge belongs to
    kinds = [_chip("kind", kind, name, not marks) for kind, name in KINDS.items() if kind in used]
    whose = [_chip("mark", mark, f"{name} ({counts[mark]:,})", True) for mark, name in MARKS.items() if counts[mark]]
    spans = [_chip("place", place, place, False) for place in at] if 1 < len(at) <= MOST_PLACES else []
    parts = {
        "marks": f'<fieldset><legend class="hush">Show edges of</legend>{"".join(whose)}</fieldset>' if marks else "",
        "kinds": "".join(kinds),
        "places": f"<fieldset><legend>mostly at</legend>{''.join(spans)}</fieldset>" if spans else "",
    }
    return filled("controls.html", **parts, last=len(sizes) - 1, start=start)


def _chip(what: str, value: str, name: str, coloured: bool) -> str:
    """A checkbox that shows or hides the edges whose `what` is `value`."""
    key = f'<i class="key {value}"></i>' if coloured else ""
    box = f'<input type="checkbox" data-{what}="{escape(value)}" checked>'
    return f'<label class="chip">{box}{key}{escape(name)}</label>'


def filled(name: str, **values: object) -> str:
    """Return a template of this package, filled with values that are already HTML."""
    return Template(pieces(name)).substitute(values)


def pieces(*names: str) -> str:
    """Return the concatenated text of files of this package."""
    folder = files("circuitfind.report")
    return "\n\n".join(folder.joinpath(name).read_text(encoding="utf-8").strip() for name in names)


def _short(value: float | None) -> float | None:
    value = known(value)
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _json(content: object) -> str:
    """JSON without `<`, so that it cannot close its script element."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
