"""The examples run as their first lines say, on the embedded model; the notebooks run from top to bottom.

Scripts run in this process: what a reader types, without starting Python anew for each.
"""

from __future__ import annotations

import asyncio
import io
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZE

import circuitfind as cf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
Run = Callable[..., str]


def ran(patch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    patch.setattr(sys, "argv", [script, *arguments])
    patch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`python examples/SCRIPT ARGUMENTS --out tmp_path`, and what it prints."""

    def one(script: str, *arguments: str) -> str:
        ran(monkeypatch, script, *arguments, "--out", str(tmp_path))
        return capsys.readouterr().out

    return one


def figures(page: Path) -> int:
    text = page.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in text
    return text.count("<div data-figure=")


@pytest.fixture(scope="module")
def attributed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `attribution_patching.py` prints, and its folder."""
    folder, said = tmp_path_factory.mktemp("attributed"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        ran(patch, "attribution_patching.py", "--out", str(folder))
    return said.getvalue(), folder


def test_attribution_patching(attributed: tuple[str, Path]) -> None:
    said, folder = attributed
    clean, corrupted = (float(word) for word in said.splitlines()[1].split() if word[0] in "+-")
    assert clean == -corrupted > 1, "in both orders the two sides are each other's negative"
    assert "heads: 32 places" in said and "resid: 4 places" in said and "published" not in said
    assert figures(folder / "attribution.html") == 2 * 7 + 2


@pytest.mark.filterwarnings("ignore:the model does not prefer the answer")
def test_attribution_patching_of_grouped_queries(run: Run, tmp_path: Path) -> None:
    """A Llama of random weights, with the embedded model's tokenizer, from a folder."""
    import transformers as hf

    tokenizer = cf.load("tiny", check=False).tokenizer
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZE, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0)
    folder = tmp_path / "llama"
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = run("attribution_patching.py", "--model", str(folder))
    assert "q: 8 places" in said and "k: 4 places" in said and ".kv" in said


@pytest.mark.slow
def test_attribution_patching_on_a_server(run: Run, attributed: tuple[str, Path]) -> None:
    """As if on one: packed, unpacked where circuitfind is not, and run; the numbers are those of the script here."""
    here, there = attributed[0], run("attribution_patching.py", "--remote", "local")
    assert there.splitlines()[0].startswith("Model(tiny") and there.splitlines()[0].endswith("local)")
    assert [line for line in there.splitlines() if " places, r = " in line] == [
        line for line in here.splitlines() if " places, r = " in line
    ]


@pytest.mark.shared
def test_attribution_patching_of_a_real_llama(run: Run, shared: Path) -> None:
    said = run("attribution_patching.py", "--model", str(shared / "models" / "stories260K"), "--task", "copy")
    assert "heads: 40 places" in said and "k: 20 places" in said


@pytest.mark.slow
def test_activation_patching(run: Run, tmp_path: Path) -> None:
    said = run("activation_patching.py")
    assert said.count("denoising: a") == 3 and said.count("noising: a") == 6
    for direction in ("denoising", "noising"):
        assert figures(tmp_path / f"{direction}.html") == 9


@pytest.mark.filterwarnings("ignore:the model does not prefer the answer")
def test_activation_patching_of_random_weights(run: Run, tmp_path: Path) -> None:
    """Nothing to normalise by: effects are drawn unnormalised, and the script says so."""
    import transformers as hf

    tokenizer = cf.load("tiny", check=False).tokenizer
    torch.manual_seed(0)
    folder = tmp_path / "random"
    hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=len(tokenizer))
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = run("activation_patching.py", "--model", str(folder))
    assert "effects are drawn unnormalised: a normalised effect is undefined" in said
    for direction in ("denoising", "noising"):
        assert figures(tmp_path / f"{direction}.html") == 9


@pytest.mark.parametrize("script", [path.name for path in EXAMPLES.glob("*.py") if path.stem != "eight_prompts"])
def test_mistakes_end_in_one_line(run: Run, script: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(script, "--model", str(tmp_path))
    assert str(ended.value.code).startswith("error: cannot load a causal language model from the folder")


def test_unequal_prompts(run: Run, tmp_path: Path) -> None:
    said = run("unequal_prompts.py")
    assert "by position: " in said and "unaligned: row 0: " in said and "aligned: largest effect a" in said
    assert figures(tmp_path / "unequal.html") == 2


def test_edge_circuit(run: Run, tmp_path: Path) -> None:
    said = run("edge_circuit.py", "--n", "16")
    assert "on held-out pairs" in said and figures(tmp_path / "circuit.html") == 4
    cmd = {line.split(":")[0]: float(line.split()[2]) for line in said.splitlines() if ": CMD " in line}
    assert max(cmd["eap"], cmd["eap-ig-inputs"]) < cmd["random"]
    assert len(cf.Circuit.open(tmp_path / "circuit.json")) > 0 and (tmp_path / "circuit.dot").stat().st_size


@pytest.mark.slow
def test_own_behaviour(run: Run, tmp_path: Path) -> None:
    said = run("own_behaviour.py", "--n", "6")
    assert "eap-ig-inputs: " in said and "faithfulness" in said and figures(tmp_path / "own-behaviour.html") == 4


@pytest.mark.slow
@pytest.mark.shared
def test_own_behaviour_of_a_real_model_and_a_file(run: Run, shared: Path, tmp_path: Path) -> None:
    rows = (EXAMPLES / "pronouns.jsonl").read_text(encoding="utf-8").splitlines()
    data = tmp_path / "pronouns.jsonl"
    data.write_text("\n".join(rows[:4]), encoding="utf-8")
    said = run("own_behaviour.py", "--model", str(shared / "models" / "stories260K"), "--data", str(data))
    assert "1,701 edges" in said


def test_the_eight_prompts_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order, their answers, and that every clean prompt is the corrupted one of its neighbour."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from eight_prompts import eight_prompts

    class AnyModel:
        """Takes every word as one token."""

    monkeypatch.setattr(cf.Task, "on", lambda task, model: task)
    task = eight_prompts(AnyModel())  # type: ignore[arg-type]
    assert task.clean[:2] == [
        "When John and Mary went to the shops, John gave the bag to",
        "When John and Mary went to the shops, Mary gave the bag to",
    ]
    assert task.clean[-1] == "After Martin and Amy went to the park, Martin gave a drink to"
    assert task.corrupted == [task.clean[i ^ 1] for i in range(8)]
    assert task.answers == [" Mary", " John", " Tom", " James", " Dan", " Sid", " Martin", " Amy"]
    assert task.wrong_answers == [task.answers[i ^ 1] for i in range(8)]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """A Jupyter kernel, a process of its own, in which one notebook after the other runs: each from no names at all."""
    jupyter_client = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.real if path.stem == "real_model" else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebooks_run(path: Path, kernel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))  # the kernel is in another folder
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small models are slowed down by threads, most of all on a busy machine
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "committed without outputs"
    start = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}")
    notebook.cells.insert(0, start)
    nbclient.NotebookClient(notebook, km=kernel, timeout=300).execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    framed = any("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert framed == (path.stem != "attribution_against_exact")


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["attribution_against_exact", "quickstart", "real_model"]
