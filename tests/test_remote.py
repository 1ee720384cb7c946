"""`remote=`: every call as one job, on a server in a process of its own that does not know circuitfind.

The server (`ndif_server.py`) speaks the protocol of nnsight's client, so all that runs here is what would run against
NDIF; the results must be those of the same model here, to the bit.
"""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import SIZE
from nnsight.schema.request import RequestModel
from torch import nn
from typer.testing import CliRunner

import circuitfind as cf
from circuitfind.cli.app import app
from circuitfind.remote.call import RemoteModel
from circuitfind.remote.server import run

pytestmark = pytest.mark.slow
SERVER = Path(__file__).with_name("ndif_server.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped queries, with the embedded model's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("remote") / "llama", cf.load("tiny", check=False).tokenizer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serve(folder: Path) -> Iterator[Callable[..., str]]:
    """Starts a server and gives its address."""
    running = []

    def start(*options: str) -> str:
        command = [sys.executable, "-W", "ignore", str(SERVER), str(folder), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def here(folder: Path) -> cf.Model:
    return cf.load(str(folder), device="cpu", backend="hooks")


@pytest.fixture(scope="module")
def there(folder: Path, serve: Callable[..., str]) -> cf.Model:
    return cf.load(str(folder), remote=serve())


def pairs(here: cf.Model, n: int) -> cf.Task:
    """What the model itself says, after prompts of which half is random."""
    torch.manual_seed(1)
    clean = torch.randint(3, 128, (n, 7))
    corrupted = clean.clone()
    corrupted[:, 2:4] = torch.randint(3, 128, (n, 2))
    with torch.no_grad():
        logits = here.hf(clean).logits[:, -1]
    answers, wrong = logits.argmax(-1).tolist(), logits.argmin(-1).tolist()
    return cf.Task(clean=clean, corrupted=corrupted, answers=answers, wrong_answers=wrong, name="random")


@pytest.fixture(scope="module")
def task(here: cf.Model) -> cf.Task:
    return pairs(here, 4)


@pytest.fixture(scope="module")
def many(here: cf.Model) -> cf.Task:
    """Enough pairs to split."""
    return pairs(here, 32)


def test_a_model_on_a_server_is_known_without_its_weights(here: cf.Model, there: cf.Model) -> None:
    assert there.graph == here.graph and there.vocabulary == here.vocabulary
    assert all(parameter.is_meta for parameter in there.hf.parameters())
    assert cf.task("ioi", there, n=2).clean == cf.task("ioi", here, n=2).clean


CALLS = {
    "edges": lambda model, task: cf.attribute(model, task).values,
    "edges, exact": lambda model, task: cf.attribute(model, task, method="exact").values,
    "heads": lambda model, task: cf.attribute(model, task, level="node", what="heads").per_example,
    "values": lambda model, task: cf.patch(model, task, "v", by_position=True).per_example,
    "patterns": lambda model, task: cf.patch(model, task, "pattern").per_example,
    "direct": lambda model, task: cf.direct_effects(model, task).scores.values,
    "pattern": lambda model, task: cf.attention(model, task, "a1.h3").pattern,
    "why": lambda model, task: cf.attention_attribution(model, task, "a1.h3", 0, example=0).parts,
    "path": lambda model, task: cf.path_patch(model, task, "a0.h2", "logits").per_example,
    "own metric": lambda model, task: cf.attribute(model, task, metric=lambda logits, batch: logits[:, 5]).values,
    "positions": lambda model, task: cf.attribute(model, task.on(model), level="node", what="resid").per_example,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_there_gives_what_it_gives_here(call: str, here: cf.Model, there: cf.Model, task: cf.Task) -> None:
    np.testing.assert_array_equal(CALLS[call](there, task), CALLS[call](here, task))


def test_a_whole_search_is_one_job(here: cf.Model, there: cf.Model, task: cf.Task) -> None:
    scores, other = cf.attribute(there, task), cf.attribute(here, task)
    assert scores.record == other.record and scores.to_dict() == other.to_dict()
    circuit = scores.top(30)
    assert cf.evaluate(there, task, circuit).to_dict() == cf.evaluate(here, task, circuit).to_dict()
    assert cf.acdc(there, task, threshold=0.1).edges == cf.acdc(here, task, threshold=0.1).edges


def test_the_command_line_writes_what_it_writes_here(
    folder: Path, there: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ([], ["--remote", there.place]):
        out = ["--out", "there" if place else "here"]
        ran = CliRunner().invoke(app, ["attribute", str(folder), "--n", "4", *place, *out])
        assert ran.exit_code == 0, ran.output
    here, abroad = (cf.Scores.open(Path(name) / "scores.safetensors") for name in ("here", "there"))
    np.testing.assert_array_equal(here.values, abroad.values)


def preferred(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """A metric of the user's, in a module that the server does not have."""
    return logits.gather(1, batch.answers[:, 0, :1])[:, 0]


def test_what_a_search_gives_back_may_hold_the_users_own_metric(here: cf.Model, there: cf.Model, many: cf.Task) -> None:
    at_home, abroad = (cf.find(model, many, metric=preferred) for model in (here, there))
    assert abroad.to_dict() == at_home.to_dict()
    again = cf.evaluate(there, abroad.unseen, abroad.circuit)  # these pairs have the metric, and have travelled twice
    assert again.to_dict() == cf.evaluate(here, at_home.unseen, at_home.circuit).to_dict()


def test_functions_that_name_the_model_and_the_package(here: cf.Model, there: cf.Model, many: cf.Task) -> None:
    def cpr(model: cf.Model) -> float:
        def counted(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            return preferred(logits, batch) / model.vocabulary

        def ranked(_: cf.Model, given: cf.Task) -> cf.Scores:
            return cf.attribute(model, given, method="eap")

        return cf.compare(model, many, {"own": ranked}, percentages=[0.1], metric=counted).entries[0].cpr

    assert cpr(there) == cpr(here)


def test_a_metric_from_a_module_of_the_users(
    here: cf.Model, there: cf.Model, task: cf.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_metrics.py").write_text("PLACE = 5\n\n\ndef at(logits, batch):\n    return logits[:, PLACE]\n")
    monkeypatch.syspath_prepend(tmp_path)
    metric = importlib.import_module("users_metrics").at
    found = [cf.attribute(model, task, metric=metric).values for model in (here, there)]
    np.testing.assert_array_equal(*found)


def test_edges_may_come_from_a_generator(here: cf.Model, there: cf.Model, task: cf.Task) -> None:
    edges = cf.attribute(here, task).top(30).edges
    abroad = cf.evaluate(there, task, (edge for edge in edges))
    assert abroad.to_dict() == cf.evaluate(here, task, edges).to_dict()


def test_a_comparison_there_leaves_no_rankings_behind(tmp_path: Path) -> None:
    wanted = ["--task", "ioi", "--n", "8", "--methods", "weights,random", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, ["compare", "tiny", "--remote", "local", *wanted])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "out" / "compare.json").is_file() and not (tmp_path / "out" / "scores").exists()


def test_what_circuitfind_refuses_there_is_raised_here(here: cf.Model, there: cf.Model, task: cf.Task) -> None:
    for call in (lambda model: cf.attribute(model, task, method="eapp"), lambda model: cf.patch(model, task, "heds")):
        with pytest.raises(cf.ScoreError) as at_home:
            call(here)
        with pytest.raises(cf.ScoreError) as abroad:
            call(there)
        assert str(abroad.value) == str(at_home.value)


def test_warnings_come_back(there: cf.Model, task: cf.Task) -> None:
    swapped = cf.Task(task.clean, task.corrupted, task.wrong_answers, task.answers)
    with pytest.warns(UserWarning, match="does not prefer the answer"):
        cf.summarise(there, swapped)


def test_errors_of_the_users_that_are_circuitfinds(there: cf.Model, task: cf.Task) -> None:
    class Flat(cf.ScoreError):
        pass

    def flat(logits: torch.Tensor, batch: object) -> torch.Tensor:
        raise Flat("flat")

    with pytest.raises(cf.ScoreError, match=r"^flat$"):
        cf.attribute(there, task, metric=flat)


def test_any_other_failure_is_told_with_all_that_the_server_said(there: cf.Model, task: cf.Task) -> None:
    def broken(logits: torch.Tensor, batch: object) -> torch.Tensor:
        raise ZeroDivisionError("the user's own")

    with pytest.raises(cf.ModelError, match=r"attribute failed on http.*: ZeroDivisionError: the user") as caught:
        cf.attribute(there, task, metric=broken)
    assert "Traceback" in "".join(caught.value.__notes__)


def test_a_server_that_keeps_the_weights_to_itself(folder: Path, serve: Callable[..., str], task: cf.Task) -> None:
    with pytest.raises(cf.ModelError, match=r"sandbox.*a key that the server trusts"):
        cf.attribute(cf.load(str(folder), remote=serve("--sandbox")), task)


@pytest.mark.parametrize("module", [None, nn.Linear(1, 1, device="meta")])
def test_a_sandbox_has_modules_without_weights_or_none(module: nn.Module | None) -> None:
    assert pickle.loads(run(SimpleNamespace(_module=module), "circuitfind", {}, {}, b""))["weightless"]


def test_a_package_that_the_server_lacks_is_named(there: cf.Model, task: cf.Task) -> None:
    def drawn(logits: torch.Tensor, batch: object) -> torch.Tensor:
        import graphviz

        return logits[:, len(graphviz.__name__)]

    with pytest.raises(
        cf.ModelError, match=r"attribute needs 'graphviz', which http.* does not have: install it there"
    ):
        cf.attribute(there, task, metric=drawn)


def test_a_folder_is_named_by_its_whole_path_and_the_hub_is_not_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuitfind.remote.call.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(folder.parent)
    model = cf.load(folder.name, remote=True)
    assert isinstance(model, RemoteModel) and json.dumps(str(folder)) in model.envoy.to_model_key()


def test_an_nnsight_that_keeps_no_names_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("nnsight.modeling.huggingface._ID_CACHE")
    assert isinstance(cf.load(str(folder), remote=True), RemoteModel)


def test_a_server_that_is_not_there(folder: Path, task: cf.Task) -> None:
    nobody = cf.load(str(folder), remote="http://127.0.0.1:9")
    with pytest.raises(cf.ModelError, match=r"http://127.0.0.1:9 failed: .*NDIF_API_KEY"):
        cf.attribute(nobody, task)


def test_what_needs_the_weights_here_says_so(there: cf.Model, task: cf.Task, tmp_path: Path) -> None:
    with pytest.raises(cf.ModelError, match="are on a server: load it without remote="), cf.only(there, [], task):
        pass
    with pytest.raises(cf.ModelError, match="patch: a job on a server writes no files: leave checkpoint= out"):
        cf.patch(there, task, checkpoint=tmp_path / "sweep.part")
    with pytest.raises(cf.ModelError, match="compare: a job on a server writes no files: leave folder= out"):
        cf.compare(there, task, folder=tmp_path)


def test_what_cannot_be_sent_is_refused_here(folder: Path, task: cf.Task) -> None:
    nobody = cf.load(str(folder), remote="http://127.0.0.1:9")
    with pytest.raises(TypeError, match=r"attribute\(\) .*'metrc'"):
        cf.attribute(nobody, task, metrc="kl")
    lock = threading.Lock()
    with pytest.raises(cf.ModelError, match=r"an argument cannot be sent to http://127.0.0.1:9: .*lock"):
        cf.attribute(nobody, task, metric=lambda logits, batch: logits[:, int(lock.locked())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remote": "ndif.us"}, "give True .NDIF; --remote ndif., the URL of a server"),
        ({"remote": 3}, "remote=3"),
        ({"remote": True, "dtype": "float32"}, "the server chooses"),
        ({"remote": True, "allow_missing": True}, "allow_missing=True is for a model that is loaded here"),
        ({"remote": True, "backend": "hooks"}, "backend='hooks' is for a model that is loaded here"),
    ],
)
def test_places_that_are_none(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(cf.ModelError, match=message):
        cf.load(str(folder), **options)


def test_an_uncovered_family_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(cf.ModelError, match="model family 't5' has no row of its own"):
        cf.load(str(tmp_path), remote=True)


def test_trying_a_job_out_without_a_server(folder: Path, here: cf.Model, task: cf.Task) -> None:
    tried = cf.attribute(cf.load(str(folder), remote="local"), task)
    np.testing.assert_array_equal(tried.values, cf.attribute(here, task).values)


def test_a_family_travels_with_the_job(folder: Path, here: cf.Model, task: cf.Task) -> None:
    own = cf.Family()  # Llama's
    model = cf.load(str(folder), remote="local", family=own)
    np.testing.assert_array_equal(cf.attribute(model, task).values, cf.attribute(here, task).values)
    swapped = cf.load(str(folder), remote="local", family=replace(own, mlp_norm=None))
    with pytest.raises(cf.ModelError, match="is off by"):
        cf.attribute(swapped, task)


def test_the_users_token_stays_here(folder: Path, task: cf.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, serialised = [], RequestModel.serialize
    monkeypatch.setattr(RequestModel, "serialize", lambda *a, **k: sent.append(serialised(*a, **k)) or sent[-1])
    cf.attribute(cf.load(str(folder), remote="local", token="hf_secret", cache_dir="/home/me"), task)
    assert sent and b"circuitfind" in sent[0]  # it is not compressed
    assert b"hf_secret" not in sent[0] and b"/home/me" not in sent[0]
