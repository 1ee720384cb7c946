"""Sweeps by named spans against one plain forward pass a place, and the spans written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import off
from patching_twin import EVERY, PatchingTwin
from test_aligned_spans import AlignedPatching, unequal_task
from test_components import GradientTwin
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.engine.ablation import resampled

LENGTHS = (7, 5, 6)
SPANS = [{"b": (4, 5), "a": (1, 3), "only": (0, 2)}, {"b": (0, 1), "a": (2, 4)}, {"a": (0, 1), "b": (3, 5)}]
LABELS = ("a", "b", "end", "rest")
PLACES = [  # of each label, by row: "only" is named in one row only
    [[1, 2], [2, 3], [0]],
    [[4], [0], [3, 4]],
    [[6], [4], [5]],
    [[0, 3, 5], [1], [1, 2]],
]


def spanned(**more: Any) -> cf.Task:
    return id_task(LENGTHS, **{"spans": SPANS, **more})


def off_by(sweep: cf.Sweep, expected: np.ndarray, each: int = 1) -> float:
    """`expected [layers, units, spans, examples]`, one unit in `each`."""
    found = sweep.per_example.reshape(expected.shape[0], -1, *expected.shape[2:])[:, ::each]
    return off(torch.from_numpy(found), torch.from_numpy(expected))


# -------------------------------------------------------------------- the numbers
@pytest.mark.parametrize(("name", "what"), EVERY)
def test_every_span_equals_a_forward_pass_of_its_own(name: str, what: str) -> None:
    """Padded prompts of three lengths, whose spans lie elsewhere in each and in another order."""
    model = wrapped(name, torch.float64)  # effects of some places are as small as the rounding of logits
    bound = spanned().on(model)
    layers, each = ((1,), 17) if what == "neurons" else ((0, 1), 1)
    for direction in ("noising", "denoising") if name in ("llama", "gpt_neox") else ("noising",):
        sweep = cf.patch(model, bound, what, by_span=True, layers=layers, batch_size=2, direction=direction)
        assert sweep.axes[-1] == ("span", LABELS)
        expected = PatchingTwin(model, bound).effects(what, PLACES, direction, layers=layers, each=each)
        assert off_by(sweep, expected, each) < 1e-4, direction


@pytest.mark.parametrize(("name", "what"), [(n, w) for n, w in EVERY if n in ("llama", "gemma2") and w != "neurons"])
def test_estimates_by_span_are_sums_over_its_positions(name: str, what: str) -> None:
    model = wrapped(name)
    bound = spanned().on(model)
    sweep = cf.attribute(model, bound, "atp", level="node", what=what, by_span=True, batch_size=2)
    single = GradientTwin(model, bound).estimates(what, (0, 1), [(1, 1)])  # layers units positions examples
    expected = np.stack(
        [np.stack([single[:, :, rows[row], row].sum(-1) for row in range(len(bound))], axis=-1) for rows in PLACES],
        axis=2,
    )
    assert off_by(sweep, expected) < 1e-4
    assert sweep.axes[-1].labels == LABELS and sweep.record.settings["by_span"]


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_other_ablations(ablation: str) -> None:
    lengths = (6, 6, 6) if ablation == "resample" else LENGTHS
    places = PLACES
    if ablation == "resample":
        places = [*PLACES[:2], [[5]] * 3, [[0, 3], [1, 4], [1, 2]]]
    model = wrapped("llama")
    bound = id_task(lengths, spans=SPANS).on(model)
    dealt = resampled(bound.batch, 3).corrupted if ablation == "resample" else None
    twin = PatchingTwin(model, bound, dealt)
    for what in ("heads", "v", "resid-mid"):
        sweep = cf.patch(model, bound, what, by_span=True, ablation=ablation, seed=3, batch_size=2)
        assert off_by(sweep, twin.effects(what, places, ablation=ablation)) < 1e-4, what


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_aligned_pairs(name: str) -> None:
    """Spans are counted in the clean prompt, where the counterparts' values stand."""
    model = wrapped(name, torch.float64)
    bound = unequal_task().on(model)
    places = [[[2, 3, 4], [1], [0]], [[6], [3], [5]], [[0, 1, 5], [0, 2], [1, 2, 3, 4]]]
    for what in ("heads", "resid", "resid-mid", "v"):
        sweep = cf.patch(model, bound, what, by_span=True, batch_size=2)
        assert sweep.axes[-1].labels == ("a", "end", "rest")
        expected = AlignedPatching(model, bound).effects(what, places)
        np.testing.assert_allclose(
            sweep.per_example.reshape(expected.shape), expected, atol=1e-5 * np.abs(expected).max()
        )
    with pytest.raises(cf.TaskError, match="direction 'denoising' is not defined between prompts aligned"):
        cf.patch(model, bound, "heads", by_span=True, direction="denoising")


