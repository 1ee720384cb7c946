"""The table of mutants does not rot: every patch still applies, names tests that are there, and is in CONTRIBUTING.md.

Running them takes minutes and is left to `python tests/mutants.py`.
"""

from __future__ import annotations

from pathlib import Path

from mutants import MUTANTS, ROOT, table

import circuitfind as cf

PACKAGE = Path(cf.__file__).parent


def test_every_patch_applies_once_and_still_parses() -> None:
    for mutant in MUTANTS:
        patched = mutant.applied_to(PACKAGE)
        if mutant.file.endswith(".py"):
            compile(patched, mutant.file, "exec")
        assert mutant.old != mutant.new, mutant.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_mutant_names_tests_that_are_there() -> None:
    for mutant in MUTANTS:
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}(" in text, f"{mutant.name}: {test} is not there"


def test_the_table_for_contributors_is_this_one() -> None:
    assert table() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "paste: python tests/mutants.py --table"
