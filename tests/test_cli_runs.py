"""How a run ends: signals, a reader that goes away, a full disk, a second process on the same folder, pipes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.restart import Restart
from circuitfind.errors import CircuitfindWarning
from circuitfind.export import files
from circuitfind.search.methods import SEARCHES, request_of

EXACT = ("attribute", "tiny", "--method", "exact", "--n", "2", "--out", "x")
PAIR = '{"clean": "Then Mary and", "corrupted": "Then John and", "answer": "Mary", "wrong": "John"}\n'


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny: cf.Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the model loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load", lambda *_, **__: tiny)
    return tmp_path


# -------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_what_was_done_and_says_how_to_go_on(number, capsys, monkeypatch):
    really, calls = Restart.edges, []

    def killed(*words):
        calls.append(1)
        if len(calls) == 40:
            os.kill(os.getpid(), number)  # twice at once, as `timeout` does
            os.kill(os.getpid(), number)
            time.sleep(5)
        return really(*words)

    monkeypatch.setattr(Restart, "edges", killed)
    assert main(EXACT) == 128 + number
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "kept in x/exact.part.safetensors; go on with: circuitfind attribute tiny" in said
    assert signal.getsignal(number) is signal.SIG_DFL and os.listdir("x") == ["exact.part.safetensors"]
    assert main(EXACT) == 0 and os.listdir("x") == ["scores.safetensors"]


def test_nothing_is_said_to_be_kept_that_is_not(capsys, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Restart, "edges", killed)
    assert main(EXACT) == 130
    assert capsys.readouterr().err.strip().endswith("stopped: nothing was written")


def test_in_another_thread_signals_are_left_alone(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["models"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_learn_has_learned_is_kept_by_default(capsys, monkeypatch):
    from circuitfind.search.training import Training

    really = Training.advance

    def stopping(self, state):
        if state.step == 3:
            raise KeyboardInterrupt
        return really(self, state)

    monkeypatch.setattr(Training, "advance", stopping)
    assert main(["learn", "tiny", "--n", "4", "--steps", "4", "--out", "x"]) == 130
    assert "kept in x/learn.part.safetensors; go on with" in capsys.readouterr().err
    monkeypatch.setattr(Training, "advance", really)
    assert main(["learn", "tiny", "--n", "4", "--steps", "4", "--out", "x"]) == 0
    assert re.search(r"memory +batches of 2, .* of weights", capsys.readouterr().out)
    assert "part" not in str(os.listdir("x"))


# -------------------------------------------------------------------- the output's reader goes away
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_closed_pipe_does_not_stop_the_work(words, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = main(["attribute", "tiny", "--method", "eap", "--n", "4", "--out", "x", *words])
    assert code == 141 and sorted(os.listdir("x")) == ["checks.json", "scores.safetensors"]
    assert "Traceback" not in capfd.readouterr().err


def test_output_that_cannot_be_written(capfd, monkeypatch):
    """Closed streams, and a disk that is full: the files are written all the same, and one line says what is lost."""
    with open("/dev/full", "w") as disk:
        monkeypatch.setattr(sys, "stdout", disk)
        assert main(["attribute", "tiny", "--method", "eap", "--n", "4", "--out", "x", "--json"]) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said == "error: the output cannot be written: No space left on device" and os.listdir("x")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["models"]) == 0 and main(["models", "--nothing"]) == 2


# -------------------------------------------------------------------- two processes
def test_a_folder_that_another_process_writes_to_is_refused(capsys):
    Path("x").mkdir()
    with files.held("x", "circuitfind find tiny"):
        assert main(EXACT) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: x: process") and f"process {os.getpid()} on " in said
    assert "(circuitfind find tiny) writes there now" in said
    Path("x", files.LOCK).write_text("process 1 on here (of one that was killed)")
    assert main(EXACT) == 0 and os.listdir("x") == ["scores.safetensors"]


def test_processes_start_once_the_command_line_is_read(monkeypatch):
    """What is wrong in it is said by one process, and help by none of them."""
    started = []
    monkeypatch.setattr("circuitfind.cli.app.launch", lambda *asked: started.append(asked) or 3)
    assert main(["--processes", "2", "models", "--nothing"]) == 2
    assert main(["--processes", "2", "models", "--help"]) == 0 and not started
    assert main(["--processes", "2", "models"]) == 3
    assert started == [(2, ["--processes", "2", "models"])]


# -------------------------------------------------------------------- a full disk
def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_does_not_end_a_run_before_its_result(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("circuitfind.export.files.os.write", full)  # the lock
        patch.setattr("circuitfind.export.files.os.replace", full)
        assert main(["acdc", "tiny", "--n", "4", "--threshold", "1", "--out", "x"]) == 2
    said = capsys.readouterr()
    assert "warning: checkpoint x/acdc.part.safetensors: cannot be written: No space left" in said.err
    assert said.err.strip().endswith("error: x/acdc.json: cannot be written: No space left on device")
    assert "faithfulness" in said.out and not os.listdir("x")


ACDC = ("acdc", "tiny", "--n", "4", "--threshold", "1", "--out", "x")
LONG = {
    "acdc": ACDC,
    "learn": ("learn", "tiny", "--n", "4", "--steps", "2", "--out", "x"),
    "patch": ("patch", "tiny", "--what", "heads", "--n", "2", "--out", "x"),
    "exact": EXACT,
}


@pytest.mark.parametrize("verb", LONG)
def test_a_result_that_cannot_be_written_is_not_lost(verb, capsys, monkeypatch):
    words, really = LONG[verb], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(
            "circuitfind.export.files.os.replace", lambda a, b: (really if ".part." in str(b) else full)(a, b)
        )
        assert main(words) == 2
    (left,), said = os.listdir("x"), capsys.readouterr().err.strip().splitlines()[-1]
    assert left.endswith(".part.safetensors") and "cannot be written: No space left on device; what was " in said
    assert f"is kept in x/{left}; go on with: circuitfind {words[0]}" in said

    def again(*_):
        raise AssertionError("what was measured is measured again")

    monkeypatch.setattr(Restart, "edges", again)
    monkeypatch.setattr("circuitfind.search.acdc_pruning.Pruning._step", again)
    monkeypatch.setattr("circuitfind.search.training.Training.advance", again)
    assert main(words) == 0
    assert left not in os.listdir("x") and os.listdir("x")


def test_ctrl_c_while_a_result_is_judged_keeps_it(capsys, monkeypatch):
    from circuitfind.cli import inputs

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "judged", killed)
        assert main(ACDC) == 130
    assert "kept in x/acdc.part.safetensors; go on with" in capsys.readouterr().err
    assert main(ACDC) == 0


# -------------------------------------------------------------------- before the command line is ready
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_the_command_line_is_imported(name):
    number = getattr(signal, name)
    code = f"""
