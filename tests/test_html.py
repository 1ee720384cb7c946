"""The pieces of HTML that results show in notebooks: well-formed, escaped, coloured as the figures are."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from circuitfind.export.html import block, colour, facts, heat, picture, scale_end, table

NASTY = '<script>alert("1")</script> & <b>'


def parsed(text: str) -> ElementTree.Element:
    """The piece as a tree: it fails where a tag is not closed or a text not escaped."""
    return ElementTree.fromstring(f"<root>{text}</root>")


def texts(tree: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(part.itertext()) for part in tree.iter(tag)]


def test_a_table_shows_numbers_names_and_what_is_unknown():
    tree = parsed(table(["edge", "effect", "n"], [("a0.h1->m2", 0.123456, 32491), (NASTY, None, 2)], NASTY))
    assert texts(tree, "th") == ["edge", "effect", "n"]
    assert texts(tree, "td") == ["a0.h1->m2", "0.1235", "32,491", NASTY, "–", "2"]
    assert texts(tree, "caption") == [NASTY]
    sides = ["right" if "text-align:right" in cell.get("style", "") else "left" for cell in tree.iter("td")]
    assert sides == ["left", "right", "right"] * 2
    assert tree.find(".//script") is None


def test_a_long_table_says_how_much_more_there_is():
    tree = parsed(table(["n"], ([i] for i in range(100)), most=7))
    assert len(texts(tree, "td")) == 7 and "and 93 more rows" in "".join(tree.itertext())
    assert len(texts(parsed(table(["n"], ([i] for i in range(100)), most=None)), "td")) == 100
    assert texts(parsed(table(["n"], [])), "th") == ["n"]


def test_a_row_must_fit_the_columns():
    with pytest.raises(ValueError, match="a row has 1 values, the table has 2 columns"):
        table(["a", "b"], [["one"]])


def test_facts_leave_out_what_is_empty():
    tree = parsed(facts({"metric": "kl", "seed": 0, "task": "", "more": None, NASTY: NASTY}))
    assert texts(tree, "th") == ["metric", "seed", NASTY] and texts(tree, "td") == ["kl", "0", NASTY]


def test_a_heat_map_is_white_at_zero_blue_above_and_red_below():
    values = np.array([[0.0, 2.0], [-1.0, np.nan]])
    tree = parsed(heat(values, ["0", NASTY], ["a", "b"], "effects"))
    cells = list(tree.iter("td"))
    grounds = [cell.get("style", "").split(";")[0].removeprefix("background:") for cell in cells]
    assert grounds == ["#ffffff", "#2166ac", colour(-1.0, 2.0)[0], "#bdbdbd"]
    assert [cell.get("title") for cell in cells] == ["0, a: +0", "0, b: +2", f"{NASTY}, a: -1", f"{NASTY}, b: unknown"]
    assert "-2 red, 0 white, 2 blue" in "".join(tree.itertext())
    red, blue = int(grounds[2][1:3], 16), int(grounds[2][5:], 16)
    assert red > blue


def test_one_cell_does_not_drown_a_heat_map():
    """The scale ends at the 99th percentile, and what is beyond is framed and counted."""
    values = np.linspace(-1, 1, 900).reshape(30, 30)
    assert scale_end(values) == 1.0
    values[3, 4] = 50.0
    assert 0.98 < scale_end(values) < 1.0
    tree = parsed(heat(values, list(map(str, range(30))), list(map(str, range(30)))))
    framed = [cell.get("title") for cell in tree.iter("td") if "outline" in cell.get("style", "")]
    assert "3, 4: +50" in framed and len(framed) == (np.abs(values) > scale_end(values)).sum() < 10
    assert f"{len(framed)} cells beyond, framed" in "".join(tree.itertext())


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.full((2, 2), np.nan)])
def test_a_heat_map_of_nothing_is_drawn(values):
    assert len(list(parsed(heat(values, ["0", "1"], ["a", "b"])).iter("td"))) == 4


def test_a_large_heat_map_is_cut_and_labels_must_fit():
    tree = parsed(heat(np.ones((170, 3)), [str(i) for i in range(170)], ["a", "b", "c"]))
    assert len(list(tree.iter("td"))) == 390 and "and 40 more rows" in "".join(tree.itertext())
    with pytest.raises(ValueError, match=r"labels for \[1, 2\], values of shape \[2, 2\]"):
        heat(np.ones((2, 2)), ["one"], ["a", "b"])


def test_a_picture_goes_in_without_its_head():
    document = '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg viewBox="0 0 1 1"><title>a-&gt;b</title></svg>\n'
    assert parsed(block(NASTY, picture(document))).find(".//svg/title") is not None


def test_nothing_of_it_waits_for_torch():
    code = "import sys, circuitfind.export.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_interval_is_two_rounded_numbers() -> None:
    assert "0.942 to 0.9812" in facts({"interval": (0.94199, 0.98123)})