def test_spans_of_one_token_are_positions() -> None:
    model = wrapped("gemma2")
    spans = [{f"t{at}": (at, at + 1) for at in range(5)}] * 3
    by_span = cf.patch(model, id_task((5, 5, 5), spans=spans), "heads", by_span=True)
    by_position = cf.patch(model, id_task((5, 5, 5)), "heads", by_position=True)
    assert by_span.axes[-1].labels == ("t0", "t1", "t2", "t3", "t4"), "nothing is left over"
    np.testing.assert_array_equal(by_span.per_example, by_position.per_example)


def test_an_approximation_by_span() -> None:
    model, task = wrapped("llama"), spanned()
    found = cf.approximation(model, task, ["resid-mid", "k"], by_span=True)
    exact = cf.patch(model, task, "k", by_span=True)
    places = [place for place in found.places() if place.kind == "k"]
    assert [place.position for place in places] == list(LABELS) * 4
    np.testing.assert_allclose([place.exact for place in places], exact.effects.ravel(), atol=1e-6)
    bound = task.on(model)
    own, other = (
        PatchingTwin(model, bound)._carried("resid-mid", 1, side, "corrupted")[side.mask]
        for side in (bound.batch.clean, bound.batch.corrupted)
    )
    size = float((own - other).norm() / own.norm())
    assert found.compared["resid-mid"].sizes[1] == pytest.approx(size, rel=1e-4)
    assert found.remarks[0].startswith("The residual stream between attention and MLPs: ")


# -------------------------------------------------------------------- which spans there are
@pytest.mark.parametrize(
    ("spans", "more", "expected"),
    [
        ([{"s": (2, 4)}, {"s": (1, 2)}], {}, {"s": [[2, 3], [1]], "rest": [[0, 1], [0, 2]]}),  # covers the end of one
        ([{"s": (3, 4)}, {"s": (2, 3)}], {}, {"s": [[3], [2]], "rest": [[0, 1, 2], [0, 1]]}),  # of both
        ([{"end": (0, 1)}, {"end": (1, 2)}], {}, {"end": [[0], [1]], "rest": [[1, 2, 3], [0, 2]]}),
        (
            [{"s": (0, 1)}, {"s": (0, 1)}],
            {"positions": [2, 1]},
            {"s": [[0], [0]], "end": [[2], [1]], "rest": [[1, 3], [2]]},
        ),
        ([{"s": (0, 3)}, {"s": (0, 2)}], {}, {"s": [[0, 1, 2], [0, 1]], "end": [[3], [2]]}),
        ([{"rest": (0, 3)}, {"rest": (0, 2)}], {}, {"rest": [[0, 1, 2], [0, 1]], "end": [[3], [2]]}),
    ],
)
def test_what_spans_leave_over(spans: Any, more: Any, expected: dict[str, list[list[int]]]) -> None:
    model = wrapped("gpt2")
    bound = id_task((4, 3), spans=spans, **more).on(model)
    sweep = cf.patch(model, bound, "attn", by_span=True)
    assert sweep.axes[-1].labels == tuple(expected)
    literal = PatchingTwin(model, bound).effects("attn", list(expected.values()))
    assert off_by(sweep, literal) < 1e-4


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (id_task((4, 3)), {}, "these pairs name none: give the task spans="),
        (
            id_task((4, 3), spans=[{"a": (0, 1)}, {"b": (0, 1)}]),
            {},
            "these pairs name a, b, none of them in every pair",
        ),
        (
            id_task((4, 4), spans=[{"a": (0, 1), "b": (2, 3)}, {"a": (0, 3), "b": (1, 2)}]),
            {},
            "row 1: spans 'a' and 'b' overlap, at positions 1 to 1",
        ),
        (id_task((4, 4), spans=[{"rest": (0, 1)}] * 2), {}, "'rest' means all tokens outside the spans"),
        (spanned(), {"by_position": True}, "exclude each other"),
        (spanned(), {"by_position": False}, "exclude each other"),
    ],
)
def test_what_is_refused(task: cf.Task, options: dict[str, Any], message: str) -> None:
    with pytest.raises(cf.ScoreError, match=message):
        cf.patch(wrapped("gpt2"), task, by_span=True, **options)


def test_remedies_name_spans() -> None:
    model = wrapped("gpt2")
    with pytest.raises(cf.ScoreError, match=r"3 to 4 tokens: name spans in them \(spans=\) and use these \(by_span"):
        cf.patch(model, id_task((4, 3)), "resid")
    for call in (cf.patch, lambda *args, **how: cf.attribute(*args[:2], level="node", what=args[2], **how)):
        with pytest.raises(cf.ScoreError, match=r"use the spans that they name, a, b \(by_span=True, --by-span\)"):
            call(model, spanned(), "resid", by_position=True)
    with pytest.raises(cf.ScoreError, match="by_span=True is for edges and for places of a sweep"):
        cf.attribute(model, spanned(), level="node", by_span=True)


