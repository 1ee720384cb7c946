"""Comparisons: each number equals what the separate functions give, and a comparison makes itself again."""

from __future__ import annotations

import csv
import html
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from families import build
from toys import contrast, wrapped

import circuitfind as cf
from circuitfind.attribution.eap import EAP
from circuitfind.attribution.method import Method
from circuitfind.cli.app import main
from circuitfind.comparison.methods import METHODS
from circuitfind.comparison.result import Comparison, accuracy, difference, summary
from circuitfind.errors import CircuitfindWarning
from circuitfind.search.learn import learn_masks
from circuitfind.search.methods import SEARCHES

FAST = ["eap", "exact", "hisp", "random"]


@pytest.fixture(scope="module")
def tiny():
    return cf.load("tiny")


@pytest.fixture(scope="module")
def bound(tiny):
    return cf.task("ioi", tiny, n=8).on(tiny)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of rankings: what a comparison has made, those after it take from there."""
    return tmp_path_factory.mktemp("rankings")


@pytest.fixture(scope="module")
def found(tiny, bound, kept):
    return cf.compare(tiny, bound, FAST, seed=3, folder=kept)


@pytest.fixture(scope="module")
def exact(tiny, bound):
    """The exact effects on the pairs of `found`, measured by themselves."""
    return cf.attribute(tiny, bound.split(0.5, 3)[0], "exact")


def test_areas_and_curves_are_those_of_the_separate_functions(tiny, bound, found):
    search, judge = bound.split(0.5, 3)
    scores = cf.attribute(tiny, search, "eap")
    measured = cf.mib(tiny, judge, scores, seed=3)
    entry = found["eap"]
    assert (entry.cpr, entry.cmd) == (measured.cpr, measured.cmd)
    assert entry.signed == measured.signed.points
    assert entry.absolute == measured.absolute.points
    assert (found.n_search, found.n_judge) == (4, 4)


def test_a_part_that_cannot_be_held_out_is_refused(tiny, bound):
    with pytest.raises(cf.TaskError, match="holdout=1: give the fraction of the pairs"):
        cf.compare(tiny, bound, ["eap"], holdout=1)


def test_one_pair_is_ranked_with_and_judged_with(tiny, bound):
    one = bound.subset([2])
    with pytest.warns(CircuitfindWarning, match="there is only one pair, so no pair is held out"):
        found = cf.compare(tiny, one, ["eap", "random"])
    measured = cf.mib(tiny, one, cf.attribute(tiny, one, "eap"))
    assert (found.n_search, found.n_judge) == (1, 1)
    assert (found["eap"].cpr, found["eap"].cmd) == (measured.cpr, measured.cmd)
    assert np.isnan(found["eap"].cpr_interval).all(), "one pair has no interval"


def test_node_rankings_are_compared_as_edge_rankings(tiny, bound, found):
    search, judge = bound.split(0.5, 3)
    scores = cf.attribute(tiny, search, "hisp", level="node").to_edges()
    assert found["hisp"].cpr == cf.mib(tiny, judge, scores, seed=3).cpr


def test_overlap_is_that_of_the_sets_of_edges(tiny, bound, found, exact):
    search, _ = bound.split(0.5, 3)
    size = int(0.05 * tiny.graph.n_edges)
    eap = set(cf.attribute(tiny, search, "eap").top(size).edges)
    measured = set(exact.top(size).edges)
    assert found.overlap[size][0][1] == pytest.approx(len(eap & measured) / len(eap | measured))
    matrix = np.array(found.overlap[size])
    assert np.array_equal(matrix, matrix.T)
    assert (np.diag(matrix) == 1).all()


def test_rank_correlation_is_with_the_exact_effects(found):
    assert found["exact"].rank_correlation == pytest.approx(1)
    assert abs(found["random"].rank_correlation) < found["eap"].rank_correlation < 1


def test_costs_are_counted_per_pair(found):
    # what all prompts begin with is run once, and one pair twice more to prove that this may be
    assert 1 < found["eap"].costs.forwards < 2.1
    assert 0.5 < found["eap"].costs.backwards <= 1
    assert found["exact"].costs.backwards == 0
    assert found["exact"].costs.forwards > 100


def test_the_method_nearest_to_one_is_named_at_each_size(found):
    for at, (point, method) in enumerate(found.closest()):
        distances = {entry.method: abs(1 - entry.absolute[at].faithfulness) for entry in found.entries}
        assert distances[method] == min(distances.values())
        assert point == found[method].absolute[at]


def test_a_method_that_cannot_work_is_listed_and_the_others_go_on(tiny, bound, tmp_path):
    found = cf.compare(tiny, bound, ["eap", "clean-corrupted"], metric="kl")
    assert "flat at the clean run" in found["eap"].refused
    assert not found["clean-corrupted"].refused
    assert [entry.method for entry in found.ranked] == ["clean-corrupted"]
    assert "flat at the clean run" in found.save(tmp_path / "x.md").read_text()


def test_scores_and_functions_of_ones_own(tiny, bound, found):
    search, _ = bound.split(0.5, 3)
    given = {
        "mine": cf.attribute(tiny, search, "eap"),
        "made": lambda model, task: cf.attribute(model, task, "eap"),
        "nodes": lambda model, task: cf.attribute(model, task, "hisp", level="node"),
    }
    own = cf.compare(tiny, bound, given, seed=3)
    assert own["mine"].cpr == own["made"].cpr == found["eap"].cpr
    assert own["nodes"].cpr == found["hisp"].cpr


def test_a_reference_gives_agreement(tiny, bound, found, exact, kept):
    reference = cf.Reference("strongest", tiny.graph, exact.top(40).mask)
    methods = {"exact": None, "random": None}
    found = cf.compare(tiny, bound, methods, reference=reference, seed=3, folder=kept)
    assert found.reference == "strongest"
    assert found["exact"].auroc > 0.99
    assert 0.2 < found["random"].auroc < 0.8
    assert found["exact"].auroc_heads is not None


def test_every_method_gives_a_ranking(monkeypatch):
    def shortly(*given, **asked):
        return learn_masks(*given, **{**asked, "steps": 8})

    monkeypatch.setattr("circuitfind.search.methods.learn_masks", shortly)
    found = cf.compare(wrapped("llama"), contrast(0, lengths=(7, 6) * 4))
    assert {entry.method: entry.refused for entry in found.entries} == dict.fromkeys(METHODS, "")
    assert all(math.isfinite(entry.cpr) and entry.costs.cpu_seconds > 0 for entry in found.entries)


def test_files_hold_everything(found, tmp_path):
    opened = Comparison.open(found.save(tmp_path / "compare.json"))
    assert difference(opened, found) == (0.0, next(iter(dict(found.numbers()))))
    assert opened.entries == found.entries
    with open(found.save(tmp_path / "compare.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 10 * len(FAST)
    first = next(row for row in rows if (row["method"], row["by"]) == ("eap", "absolute"))
    assert float(first["faithfulness"]) == found["eap"].absolute[0].faithfulness
    text = found.save(tmp_path / "compare.md").read_text()
    assert f"| eap | {found['eap'].cpr:.3f} |" in text
    with pytest.raises(cf.FileError, match="saved as"):
        found.save(tmp_path / "compare.txt")


def test_a_folder_holds_the_comparison_in_all_forms(found, tmp_path):
    assert found.save(tmp_path / "compared") == tmp_path / "compared"
    names = {path.name for path in (tmp_path / "compared").iterdir()}
    assert names == {"compare.json", "compare.csv", "compare.md", "compare.html"}
    content = json.loads((tmp_path / "compared" / "compare.json").read_text())
    content["version"] = "1"  # as older files have it
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Comparison.open(tmp_path / "old.json").entries == found.entries
    assert set(found.to_frame()["method"]) == set(FAST) and "hisp" in found._repr_html_()


def test_methods_of_ones_own(tiny, bound, found):
    score = lambda experiment, request: cf.attribute(tiny, experiment.bound, "eap").values  # noqa: E731
    mine = Method("mine", "a method of one's own", "", "", ("edge",), score=score)
    nodes = Method("nodes", "over nodes", "", "", ("node",), score=lambda experiment, _: np.arange(37.0))
    own = cf.compare(tiny, bound, [mine, "eap", "circuitfind.attribution.eap:EAP", nodes], seed=3)
    assert own["mine"].cpr == own["circuitfind.attribution.eap:EAP"].cpr == own["eap"].cpr == found["eap"].cpr
    assert own["mine"].summary == "a method of one's own" and not own["nodes"].refused
    assert cf.compare(tiny, bound, {"other": mine, "same": "eap"}, percentages=[0.1])["other"].method == "other"


def test_what_is_compared_is_read_from_the_registries():
    assert METHODS["eap"].summary == EAP.summary and METHODS["exact-nodes"].summary == METHODS["exact"].summary
    assert METHODS["ugs"].summary == SEARCHES["ugs"].summary and all(entrant.kept for entrant in METHODS.values())


def test_a_number_that_is_undefined_survives_the_file(tiny, bound, found, kept, tmp_path):
    """A constant ranking has no rank correlation with the exact effects."""
    constant = cf.Scores(tiny.graph, tiny.graph.real.astype(np.float32))
    methods = {"exact": None, "constant": constant}
    found = cf.compare(tiny, bound, methods, percentages=[0.05], seed=3, folder=kept)
    assert math.isnan(found["constant"].rank_correlation)
    found.save(tmp_path / "compare.json")
    assert difference(found, Comparison.open(tmp_path / "compare.json")) == (0.0, "exact cpr")


def test_scores_of_another_model_are_listed_and_the_others_go_on(tiny, bound):
    other = wrapped("llama").graph
    foreign = cf.Scores(other, np.zeros(other.real.shape, dtype=np.float32))
    found = cf.compare(tiny, bound, {"foreign": foreign, "random": None}, percentages=[0.05])
    assert "belong to another graph" in found["foreign"].refused and [e.method for e in found.ranked] == ["random"]


def test_difference_sees_any_number_that_moves(found):
    entry = found["eap"]
    point = entry.absolute[4]
    shifted = point._replace(faithfulness=point.faithfulness + 1e-3)
    moved = replace(entry, absolute=(*entry.absolute[:4], shifted, *entry.absolute[5:]))
    other = replace(found, entries=(moved, *found.entries[1:]))
    apart, where = difference(found, other)
    assert apart == pytest.approx(1e-3)
    assert where == f"eap faithfulness of {point.asked} edges (absolute)"
    assert difference(found, replace(found, entries=found.entries[:-1], overlap={}))[0] == math.inf


def test_a_ranking_that_does_nothing_is_told_everywhere(tiny, bound, tmp_path, capsys):
    scores = cf.attribute(tiny, bound.split()[0], "eap")
    values = np.abs(scores.values)
    values[0] *= -10  # out of `input`
    wrong = cf.Scores(tiny.graph, values, scores.record)
    with pytest.warns(UserWarning, match="do nothing"):
        found = cf.compare(tiny, bound, {"mine": wrong, "random": None}, percentages=(0.01, 0.03, 0.09))
    ((method, said),) = found.idle
    assert method == "mine" and said.startswith("the best edges by signed effect ('eap') do nothing")
    assert found["mine"].idle == (said,) and not found["random"].idle
    for path in found.write(tmp_path):
        text = html.unescape(path.read_text())
        assert path.suffix == ".csv" or "by signed effect ('eap') do nothing" in text
    opened = Comparison.open(tmp_path / "compare.json")
    assert opened.entries == found.entries
    assert main(["show", str(tmp_path / "compare.json")]) == 0
    assert "warning: the best edges by signed effect ('eap') do nothing" in capsys.readouterr().err


def test_a_comparison_removes_its_own_scores_only(tmp_path, monkeypatch):
    """Those of another one, that was stopped and has other methods, may have taken hours."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "circuitfind-out" / "compare.part"
    kept.mkdir(parents=True)
    (kept / "exact.safetensors").write_text("of a stopped comparison")
    assert main(["compare", "tiny", "--n", "8", "--methods", "eap"]) == 0
    assert [path.name for path in kept.iterdir()] == ["exact.safetensors"]


