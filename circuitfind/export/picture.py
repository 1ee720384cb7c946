"""A circuit as a drawing: what it shows, its Graphviz source, and SVG, PNG or PDF where Graphviz is installed.

What a drawing shows, before anyone decides where (the report's own drawing, `report.drawing`, starts from it, too):

1. `arrows`: one arrow an edge, weak ones first, so that strong ones are painted over them. An edge into a shared
   key/value head of a grouped-query model ends at a small box of its own, `a1.kv0`.
2. `joints`: from each of these small boxes a plain line to every query head of its group that is in the circuit.
3. `ranks`: the rows of the drawing from `input` at the bottom to `logits` at the top. A layer is one row for shared
   key/value heads, one for heads and one for its MLP; in parallel blocks heads and MLP share a row.
4. `pen`: an arrow's width and opacity grow with the square root of |effect|: effects fall off so steeply that on a
   linear scale all but a handful of edges would be hairlines.

As Graphviz draws it:

5. Invisible anchors in every rank hold the order and carry the layer's label at the side.
6. Heads are ellipses, MLPs boxes, `input` and `logits` dark. Arrows are coloured by what they feed (Okabe and Ito's
   colour-blind-safe palette). Dashed = the edge opposes the behaviour. A filled arrowhead = the effect was measured by
   exact patching, a hollow one = it is an estimate.
7. Held against a truth (`marks`), colours say something else: black = true and found, red and dashed = missing, grey =
   found and not true.
8. Ranks and nodes move closer together and weak edges fade as circuits grow, so that 400 edges can still be read.

The same circuit gives the same text, byte for byte.
"""

from __future__ import annotations

import html
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import graphviz

from circuitfind.errors import FileError
from circuitfind.export.files import write_bytes
from circuitfind.export.graphs import EdgeRow, fed, node_attributes
from circuitfind.graph import Graph

FONT = "Helvetica,Arial,sans-serif"
COLORS = {"q": "#0072B2", "k": "#D98200", "v": "#009E73", "mixer": "#6B7280", "mlp": "#6B7280", "logits": "#6B7280"}
NODES = {
    "head": 'shape=ellipse fillcolor="#E8F0F8" color="#35618E"',
    "mixer": 'shape=box style="filled,rounded" fillcolor="#E8F0F8" color="#94703A"',
    "mlp": 'shape=box style="filled,rounded" fillcolor="#F6ECDC" color="#94703A"',
    "kv": 'shape=box style="filled" fillcolor="#FFFFFF" color="#7A8594" fontsize=9 height=0.18 margin="0.04,0.01"',
    "end": 'shape=box style="filled,rounded" fillcolor="#333F4F" color="#333F4F" fontcolor="#FFFFFF"',
}
FOUND, MISSING, SPURIOUS = "found", "missing", "not true"  # of a truth that a circuit is held against
MARKS = {
    FOUND: 'color="#1B2430" penwidth=1.8 weight=4',
    MISSING: 'color="#D0202E" fontcolor="#D0202E" penwidth=1.8 weight=4 style=dashed',
    SPURIOUS: 'color="#B3BAC4" fontcolor="#8A93A0" penwidth=1.0',
}
ENDINGS = (".svg", ".png", ".pdf")
PNG_DPI = 160
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


# -------------------------------------------------------------------- what is drawn
class Arrow(NamedTuple):
    """One edge as drawn. `share` is sqrt(|effect| / largest |effect|) in 0..1, or None where no effect is known."""

    edge: str
    source: str
    target: str
    kind: str
    estimate: float | None
    exact: float | None
    effect: float | None
    share: float | None

    @property
    def opposes(self) -> bool:
        return self.effect is not None and self.effect < 0

    @property
    def measured(self) -> bool:
        return self.exact is not None


class Rank(NamedTuple):
    """A row of the drawing: its layer, whether it is the layer's lowest row, and its boxes in the graph's order."""

    layer: int
    first: bool
    names: tuple[str, ...]


class Pen(NamedTuple):
    """Width in points, opacity in 0..1."""

    width: float
    opacity: float


