"""A circuit as a drawing: its Graphviz source, and SVG, PNG or PDF if Graphviz is installed.

`export.arrows` decides what is drawn. In the Graphviz source:

1. Every rank has an anchor node, which keeps the ranks in order and carries the layer's label.
2. Heads are ellipses, MLPs boxes, `input` and `logits` dark boxes. The colour of an arrow tells what its edge feeds
   (Okabe and Ito's colour-blind-safe palette). Dashed = the edge opposes the behaviour. A filled arrowhead = the effect
   was measured by exact patching, a hollow one = it is an estimate.
3. If the circuit is compared with a true circuit (`marks`), colours mean: black = true and found, red and dashed =
   missing, grey = found and not true.
4. In larger circuits, ranks and nodes are closer together and weak edges fainter, so that 400 edges are still readable.
   Still larger circuits are folded by layer.

The same circuit gives the same text, byte for byte.
"""

from __future__ import annotations

import html
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from circuitfind.errors import FileError
from circuitfind.export.arrows import Arrow, Rank, arrows, attributes_of, describe, folded, joints, pen, ranks, signed
from circuitfind.export.files import write_bytes
from circuitfind.export.graphs import EdgeRow
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
FOUND, MISSING, SPURIOUS = "found", "missing", "not true"  # edges of a circuit, compared with the true circuit
MARKS = {
    FOUND: 'color="#1B2430" penwidth=1.8 weight=4',
    MISSING: 'color="#D0202E" fontcolor="#D0202E" penwidth=1.8 weight=4 style=dashed',
    SPURIOUS: 'color="#B3BAC4" fontcolor="#8A93A0" penwidth=1.0',
}
ENDINGS = (".svg", ".png", ".pdf")
PNG_DPI = 160
MOST_DRAWN = 400  # edges; more take Graphviz minutes, and cannot be read
GROUP_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#D55E00", "#8F7AE5", "#7A9A01")
Groups = Mapping[str, Sequence[str]]  # the user's name of a group -> its nodes
CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # with halves of surrogate pairs, which Graphviz refuses


# -------------------------------------------------------------------- Graphviz
def source(
    graph: Graph,
    rows: Sequence[EdgeRow],
    nodes: Sequence[str],
    title: str | None = None,
    legend: bool = True,
    marks: Mapping[str, str] | None = None,
    fold: bool | None = None,
    groups: Groups | None = None,
) -> str:
    """Return Graphviz source of the circuit.

    Args:
        rows: the circuit's edges, effects in units of the metric, positive = supports.
        nodes: names of the circuit's nodes.
        title: a line above the picture.
        legend: whether a legend below the picture explains colours, dashes, widths and arrowheads.
        marks: edge -> one of `MARKS`: shows the comparison with a true circuit in place of effects.
        fold: whether to draw one arrow for all edges between two layers; by default above 400 edges without marks.
        groups: named groups of nodes; each group has its own colour of frames and an entry in the legend.
    """
    drawn, stubs, note = arrows(graph, rows), joints(graph, rows, nodes), ""
    if fold if fold is not None else len(drawn) > MOST_DRAWN and marks is None:
        note, (drawn, bundles) = f"{len(drawn):,} edges, folded by layer", folded(drawn)
        note += f": the strongest {len(drawn)} of {bundles:,} arrows" if len(drawn) < bundles else ""
        nodes, stubs = sorted({end for arrow in drawn for end in (arrow.source, arrow.target)}), []
    levels = ranks(graph, nodes if drawn else ["input", "logits"], drawn)
    lines = ["digraph circuit {", *_settings(len(drawn), title, 0.2 if note else 0.44)]
    level = {name: i for i, rank in enumerate(levels) for name in rank.names}
    crossed = sum(level[arrow.target] - level[arrow.source] for arrow in drawn)
    if crossed > 5000:  # limit Graphviz's search: a slightly worse layout in seconds instead of minutes
        lines.append("  nslimit=0.5 mclimit=0.3")
    lines += ["  subgraph cluster_circuit {", "    peripheries=0 margin=4 labelloc=b labeljust=l"]
    if legend or not drawn:
        lines.append(f"    label=<{_legend(drawn, marks, note, groups or {})}>")
    lines += [f"    {line}" for line in _boxes(graph, levels, groups or {})]
    lines.append("  }")
    lines += [f"  {line}" for line in _lines(drawn, stubs, marks)]
    if not drawn:
        lines.append('  "input" -> "logits" [style=invis minlen=2]')
    return "\n".join([*lines, "}", ""])