import os, signal, sys
class Sends:
    def find_spec(self, name, *_):
        if name == "circuitfind.cli.app":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Sends())
from circuitfind.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


# -------------------------------------------------------------------- pairs
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "pipe"])
def test_pairs_come_from_a_pipe(name, place, tiny, monkeypatch):
    from circuitfind.cli import inputs, options
    from circuitfind.cli.output import Output

    reader, writer = os.pipe()
    if name == "pipe":
        name = f"/dev/fd/{reader}"
    else:
        monkeypatch.setattr("circuitfind.tasks.files.Path", lambda path: Path(f"/dev/fd/{reader}"))
    os.write(writer, (PAIR * 2).encode())
    os.close(writer)
    _, bound = inputs.load(options.Model(), options.Task(data=Path(name)), Output(False, []))
    assert len(bound) == 2 and bound.name == "pairs"


def test_a_column_that_is_like_none_is_left_alone():
    row = {**json.loads(PAIR), "template": "abba", "answer_type": "name", "number": 3}
    assert len(cf.Task.from_rows([row, row])) == 2
    for column, meant in (("anwser", "answer"), ("Wrong answers", "wrong_answers"), ("corect_idx", "correct_idx")):
        with pytest.raises(cf.TaskError, match=f"row 0: column '{column}' is unknown: did you mean '{meant}'"):
            cf.Task.from_rows([{"clean": "a", "corrupted": "b", column: "c"}])