def known(value: float | None) -> float | None:
    """None for NaN and infinity, which no drawing can show."""
    return value if value is not None and math.isfinite(value) else None


def arrows(graph: Graph, rows: Iterable[EdgeRow]) -> list[Arrow]:
    """The circuit's edges as arrows, weakest first, ties in the given order."""
    clean = [EdgeRow(row.writer, row.reader, known(row.estimate), known(row.exact)) for row in rows]
    largest = max((abs(row.effect) for row in clean if row.effect is not None), default=0.0)
    result = []
    for row in clean:
        edge, kind = graph.edge_name(row.writer, row.reader), graph.reader(row.reader).kind
        source, target = graph.writer_names[row.writer], graph.reader_names[row.reader].partition("<")[0]
        share = None if row.effect is None or not largest else math.sqrt(abs(row.effect) / largest)
        result.append(Arrow(edge, source, target, kind, row.estimate, row.exact, row.effect, share))
    return sorted(result, key=lambda arrow: arrow.share or 0.0)


def joints(graph: Graph, rows: Iterable[EdgeRow], nodes: Iterable[str]) -> list[tuple[str, str]]:
    """`(shared key/value head, query head)` of every pair in the circuit, in the graph's order."""
    inside = set(nodes)
    pairs: dict[tuple[str, str], None] = {}  # an ordered set
    for reader in sorted({row.reader for row in rows}):
        if graph.group > 1 and graph.reader(reader).kind in ("k", "v"):
            shared = graph.reader_names[reader].partition("<")[0]
            pairs |= {(shared, head): None for head in fed(graph, reader, inside)}
    return list(pairs)


def ranks(graph: Graph, nodes: Iterable[str], drawn: Iterable[Arrow]) -> list[Rank]:
    """Rows of boxes from `input` to `logits`, those without a box left out."""
    rows: dict[tuple[int, int], list[str]] = {}
    for name in nodes:
        attributes = node_attributes(graph, name)
        level = 2 if attributes["kind"] == "mlp" and not graph.parallel else 1
        rows.setdefault((attributes["layer"], level), []).append(name)
    for name in sorted({arrow.target for arrow in drawn if ".kv" in arrow.target}, key=_number):
        rows.setdefault((_number(name)[0], 0), []).append(name)
    lowest = {layer: level for layer, level in sorted(rows, reverse=True)}
    return [Rank(layer, level == lowest[layer], tuple(names)) for (layer, level), names in sorted(rows.items())]


def pen(share: float | None, n_edges: int) -> Pen:
    """Width and opacity: the more edges there are, the thinner and fainter are the weak ones."""
    crowd = min(max((n_edges - 30) / 270, 0.0), 1.0)  # 0 for a small circuit, 1 from 300 edges on
    share = 0.4 if share is None else share
    thin, wide, faint = 0.9 - 0.5 * crowd, 4.4 - 0.6 * crowd, 0.85 - 0.42 * crowd
    return Pen(thin + (wide - thin) * share, faint + (1 - faint) * share)


def signed(value: float | None) -> str:
    """`+0.123`, `-1.2e-05`, or a dash for what is unknown."""
    return "–" if value is None else f"{value:+.3g}"


def describe(arrow: Arrow) -> str:
    """The three lines of an arrow's tooltip."""
    exact = signed(arrow.exact) if arrow.measured else "not measured"
    return f"{arrow.edge}\nestimate {signed(arrow.estimate)}\nexact {exact}"


def _number(shared: str) -> tuple[int, int]:
    """`(layer, head)` of `a{layer}.kv{head}`."""
    layer, _, head = shared[1:].partition(".kv")
    return int(layer), int(head)