def test_a_stopped_comparison_goes_on_with_the_rankings_it_has(tiny, bound, tmp_path, monkeypatch):
    first = cf.compare(tiny, bound, ["eap", "random"], folder=tmp_path)
    monkeypatch.setattr("circuitfind.comparison.methods.score", None)  # nothing can be made anew
    again = cf.compare(tiny, bound, ["eap", "random"], folder=tmp_path)
    assert difference(first, again)[0] == 0
    assert again["eap"].costs == first["eap"].costs
    with pytest.raises(TypeError):
        cf.compare(tiny, bound, ["eap"], folder=tmp_path, seed=1)  # another split: not the same ranking


def test_rankings_of_other_weights_are_made_anew(tmp_path):
    """Under `kl` the whole model scores 0 whatever its weights are."""
    names = {"metric": "kl", "percentages": [0.2], "folder": tmp_path}
    task, made = contrast(8), []
    for seed in (0, 1):
        model = replace(cf.wrap(build("gpt2", seed), backend="hooks"), name="the same")
        cf.compare(model, task, ["eap-ig-inputs"], **names)
        made.append(cf.Scores.open(tmp_path / "eap-ig-inputs.safetensors").values)
    assert not np.array_equal(*made)


def test_wrong_input(tiny, bound, tmp_path):
    with pytest.raises(cf.ScoreError, match=r"'nonsense' is unknown\. Known: exact"):
        cf.compare(tiny, bound, ["nonsense"])
    with pytest.raises(cf.ScoreError, match="no method"):
        cf.compare(tiny, bound, [])
    with pytest.raises(cf.ScoreError, match="'mine' is a int"):
        cf.compare(tiny, bound, {"mine": 3})
    with pytest.raises(cf.CircuitfindError, match="returned a str"):
        cf.compare(tiny, bound, {"mine": lambda model, task: "no"})
    with pytest.raises(cf.ScoreError, match="method 'nonsense' is unknown"):
        cf.compare(tiny, bound, {"nonsense": None, "mine": lambda model, task: "no"})
    with pytest.raises(cf.ScoreError, match="no method"):
        cf.compare(tiny, bound, {})
    asked = []
    late = {"mine": lambda model, task: asked.append(task)}
    with pytest.raises(cf.ScoreError, match="the reference 'ioi' to 12 layers"):
        cf.compare(tiny, bound, late, reference="ioi")
    with pytest.raises(cf.ScoreError, match="between 0 and 1, not 2"):
        cf.compare(tiny, bound, late, percentages=[2])
    with pytest.raises(cf.ScoreError, match=r"percentages=0\.5 is not a list"):
        cf.compare(tiny, bound, late, percentages=0.5)  # type: ignore[arg-type]
    assert not asked, "nothing is ranked before all that was asked for is known to make sense"
    with pytest.raises(cf.FileError, match="no such file"):
        Comparison.open(tmp_path / "none.json")
    (tmp_path / "old.json").write_text('{"format": "circuitfind.comparison"}')
    with pytest.raises(cf.FileError, match=r"version None of circuitfind\.comparison is unknown"):
        Comparison.open(tmp_path / "old.json")
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(cf.FileError, match=r"holds format 'something', expected 'circuitfind\.comparison'"):
        Comparison.open(tmp_path / "other.json")


