"""Small pieces of HTML, made from plain data, of which the `_repr_html_` of results is composed.

1. Every piece has inline styles and needs no scripts or style sheet, so it is shown correctly wherever a notebook is.
2. Text and borders have the notebook's colours, so that they suit light and dark themes. Cells of a heat map have their
   own background and text colours: white is 0, blue positive, red negative, as in the figures of `circuitfind.plots`,
   and grey is unknown (NaN).
3. All text is escaped. Only `picture` and `block` accept HTML, which must come from circuitfind itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Any

import numpy as np

from circuitfind.errors import count

SUPPORTS, OPPOSES, GAP = (33, 102, 172), (178, 24, 43), "#bdbdbd"  # RGB of the scale's two ends; the colour of NaN
MOST_ROWS, MOST_COLUMNS = 130, 130  # of a heat map
WRITTEN = 24  # heat maps with at most this number of columns have numbers in their cells
_LINE = "1px solid rgba(128,128,128,.35)"
_TABLE = "border-collapse:collapse;margin:.4em 0;font-size:13px;line-height:1.35"
_CAPTION = "caption-side:top;text-align:left;padding:0 0 .3em;font-weight:600;color:inherit"
_NOTE = "opacity:.7;font-size:12px;margin:.2em 0"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", *, most: int | None = 60) -> str:
    """Return a table; numbers are right-aligned and shown to four digits, None and NaN as a dash.

    At most `most` rows are shown (None: all), and a line says how many more there are. Raise ValueError if a row does
    not have one value per column.
    """
    iterator = iter(rows)
    shown = [list(row) for row in islice(iterator, most)]
    for row in shown:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} values, the table has {len(columns)} columns: {row}")
    more = sum(1 for _ in iterator)
    numeric = [any(map(_is_number, column)) for column in zip(*shown, strict=True)] or [False] * len(columns)

    def line(tag: str, texts: Iterable[str]) -> str:
        return "".join(_cell(tag, text, right) for text, right in zip(texts, numeric, strict=True))

    body = "".join(f"<tr>{line('td', map(_said, row))}</tr>" for row in shown)
    return (
        f'<table style="{_TABLE}">{_caption(caption)}<thead><tr style="border-bottom:{_LINE}">{line("th", columns)}'
        f"</tr></thead><tbody>{body}</tbody></table>{_more(more, 'row')}"
    )


def facts(items: Mapping[str, Any], caption: str = "") -> str:
    """Return a table of names and values, one item per line; items whose value is None or "" are left out."""
    rows = "".join(
        f'<tr><th style="text-align:left;padding:1px 12px 1px 0;font-weight:400;opacity:.7">{escape(str(name))}</th>'
        f'<td style="text-align:left;padding:1px 0">{escape(_said(value))}</td></tr>'
        for name, value in items.items()
        if value is not None and value != ""
    )
    return f'<table style="{_TABLE}">{_caption(caption)}<tbody>{rows}</tbody></table>'


def heat(
    matrix: np.ndarray | Sequence[Sequence[float]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    caption: str = "",
    *,
    limit: float | None = None,
) -> str:
    """Return a heat map of coloured cells; each cell's tooltip shows its row, column and value.

    Args:
        matrix: `[rows, columns]`; NaN gives a grey cell. Only the first `MOST_ROWS` rows and `MOST_COLUMNS` columns are
            shown, and a line says how many more there are.
        row_labels, column_labels: one per row and per column; they may repeat.
        limit: the value of full blue, where -limit is full red; by default `scale_end`. Cells beyond it have a frame.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"labels for [{len(row_labels)}, {len(column_labels)}], values of shape {list(values.shape)}")
    end = limit or scale_end(values)
    beyond = count_beyond(values, end)
    rows, columns = list(row_labels)[:MOST_ROWS], list(column_labels)[:MOST_COLUMNS]
    look = "padding:0 2px;font-weight:400;text-align:center"
    head = "".join(f'<th style="{look}">{escape(str(name))}</th>' for name in columns)
    body, written = "", len(columns) <= WRITTEN
    for name, line in zip(rows, values.tolist(), strict=False):
        named = zip(columns, line, strict=False)
        cells = (_heat_cell(value, end, f"{name}, {other}", written) for other, value in named)
        body += f'<tr><th style="padding:0 6px 0 0;font-weight:400;text-align:right">{escape(str(name))}</th>'
        body += f"{''.join(cells)}</tr>"
    scale = f"{-end:.3g} red, 0 white, {end:.3g} blue" if (values < 0).any() else f"0 white, {end:.3g} blue"
    scale += f"; {count(beyond, 'cell')} beyond, framed" if beyond else ""
    left_out = _more(len(row_labels) - len(rows), "row") + _more(len(column_labels) - len(columns), "column")
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:separate;border-spacing:1px;margin:.4em 0;'
        f'font-size:11px;line-height:1.2">{_caption(caption)}<thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><div style="{_NOTE}">{scale}</div>{left_out}'
    )