# -------------------------------------------------------------------- Graphviz
def source(
    graph: Graph,
    rows: Sequence[EdgeRow],
    nodes: Sequence[str],
    title: str | None = None,
    legend: bool = True,
    marks: Mapping[str, str] | None = None,
) -> str:
    """Graphviz source of the circuit.

    Args:
        rows: the circuit's edges, effects in units of the metric, positive = supports.
        nodes: names of the circuit's nodes.
        title: a line above the picture.
        legend: says below the picture what colours, dashes, widths and arrowheads mean.
        marks: by edge, one of `MARKS`: the circuit held against a truth, in place of effects.
    """
    drawn = arrows(graph, rows)
    levels = ranks(graph, nodes if drawn else ["input", "logits"], drawn)
    lines = ["digraph circuit {", *_settings(len(drawn), title)]
    level = {name: i for i, rank in enumerate(levels) for name in rank.names}
    crossed = sum(level[arrow.target] - level[arrow.source] for arrow in drawn)  # Graphviz's time grows with it
    if crossed > 5000:  # Graphviz's own limits: a slightly worse layout in seconds, not minutes
        lines.append("  nslimit=0.5 mclimit=0.3")
    lines += ["  subgraph cluster_circuit {", "    peripheries=0 margin=4 labelloc=b labeljust=l"]
    if legend or not drawn:
        lines.append(f"    label=<{_legend(graph, drawn, marks)}>")
    lines += [f"    {line}" for line in _boxes(graph, levels)]
    lines.append("  }")
    lines += [f"  {line}" for line in _lines(drawn, joints(graph, rows, nodes), marks)]
    if not drawn:
        lines.append('  "input" -> "logits" [style=invis minlen=2]')
    return "\n".join([*lines, "}", ""])


def render(path: str | PathLike[str], source: str) -> Path:
    """Draws Graphviz source to `.svg`, `.png` or `.pdf`, by the path's ending."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise FileError(f"{path}: pictures end in {', '.join(ENDINGS)}; write the Graphviz source to .dot as text")
    if ending == ".png":  # not in the source itself, where it would scale the SVG too
        source = source.replace("{", f"{{ dpi={PNG_DPI};", 1)
    try:
        picture = graphviz.Source(source).pipe(format=ending[1:])
    except graphviz.ExecutableNotFound:
        raise FileError(
            f"{path}: not drawn, Graphviz's 'dot' is not on the PATH; the circuit's .dot text is there without it"
            " (Circuit.to_dot). Install Graphviz: apt install graphviz, brew install graphviz, or graphviz.org/download"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [str(error)]
        raise FileError(f"{path}: not drawn, Graphviz says: {said[0]}") from None
    return write_bytes(path, picture)


def svg(source: str) -> str | None:
    """The drawing of Graphviz source as SVG text; None where `dot` is not installed or fails."""
    try:
        return str(graphviz.Source(source).pipe(format="svg", encoding="utf-8"))
    except (graphviz.ExecutableNotFound, subprocess.CalledProcessError):
        return None


def quote(text: str) -> str:
    """A Graphviz string: quotes and backslashes escaped, control characters dropped, line ends kept as breaks."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + CONTROL.sub("", escaped) + '"'


def _settings(n_edges: int, title: str | None) -> list[str]:
    nodesep = max(0.07, 0.32 - 0.003 * max(n_edges - 20, 0))
    node_font = f"fontname={quote(FONT)} fontsize=12 fontcolor={quote('#1B2430')}"
    return [
        f'  rankdir=BT nodesep={nodesep:.2f} ranksep=0.44 bgcolor="#FFFFFF" pad=0.15 outputorder=edgesfirst',
        f"  fontname={quote(FONT)} fontsize={15 * _scale(n_edges):.0f} labelloc=t",
        f'  node [{node_font} style=filled height=0.3 margin="0.07,0.03" penwidth=1.1]',
        "  edge [arrowsize=0.7]",
        *([f"  label=<<b>{html.escape(CONTROL.sub(' ', title))}</b>>"] if title else []),
    ]


def _scale(n_edges: int) -> float:
    """Title and legend grow with the picture, which is shown smaller the larger it is."""
    return 1 + 0.7 * min(n_edges / 400, 1.0)