def test_prompts_of_unequal_length_go_by_the_spans_that_they_name() -> None:
    """By default: positions of such prompts do not correspond."""
    model = wrapped("gpt2")
    assert cf.patch(model, spanned(), "mlp").to_dict() == cf.patch(model, spanned(), "mlp", by_span=True).to_dict()
    assert cf.attribute(model, spanned(), level="node", what="resid").by_span
    assert cf.approximation(model, spanned(), "attn").compared["attn"].exact.by_span
    assert not cf.patch(model, spanned(), "heads").by_span, "no kind that goes by position"


# -------------------------------------------------------------------- the result
def test_a_sweep_by_span_survives_a_file_and_is_drawn(tmp_path: Path) -> None:
    model = wrapped("llama")
    sweep = cf.patch(model, spanned(), "resid", by_span=True)
    assert not sweep.by_position and sweep.by_span and sweep.names()[::4] == ["resid0", "resid1"]
    layer, span = np.unravel_index(np.abs(sweep.effects).argmax(), sweep.effects.shape)
    best = sweep.top(1)[0]
    assert (best.name, best.position) == (f"resid{layer}", LABELS[span])
    opened = cf.Sweep.open(sweep.save(tmp_path / "sweep.safetensors"))
    assert opened.axes == sweep.axes and opened.to_dict() == sweep.to_dict()
    pytest.importorskip("plotly")
    figure = cf.plot(opened)
    assert "Residual stream by span" in figure.layout.title.text
    assert tuple(figure.layout.xaxis.ticktext) == LABELS and figure.layout.xaxis.title.text == "span"
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), sweep.effects)
    assert "at rest" in figure.data[0].hovertext[1][3]
    heads = [cf.patch(model, spanned(), "heads", by_span=True, direction=direction) for direction in ("noising",) * 2]
    rows = tuple(cf.plot(heads[0]).layout.yaxis.ticktext)
    assert rows == tuple(f"a{layer}.h{head}" for layer in range(2) for head in range(4))
    names = [text.split("<br>")[0] for text in cf.plot(tuple(heads)).data[2].hovertext]
    assert names[:5] == [f"<b>a0.h0 at {label}</b>" for label in LABELS] + ["<b>a0.h1 at a</b>"]


def test_the_record_says_how_positions_are_divided() -> None:
    model = wrapped("gpt2")
    settings = cf.patch(model, spanned(), "resid", by_span=True, layers=0).record.settings
    assert (settings["by_span"], settings["by_position"]) == (True, False)
    settings = cf.patch(model, spanned(), "heads", layers=0).record.settings
    assert (settings["by_span"], settings["by_position"]) == (False, False)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default pairs of IOI, of several templates and lengths."""
    ioi = ("tiny", "--task", "ioi", "--n", "6", "--no-check", "--out", str(tmp_path))
    labels = ("IO", "S1", "S2", "end", "rest")
    code, (out, _) = main(["patch", *ioi, "--what", "resid"]), capsys.readouterr()
    assert code == 0 and "Effects by span and layer" in out
    sweep = cf.Sweep.open(tmp_path / "patch-resid.safetensors")
    assert sweep.axes[-1] == ("span", labels)
    rows = {line.split()[0]: line.split()[1:] for line in out.split("Effects by span")[1].splitlines() if line.strip()}
    np.testing.assert_allclose(
        [[float(x) for x in rows[label]] for label in labels], 100 * sweep.normalised.T, atol=0.51
    )
    code, (out, _) = main(["show", str(tmp_path / "patch-resid.safetensors")]), capsys.readouterr()
    assert code == 0 and re.search(rf"{sweep.top(1)[0].place}\s+{sweep.top(1)[0].position}", out)
    code, (out, _) = main(["patch", *ioi, "--by-span"]), capsys.readouterr()
    assert code == 0 and "each at its strongest span" in out
    options = ("--level", "node", "--what", "resid-mid", "--by-span", "--json")
    code, (out, _) = main(["attribute", *ioi, *options]), capsys.readouterr()
    assert code == 0 and json.loads(out)["scores"]["axes"][-1]["labels"] == list(labels)
    code, (out, _) = main(["approximation", *ioi, "--what", "resid", "--by-span", "--json"]), capsys.readouterr()
    assert code == 0 and {place["position"] for place in json.loads(out)["places"]} == set(labels)
    code, (_, err) = main(["patch", *ioi, "--what", "resid", "--by-position"]), capsys.readouterr()
    assert code == 2 and "IO, S1, S2 (by_span=True, --by-span)" in " ".join(err.split())