def test_the_overlap_is_not_folded_into_a_narrow_window(tmp_path, capsys, monkeypatch):
    command = ["compare", "tiny", "--task", "induction", "--n", "8", "--methods", "eap,random,weights"]
    for columns, whole in (("120", True), ("30", False)):
        monkeypatch.setenv("COLUMNS", columns)
        assert main([*command, "--out", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.partition("Overlap (Jaccard)")[2].partition("Written")[0].splitlines()
        assert max(map(len, lines)) <= int(columns)
        assert (sum(line.split()[:1] == ["weights"] for line in lines) == 1) is whole, "else it goes on below"


def test_the_command_writes_files_and_makes_them_again(tmp_path, capsys):
    folder = tmp_path / "out"
    command = ["compare", "tiny", "--task", "induction", "--n", "8", "--methods", "eap,random", "--out", str(folder)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "CPR" in shown and "eap" in shown
    names = {path.name for path in folder.iterdir()}
    assert names >= {"compare.json", "compare.csv", "compare.md"} and not [name for name in names if "part" in name]
    assert "circuitfind compare tiny --task induction" in (folder / "compare.md").read_text()
    assert main(["compare", "--again", str(folder / "compare.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reproduced"] and said["largest_difference"] == 0
    content = json.loads((folder / "compare.json").read_text())
    content["entries"][0]["cpr"] += 0.01
    (folder / "compare.json").write_text(json.dumps(content))
    assert main(["compare", "--again", str(folder / "compare.json")]) == 1
    assert "Not reproduced" in capsys.readouterr().out


def test_accuracy_by_size_and_its_area(tiny) -> None:
    found = cf.compare(tiny, cf.task("copy", tiny, n=8), ["eap", "random"], percentages=[0.0, 0.5, 1.0])
    for entry in found.ranked:
        low, middle, high = (point.accuracy for point in entry.absolute)
        assert entry.accuracy == pytest.approx((low + 2 * middle + high) / 4)
    assert summary(found, intervals=False).headings[3] == "accuracy"
    table = accuracy(found)
    assert table.rows[0][0] == max(found.ranked, key=lambda entry: entry.accuracy).method
    without = replace(cf.task("ioi", tiny, n=8), answers=None, wrong_answers=None, metric="kl")
    assert not accuracy(cf.compare(tiny, without, ["eap-ig-inputs", "random"], percentages=[0.0, 1.0])).rows