def _boxes(graph: Graph, levels: Sequence[Rank]) -> list[str]:
    """Nodes rank by rank, each rank with an anchor that carries its label, and the anchors' chain."""
    lines = []
    for i, rank in enumerate(levels):
        label = f"layer {rank.layer}" if rank.first and 0 <= rank.layer < graph.n_layers else ""
        look = f'shape=plaintext style="" group=ranks label={quote(label)} fontsize=11 fontcolor="#6B7686"'
        boxes = "; ".join(_box(graph, name) for name in rank.names)
        lines.append(f'{{ rank=same; "rank{i}" [{look}]; {boxes} }}')
    chain = " -> ".join(f'"rank{i}"' for i in range(len(levels)))
    return [*lines, f"{chain} [style=invis weight=100]"]


def _box(graph: Graph, name: str) -> str:
    kind = "kv" if ".kv" in name else node_attributes(graph, name)["kind"]
    return f"{quote(name)} [{NODES.get(kind, NODES['end'])} tooltip={quote(name)}]"


def _lines(drawn: Sequence[Arrow], pairs: Sequence[tuple[str, str]], marks: Mapping[str, str] | None) -> list[str]:
    lines = [
        f'{quote(shared)} -> {quote(head)} [dir=none color="#7A8594" penwidth=1.4 weight=4 tooltip={quote(shared)}]'
        for shared, head in pairs
    ]
    for arrow in drawn:
        if marks is not None:
            look = f"{MARKS[marks[arrow.edge]]} tooltip={quote(f'{arrow.edge}, {marks[arrow.edge]}')}"
            if arrow.kind in "qkv":  # colours say something else
                look += f' label=" {arrow.kind}" fontsize=9 fontname={quote(FONT)}'
            lines.append(f"{quote(arrow.source)} -> {quote(arrow.target)} [{look}]")
            continue
        width, opacity = pen(arrow.share, len(drawn))
        look = f'color="{COLORS[arrow.kind]}{round(opacity * 255):02X}" penwidth={width:.2f}'
        look += f" weight={1 + round(8 * (arrow.share or 0))}"  # strong edges are drawn straighter
        look += f" arrowhead={'normal' if arrow.measured else 'onormal'} tooltip={quote(describe(arrow))}"
        look += " style=dashed" if arrow.opposes else ""
        lines.append(f"{quote(arrow.source)} -> {quote(arrow.target)} [{look}]")
    return lines


def _legend(graph: Graph, drawn: Sequence[Arrow], marks: Mapping[str, str] | None) -> str:
    """An HTML-like table: what is drawn, in two lines."""
    if not drawn:
        return '<font point-size="12" color="#55606E">empty circuit: no edges, faithfulness 0</font>'
    if marks is not None:
        counts = Counter(marks[arrow.edge] for arrow in drawn)
        lines = {FOUND: ("#1B2430", "──"), MISSING: ("#D0202E", "╌╌"), SPURIOUS: ("#8A93A0", "──")}
        said = (
            f'<font color="{color}">{line} {counts[mark]} {"true and " if mark == FOUND else ""}{mark}</font>'
            for mark, (color, line) in lines.items()
        )
        return f'<font point-size="{10 * _scale(len(drawn)):.0f}">{"&#160;&#160;&#160; ".join(said)}</font>'
    kinds = {"mlp" if arrow.kind == "logits" else arrow.kind for arrow in drawn}
    names = {"q": "query", "k": "key", "v": "value", "mixer": "into mixer", "mlp": "into MLP or logits"}
    first = [f'<font color="{COLORS[key]}">■</font> {name}' for key, name in names.items() if key in kinds]
    second = []
    if effects := [arrow.effect for arrow in drawn if arrow.effect is not None]:
        parts = {
            "── supports": True,
            "╌╌ opposes": any(arrow.opposes for arrow in drawn),
            f"width: √|effect|, widest {signed(max(effects, key=abs))}": True,
            "▶ measured": any(arrow.measured for arrow in drawn),
            "▷ estimated": not all(arrow.measured for arrow in drawn),
        }
        second = [text for text, holds in parts.items() if holds]
    rows = [f'<tr><td align="left">{"&#160;&#160;&#160; ".join(cells)}</td></tr>' for cells in (first, second) if cells]
    table = f'<table border="0" cellborder="0" cellspacing="0" cellpadding="2">{"".join(rows)}</table>'
    return f'<font point-size="{10 * _scale(len(drawn)):.0f}" color="#55606E">{table}</font>'