def test_the_example_in_the_readme_works(tiny):
    readme = Path(__file__).parents[1] / "README.md"
    (rows,) = re.findall(r"```json\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    Path("pairs.jsonl").write_text(rows)
    assert main(["find", "tiny", "--data", "pairs.jsonl", "--max-checks", "3", "--random", "2"]) == 0


def test_columns_that_are_there_twice_are_refused():
    """Python's readers take the last of the two, without a word."""
    head, cells = "clean,corrupted,answer,wrong", "Then Mary and,Then John and,Mary,John"
    twice = {"a.csv": f"{head},answer\n{cells},Anna\n", "a.jsonl": PAIR.replace('"answer"', '"clean": "x", "answer"')}
    for name, text in twice.items():
        Path(name).write_text(text)
        with pytest.raises(cf.FileError, match=rf"^{name}.*'(answer|clean)' is there twice"):
            cf.Task.from_file(name)
    Path("a.csv").write_text(f"{head}\n{cells}\n".replace(",", ";"))
    with pytest.raises(cf.FileError, match=r"^a.csv: the columns are separated by ';': save the file with commas"):
        cf.Task.from_file("a.csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attribute", "tiny", "--task", ""), "task '' is unknown"),
        (("patch", "tiny", "--by-span", "--by-position"), "--by-span and by_position= exclude each other"),
        (("find", "tiny", "--n", "4", "--random", "9" * 20), "give a whole number, 0 to 10,000"),
        (("find", "tiny", "--n", "9" * 20), "more pairs than can be run: give 1,000,000 at most"),
        (("attribute", "tiny", "--steps", "9" * 20), "--steps 99999999999999999999: give a whole number, 1 to 100,000"),
    ],
)
def test_one_line_says_what_is_wrong(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_without_a_name(monkeypatch, capsys):
    monkeypatch.undo()
    for name in ("", " "):
        assert main(["doctor", name]) == 2
        assert "error: the model's name is empty: give 'tiny', a hub id, or a folder" in capsys.readouterr().err


# -------------------------------------------------------------------- missing weights
def test_missing_weights_are_refused_unless_allowed(place, capsys, monkeypatch):
    monkeypatch.undo()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    model.config.save_pretrained(place)
    kept = {name: value.contiguous() for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    assert main(["doctor", str(place)]) == 2
    said = capsys.readouterr()
    assert "layers.1.mlp.down_proj" in said.err and "--allow-missing" in said.err and "All hold" not in said.out
    assert main(["doctor", str(place), "--allow-missing"]) == 0
    assert "layers.1.mlp.down_proj" in capsys.readouterr().err


# -------------------------------------------------------------------- meaningless numbers, in the library
def test_numbers_without_meaning_are_refused(tiny):
    task = cf.task("ioi", tiny, n=4)
    for words in (
        {"tolerance": 1},
        {"tolerance": float("nan")},
        {"time_limit": -1},
        {"max_checks": 1.5},
        {"random": -1},
    ):
        (name,) = words
        with pytest.raises(cf.ScoreError, match=f"^{name}="):
            cf.find(tiny, task, **words)
    for seed in (-1, 2**63, 2**80):
        with pytest.raises(cf.TaskError, match=f"^seed={seed} is no seed"):
            cf.attribute(tiny, task, "eap", seed=seed)
    with pytest.raises(cf.ScoreError, match="threshold=0: no"):
        cf.acdc(tiny, task, 0, absolute=True)
    for words in ({"n_edges": 0}, {"n_nodes": 0, "level": "node"}, {"sparsity": 0.9999}):
        with pytest.raises(cf.ScoreError, match=f"^{next(iter(words))}="):
            cf.learn_masks(tiny, task, **words)


def test_circuits_without_edges_are_pointed_out(tiny):
    task = cf.task("ioi", tiny, n=4)
    with pytest.warns(CircuitfindWarning, match=r"the top 5 edges hold no path.*n_edges=.*prune=False"):
        assert not len(cf.learn_masks(tiny, task, n_edges=5, steps=2).circuit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CircuitfindWarning)  # a ranking has no circuit that could be empty
        request, setting = request_of(SEARCHES["edge-pruning"], {"steps": 2, "sparsity": 0.999})
        assert SEARCHES["edge-pruning"].score(Experiment.of(tiny, task, setting), request).values.any()
    with pytest.warns(CircuitfindWarning, match=r"at threshold=1e\+30"):
        assert not len(cf.acdc(tiny, task, 1e30))
