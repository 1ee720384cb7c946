"""A notebook in JupyterLab in a headless Chromium, run and looked at as a user would: the circuit in its frame at work,
figures, tables, and progress without widgets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
CELLS = [
    """import circuitfind as cf
model = cf.load("tiny")
task = cf.task("ioi", model, n=4)
with cf.show_progress():
    scores = cf.attribute(model, task, "eap")
circuit = scores.top(40).with_group("movers", ["a3.h0"])
circuit.show(height=700)""",
    "scores.heatmap()",
    "scores",
    """import IPython.display, circuitfind.progress, time
shown = []
really = circuitfind.progress._Notebook._html
circuitfind.progress._Notebook._html = staticmethod(lambda bar: shown.append(1) or really(bar))
with cf.show_progress():
    for _ in circuitfind.progress.track(range(3), "a slow loop"):
        time.sleep(0.25)
print("bars", len(shown))""",
]


class Tab:
    """A page of Chromium's, over its debugging protocol."""

    def __init__(self, port: int) -> None:
        import websocket

        pages = json.load(urlopen(f"http://127.0.0.1:{port}/json"))
        where = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket, self.count = websocket.create_connection(where, timeout=60, suppress_origin=True), 0

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            pass
        return answer["result"]

    def value(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        until = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < until, f"{script}: {self.value('document.body.innerText')[-2000:]}"
            time.sleep(0.2)
        return value


def written(path: Path, seconds: float = 60) -> str:
    """A file's text as soon as there is one."""
    until = time.monotonic() + seconds
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < until, f"no {path} in {seconds} seconds"
        time.sleep(0.1)
    return path.read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    pytest.importorskip("jupyterlab")
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "n.ipynb")
    here = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"ServerApp.root_dir": str(folder), "IdentityProvider.token": "", "ServerApp.port": "0"}
    options = [f"--{name}={value}" for name, value in settings.items()]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", *options],
        env=os.environ | here | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runtime, profile = Path(here["JUPYTER_RUNTIME_DIR"]), folder / "profile"
    browser = None
    try:
        known = json.loads(written(runtime / f"jpserver-{server.pid}.json"))
        browser = subprocess.Popen(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                *(f"--disable-{name}" for name in QUIET),
                "--no-first-run",
                "--remote-debugging-port=0",
                "--window-size=1400,1000",
                f"--user-data-dir={profile}",
                f"{known['url']}lab/tree/n.ipynb?reset",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield Tab(int(written(profile / "DevToolsActivePort").split()[0]))
    finally:
        for process in (browser, server):
            if process is not None:
                process.terminate()
                process.wait(20)


def test_a_notebook_shows_circuits_figures_tables_and_progress(lab: Tab, tmp_path: Path) -> None:
    lab.wait("document.querySelectorAll('.jp-Notebook .jp-CodeCell').length >= 4 && Boolean(window.jupyterapp)")
    lab.wait("[...document.querySelectorAll('.jp-NotebookPanel-toolbar')].some((bar) => /Idle/.test(bar.innerHTML))")
    lab.value("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    lab.wait("/bars \\d+/.test(document.querySelector('.jp-Notebook').innerText)", 120)
    inside = "document.querySelector('.jp-Notebook iframe').contentDocument"
    arrows = f"{inside}.querySelectorAll('.plate:not([hidden]) .arrow').length"
    assert lab.wait(arrows) > 20
    assert lab.value(f"{inside}.querySelector('#groups .chip').textContent") == "movers (1)"
    title = lab.value(
        f"(() => {{ const frame = {inside}; frame.getElementById('find').value = 'logits';"
        " frame.getElementById('find').dispatchEvent(new Event('change'));"
        " return frame.querySelector('.panel h3').textContent; })()"
    )
    assert title == "logits"
    assert lab.wait("document.querySelectorAll('.jp-Notebook .js-plotly-plot .heatmaplayer').length") == 1
    assert lab.value("/strongest edges/.test(document.querySelector('.jp-Notebook').innerText)")
    output = lab.value("document.querySelector('.jp-Notebook').innerText")
    assert int(output.split("bars ")[-1].split()[0]) >= 3 and "ipywidgets" not in output
    assert lab.value("document.querySelectorAll('.jp-Notebook progress').length") == 0, "a bar goes when it is done"
    shot = tmp_path / "jupyterlab.png"
    shot.write_bytes(b64decode(lab.ask("Page.captureScreenshot")["data"]))
    if os.environ.get("CIRCUITFIND_SHOTS"):
        shutil.copy(shot, os.environ["CIRCUITFIND_SHOTS"])
