"""What the docs show is true: Python runs, commands exist with their options, links lead somewhere, names are listed.

* Every ```python block of a page runs, one after the other, as a reader would paste them: on the embedded model, in an
  empty folder. A block under a line `<!-- not run: reason -->` is left out.
* Every line of a ```sh block, and every command in a sentence or table, is a verb with options that it has, or a script
  that exists with options that it reads.
* The site is built by `mkdocs build --strict` in CI; here links and anchors are checked without it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import circuitfind as cf
from circuitfind.cli.app import app, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))} | {"README.md": ROOT / "README.md"}
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SLOW = {"README.md"}  # names a model of the hub


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language, without those that are marked as not run."""
    found = BLOCK.finditer(PAGES[page].read_text(encoding="utf-8"))
    return [text for mark, name, text in (match.groups() for match in found) if name == language and not mark]


def prose(page: str) -> str:
    return BLOCK.sub("", PAGES[page].read_text(encoding="utf-8"))


WITH_CODE = [page for page in PAGES if page not in SLOW and blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"cf": cf, "model": cf.load("tiny", check=False)}
    for number, text in enumerate(blocks(page, "python")):
        exec(compile(text, f"{page}, block {number}", "exec"), names)


def test_pages_with_code_are_found() -> None:
    assert {"quickstart.md", "experiments.md", "evaluation.md", "choosing.md"} <= set(WITH_CODE)


def commands(page: str) -> list[list[str]]:
    """Commands of a page, in blocks and in sentences, as words."""
    lines = [line for text in blocks(page, "sh") for line in text.splitlines()]
    lines += re.findall(r"`((?:circuitfind|python|pytest) [^`]+)`", prose(page))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [[Path(one[0]).name, *one[1:]] for one in words if one]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_exist(page: str, command: list[str]) -> None:
    program, *words = command
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    if program == "circuitfind":
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        if words[0] == "--processes":
            words, options = words[2:], options - {"--processes"}
        if words[0].startswith("-") or words[0].isupper():  # `circuitfind --help`, `circuitfind VERB --help`
            return
        verbs = [word for word in words if word in group.commands]
        assert verbs and verbs[0] == words[0], f"{page}: circuitfind has no verb '{words[0]}'"
        known = {name for p in group.commands[words[0]].params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    elif program == "python" and words[0].endswith(".py"):
        script = ROOT / words[0]
        assert script.is_file(), f"{page}: there is no {words[0]}"
        known = set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    else:
        return
    assert options <= known, f"{page}: {' '.join(command)}: no such option: {sorted(options - known)}"


def test_commands_are_found_and_wrong_ones_fail() -> None:
    assert len(COMMANDS) > 60
    for wrong in (["circuitfind", "discover"], ["circuitfind", "find", "--speed", "3"], ["python", "examples/no.py"]):
        with pytest.raises(AssertionError):
            test_commands_exist("a page", wrong)


def test_readme_names_every_verb() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = re.search(r"The verbs are `([^`]+)`", PAGES["README.md"].read_text(encoding="utf-8"))
    assert found and sorted(found.group(1).split()) == sorted(group.commands)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them of letters, digits and hyphens."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = PAGES[page].parent / path if path else PAGES[page]
        assert place.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(place), f"{page}: {target}: the headings are {sorted(anchors(place))}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(set(PAGES) - {"README.md"})


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", PAGES["api.md"].read_text(encoding="utf-8"), re.MULTILINE)
    names = [path.rsplit(".", 1)[1] for path in listed]
    assert sorted(names) == sorted(set(cf.__all__) - {"__version__"})
    for path, name in zip(listed, names, strict=True):
        module = __import__(path.rsplit(".", 1)[0], fromlist=[name])
        assert getattr(module, name) is getattr(cf, name)


@pytest.mark.parametrize("name", ["methods.md", "choosing.md"])
def test_every_method_is_described(name: str) -> None:
    from circuitfind.attribution.methods import names

    text = PAGES[name].read_text(encoding="utf-8")
    wanted = {*names("edge"), *names("node")} if name == "methods.md" else {*names("edge")}
    missing = [method for method in wanted if f"`{method}`" not in text]
    assert not missing


def test_the_sweep_by_span_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "circuitfind patch tiny --what resid --by-span"
    assert command in PAGES["README.md"].read_text(encoding="utf-8")
    assert any(line.startswith(command) for text in blocks("experiments.md", "sh") for line in text.splitlines())
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*shlex.split(command)[1:], "--out", str(tmp_path)]) == 0
    (shown,) = (text for text in blocks("experiments.md", "text") if text.startswith("Effects by span"))
    assert shown in "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