def scale_end(values: np.ndarray) -> float:
    """Return the value at the end of a colour scale around 0.

    This is the largest finite magnitude or, if that is over twice the 99th percentile of the magnitudes other than 0,
    this percentile. Without a finite value other than 0 it is 1.
    """
    known = np.sort(np.abs(values[np.isfinite(values) & (values != 0)]))
    if not known.size:
        return 1.0
    most = float(known[math.ceil(0.99 * (known.size - 1))])
    return most if known[-1] > 2 * most else float(known[-1])


def count_beyond(values: np.ndarray, end: float) -> int:
    """Return the number of finite cells beyond a scale's end."""
    return int((np.isfinite(values) & (np.abs(values) > end)).sum())


def picture(svg: str) -> str:
    """Return an SVG document, of Graphviz or circuitfind, without its XML declaration and on a white background."""
    return f'<div style="overflow:auto;max-height:640px;background:#fff;padding:4px">{svg[svg.index("<svg") :]}</div>'


def block(title: str, *parts: str) -> str:
    """Return pieces of HTML, one below the other, under a title."""
    return f'<div><div style="font-weight:600;margin:.2em 0">{escape(title)}</div>{"".join(parts)}</div>'


def colour(value: float, end: float) -> tuple[str, str]:
    """Return a cell's background and text colour, `#rrggbb`: -end is red, 0 white, end blue."""
    if not math.isfinite(value):
        return GAP, "#222222"
    share = min(abs(value) / end, 1.0)
    red, green, blue = (round(255 + share * (part - 255)) for part in (SUPPORTS if value >= 0 else OPPOSES))
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share > 0.6 else "#222222"


def _heat_cell(value: float, end: float, place: str, written: bool) -> str:
    background, text = colour(value, end)
    said, short = (f"{value:+.4g}", f"{value:.2g}" if written else "") if math.isfinite(value) else ("unknown", "")
    size = "min-width:34px;height:18px" if written else "min-width:9px;height:12px"
    size += ";outline:2px solid #222" if math.isfinite(value) and abs(value) > end else ""
    return (
        f'<td title="{escape(f"{place}: {said}")}" style="background:{background};color:{text};'
        f'{size};padding:0 2px;text-align:center">{short}</td>'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _said(value: Any) -> str:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)):  # an interval
        return " to ".join(map(_said, value))
    return str(value)


def _cell(tag: str, text: str, right: bool) -> str:
    look = f"text-align:{'right' if right else 'left'};padding:2px 10px 2px 0;vertical-align:top"
    return f'<{tag} style="{look}">{escape(text)}</{tag}>'


def _caption(text: str) -> str:
    return f'<caption style="{_CAPTION}">{escape(text)}</caption>' if text else ""


def _more(n: int, what: str) -> str:
    return f'<div style="{_NOTE}">and {count(n, f"more {what}")}</div>' if n > 0 else ""