def render(path: str | PathLike[str], source: str) -> Path:
    """Draw Graphviz source as `.svg`, `.png` or `.pdf`, by the path's ending, and return the path.

    Raises:
        FileError: another ending, or Graphviz is not installed or fails.
    """
    import graphviz  # not at the top, because servers lack it (circuitfind.remote)

    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise FileError(f"{path}: pictures end in {', '.join(ENDINGS)}; write the Graphviz source to .dot as text")
    if ending == ".png":  # in the source of all formats it would also scale the SVG
        source = source.replace("{", f"{{ dpi={PNG_DPI};", 1)
    try:
        picture = graphviz.Source(source).pipe(format=ending[1:])
    except graphviz.ExecutableNotFound:
        raise FileError(
            f"{path}: not drawn, Graphviz's 'dot' is not on the PATH; Circuit.to_dot writes the .dot text without it."
            " Install Graphviz: apt install graphviz, brew install graphviz, or graphviz.org/download"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [str(error)]
        raise FileError(f"{path}: not drawn, Graphviz says: {said[0]}") from None
    return write_bytes(path, picture)


def svg(source: str) -> str | None:
    """Return the drawing of Graphviz source as SVG text; None if `dot` is not installed or fails."""
    import graphviz

    try:
        return str(graphviz.Source(source).pipe(format="svg", encoding="utf-8"))
    except (graphviz.ExecutableNotFound, subprocess.CalledProcessError):
        return None


def quote(text: str) -> str:
    """Return a Graphviz string: quotes and backslashes escaped, control characters dropped, line ends kept."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + CONTROL.sub("", escaped) + '"'


def look(kind: str, share: float | None, count: int, said: str, opposes: bool, measured: bool = False) -> str:
    """Return the Graphviz attributes of an arrow, one of `count` (more arrows are thinner).

    said: the tooltip. opposes: dashed. measured: with a filled head.
    """
    width, opacity = pen(share, count)
    # a hollow head is drawn with the arrow's own pen: large enough to leave room inside
    head = "normal" if measured else f"onormal arrowsize={max(0.7, 0.38 * width):.2f}"
    colour = f'color="{COLORS[kind]}{round(opacity * 255):02X}" penwidth={width:.2f}'
    return f"{colour} arrowhead={head} tooltip={quote(said)}{' style=dashed' if opposes else ''}"


def _settings(n_edges: int, title: str | None, apart: float) -> list[str]:
    nodesep = max(0.07, 0.32 - 0.003 * max(n_edges - 20, 0))
    node_font = f"fontname={quote(FONT)} fontsize=12 fontcolor={quote('#1B2430')}"
    return [
        f'  rankdir=BT nodesep={nodesep:.2f} ranksep={apart} bgcolor="#FFFFFF" pad=0.15 outputorder=edgesfirst',
        f"  fontname={quote(FONT)} fontsize={15 * _scale(n_edges):.0f} labelloc=t",
        f'  node [{node_font} style=filled height=0.3 margin="0.07,0.03" penwidth=1.1]',
        "  edge [arrowsize=0.7]",
        *([f"  label=<<b>{html.escape(CONTROL.sub(' ', title))}</b>>"] if title else []),
    ]


def _scale(n_edges: int) -> float:
    """Return the factor by which title and legend grow, because larger pictures are usually shown smaller."""
    return 1 + 0.7 * min(n_edges / 400, 1.0)


def _boxes(graph: Graph, levels: Sequence[Rank], groups: Groups) -> list[str]:
    """Return one line per rank, with its nodes and an anchor that carries its label, and one that links the anchors."""
    lines, frames = [], dict[str, str]()
    for at, nodes in reversed(list(enumerate(groups.values()))):  # of several groups, the first decides the colour
        frames |= dict.fromkeys(nodes, f' color="{GROUP_COLORS[at % len(GROUP_COLORS)]}" penwidth=3')
    for i, rank in enumerate(levels):
        label = f"layer {rank.layer}" if rank.first and 0 <= rank.layer < graph.n_layers else ""
        look = f'shape=plaintext style="" group=ranks label={quote(label)} fontsize=11 fontcolor="#6B7686"'
        boxes = "; ".join(_box(graph, name, frames.get(name, "")) for name in rank.names)
        lines.append(f'{{ rank=same; "rank{i}" [{look}]; {boxes} }}')
    chain = " -> ".join(f'"rank{i}"' for i in range(len(levels)))
    return [*lines, f"{chain} [style=invis weight=100]"]


def _box(graph: Graph, name: str, frame: str) -> str:
    look = NODES.get(attributes_of(graph, name)["kind"], NODES["end"])
    return f"{quote(name)} [{look}{frame} tooltip={quote(name)}]"


def _lines(drawn: Sequence[Arrow], pairs: Sequence[tuple[str, str]], marks: Mapping[str, str] | None) -> list[str]:
    lines = [
        f'{quote(shared)} -> {quote(head)} [dir=none color="#7A8594" penwidth=1.4 weight=4 tooltip={quote(shared)}]'
        for shared, head in pairs
    ]
    for arrow in drawn:
        if marks is None:
            how = look(arrow.kind, arrow.share, len(drawn), describe(arrow), arrow.opposes, arrow.measured)
            how += f" weight={1 + round(8 * (arrow.share or 0))}"  # strong edges are drawn straighter
        else:
            letter = f' label=" {arrow.kind}" fontsize=9 fontname={quote(FONT)}' if arrow.kind in "qkv" else ""
            how = f"{MARKS[marks[arrow.edge]]} tooltip={quote(f'{arrow.edge}, {marks[arrow.edge]}')}{letter}"
        lines.append(f"{quote(arrow.source)} -> {quote(arrow.target)} [{how}]")
    return lines


def _legend(drawn: Sequence[Arrow], marks: Mapping[str, str] | None, note: str, groups: Groups) -> str:
    """Return the legend in Graphviz's HTML-like language: lines for kinds of edges, effects, groups and the note."""
    if not drawn:
        return '<font point-size="12" color="#55606E">empty circuit: no edges, faithfulness 0</font>'
    if marks is not None:
        counts = Counter(marks[arrow.edge] for arrow in drawn)
        lines = {FOUND: ("#1B2430", "──"), MISSING: ("#D0202E", "╌╌"), SPURIOUS: ("#8A93A0", "──")}
        counted = (
            f'<font color="{color}">{line} {counts[mark]} {"true and " if mark == FOUND else ""}{mark}</font>'
            for mark, (color, line) in lines.items()
        )
        return f'<font point-size="{10 * _scale(len(drawn)):.0f}">{"&#160;&#160;&#160; ".join(counted)}</font>'
    kinds = {"mlp" if arrow.kind == "logits" else arrow.kind for arrow in drawn}
    names = {"q": "query", "k": "key", "v": "value", "mixer": "into mixer", "mlp": "into MLP or logits"}
    first = [f'<font color="{COLORS[key]}">■</font> {name}' for key, name in names.items() if key in kinds]
    second = []
    if effects := [arrow.effect for arrow in drawn if arrow.effect is not None]:
        said = {
            "── supports": True,
            "╌╌ opposes": any(arrow.opposes for arrow in drawn),
            f"width: √|effect|, widest {signed(max(effects, key=abs))}": True,
            "▶ measured": any(arrow.measured for arrow in drawn),
            "▷ estimated": not all(arrow.measured for arrow in drawn),
        }
        second = [text for text, holds in said.items() if holds]
    colors = (GROUP_COLORS[at % len(GROUP_COLORS)] for at in range(len(groups)))
    named = [
        f'<font color="{color}">■</font> {html.escape(CONTROL.sub(" ", name))}'
        for color, name in zip(colors, groups, strict=True)
    ]
    parts = (first, second, named, [note] if note else [])
    rows = [f'<tr><td align="left">{"&#160;&#160;&#160; ".join(cells)}</td></tr>' for cells in parts if cells]
    table = f'<table border="0" cellborder="0" cellspacing="0" cellpadding="2">{"".join(rows)}</table>'
    return f'<font point-size="{10 * _scale(len(drawn)):.0f}" color="#55606E">{table}</font>'
