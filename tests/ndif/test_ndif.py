"""`remote=` against NDIF's own server (the package `ndif` on Python 3.13), on loopback, with small models on the CPU.

    bash tests/ndif/setup.sh FOLDER
    CIRCUITFIND_NDIF=FOLDER python -m pytest -n 0 -s tests/ndif

As root, because the server lives in a Debian of its own. Results equal those here to the rounding of another torch, and
the log (`-s`) says how many bytes each call sends and brings back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
import transformers
from families import SIZE
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.request import RequestModel

import circuitfind as cf

pytestmark = pytest.mark.ndif
HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "attribution_patching.py"
START = 'mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" /srv/ndif/bin/python "$@"'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, and a random Llama with grouped queries, also to be served in bfloat16."""
    home, tiny = tmp_path_factory.mktemp("ndif"), cf.load("tiny", device="cpu", check=False)
    torch.manual_seed(0)
    sizes = dict(SIZE, num_key_value_heads=2, vocab_size=len(tiny.tokenizer), initializer_range=0.3)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    saved = {"tiny": tiny.hf, "llama": llama, "half": llama}
    for name, hf in saved.items():
        hf.save_pretrained(home / name)
        tiny.tokenizer.save_pretrained(home / name)
    return {name: home / name for name in saved}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    root = Path(os.environ["CIRCUITFIND_NDIF"])
    shutil.copytree(HERE, root / "srv/serve", dirs_exist_ok=True)
    for folder in folders.values():
        shutil.copytree(folder, f"{root}{folder}", dirs_exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = [f"bfloat16:{folder}" if name == "half" else str(folder) for name, folder in folders.items()]
    inside = ["bash", "-euc", START, str(root), "/srv/serve/serve.py", str(port), *served]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]  # all that it starts ends with it
    process = subprocess.Popen([*namespaces, *inside], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait()


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Bytes of the last job, and which way its result came."""
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    said: dict[str, Any] = {}
    serialised, fetched, loaded = RequestModel.serialize, RemoteBackend.download_result, RemoteBackend.finalize

    def serialise(*arguments: Any) -> bytes:
        job = serialised(*arguments)
        said["up"] = len(job)
        return job

    def fetch(self: RemoteBackend, data: Any) -> Any:
        said["by"] = "store" if isinstance(data, str) else "socket"
        return fetched(self, data)

    def load(self: RemoteBackend, content: bytes) -> Any:
        said["down"] = len(content)
        return loaded(self, content)

    monkeypatch.setattr(RequestModel, "serialize", serialise)
    monkeypatch.setattr(RemoteBackend, "download_result", fetch)
    monkeypatch.setattr(RemoteBackend, "finalize", load)
    return said


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], url: str) -> Callable[[str], tuple[cf.Model, cf.Model]]:
    def load(name: str) -> tuple[cf.Model, cf.Model]:
        dtype = "bfloat16" if name == "half" else None
        here = cf.load(folders[name], device="cpu", dtype=dtype, backend="hooks")
        return here, cf.load(folders[name], remote=url)

    return load


def preferred(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """A metric of the user's."""
    return logits.gather(1, batch.answers[:, 0, :1])[:, 0]


CALLS = {
    "attribute": lambda model, task: cf.attribute(model, task).values,
    "attribute, heads": lambda model, task: cf.attribute(model, task, level="node", what="heads").per_example,
    "attribute, own metric": lambda model, task: cf.attribute(model, task, metric=preferred).values,
    "patch, spans": lambda model, task: cf.patch(model, task, "v", by_span=True).per_example,
    "path_patch": lambda model, task: cf.path_patch(model, task, "a0.h2", "logits").per_example,
    "direct_effects": lambda model, task: cf.direct_effects(model, task).scores.values,
    "attention": lambda model, task: cf.attention(model, task, "a1.h3").pattern,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_a_call_there_gives_what_it_gives_here(call: str, name: str, both: Any, sent: dict[str, Any]) -> None:
    here, there = both(name)
    task = cf.task("ioi", here, n=8, template="abba-3" if "heads" in call else None)
    at_home, abroad = (np.asarray(CALLS[call](model, task)) for model in (here, there))
    off = np.abs(at_home - abroad).max()
    sys.stdout.write(f"\n{name} {call}: off by {off:.1e} of {np.abs(at_home).max():.3g}; {sent}\n")
    assert off <= 1e-5 * max(1.0, np.abs(at_home).max())  # metrics here are of the order of 1 to 10
    assert sent["up"] < 600_000 and sent["by"] == ("socket" if sent["down"] <= 8192 else "store")


def test_a_search_finds_the_circuit_that_it_finds_here(both: Any, sent: dict[str, Any]) -> None:
    here, there = both("tiny")
    task = cf.task("ioi", here, n=16)
    at_home, abroad = cf.find(here, task, edges=30), cf.find(there, task, edges=30)
    sys.stdout.write(f"\nfind: {sent}\n")
    assert abroad.circuit.edges == at_home.circuit.edges and sent["by"] == "store"
    mine, theirs = (cf.evaluate(model, at_home.unseen, at_home.circuit) for model in (here, there))
    assert theirs.faithfulness == pytest.approx(mine.faithfulness, abs=1e-5)
    assert cf.acdc(there, task, threshold=0.1).edges == cf.acdc(here, task, threshold=0.1).edges


def test_a_model_that_is_served_in_half_precision(both: Any) -> None:
    here, there = both("half")
    task = cf.task("ioi", here, n=8)
    at_home, abroad = (cf.attribute(model, task).values.ravel() for model in (here, there))
    r = np.corrcoef(at_home, abroad)[0, 1]
    sys.stdout.write(f"\nbfloat16: r = {r:.5f}\n")
    assert r > 0.99


def test_errors_and_warnings_there_are_raised_here(both: Any) -> None:
    here, there = both("llama")
    task = cf.task("ioi", here, n=4)
    with pytest.raises(cf.ScoreError, match="did you mean 'eap'"):
        cf.attribute(there, task, method="eapp")
    with pytest.warns(UserWarning, match="does not prefer the answer"):
        cf.summarise(there, task)

    def drawn(logits: torch.Tensor, batch: object) -> torch.Tensor:
        import graphviz

        return logits[:, len(graphviz.__name__)]

    with pytest.raises(cf.ModelError, match="attribute needs 'graphviz'"):
        cf.attribute(there, task, metric=drawn)


def test_the_sandbox_of_keys_that_are_not_trusted(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = both("llama")
    envelope = RequestModel.metadata
    monkeypatch.setattr(
        RequestModel, "metadata", lambda self: json.dumps(json.loads(envelope(self)) | {"trusted": False})
    )
    with pytest.raises(cf.ModelError, match=r"sandbox.*a key that the server trusts"):
        cf.attribute(there, cf.task("ioi", here, n=4))


def test_the_tutorial_on_a_llama(folders: dict[str, Path], url: str, tmp_path: Path) -> None:
    """Attribution patching over heads, keys, values and positions, as in docs/experiments.md."""

    def ran(*place: str) -> list[float]:
        command = [sys.executable, "-W", "ignore", str(EXAMPLE), "--model", str(folders["llama"]), *place]
        said = subprocess.run([*command, "--out", str(tmp_path)], text=True, capture_output=True, check=True).stdout
        return [
            float(figure)
            for figure in re.findall(r"r = (\S+) with|places, .* (\S+)$", said, re.M)
            for figure in figure
            if figure
        ]

    at_home, abroad = ran(), ran("--remote", url)
    assert len(at_home) >= 7 and abroad == pytest.approx(at_home, abs=0.011)
