"""The message for a name that does not exist."""

from __future__ import annotations

import pytest

from circuitfind.errors import unknown


@pytest.mark.parametrize("name", ["eap_ig", "EAP-IG", " eap-ig-input"])
def test_a_close_name_is_suggested(name: str) -> None:
    message = unknown("method", name, ["acdc", "eap-ig-inputs"])
    assert message == f"method {name!r} is unknown: did you mean 'eap-ig-inputs'? Known: acdc, eap-ig-inputs"


def test_the_suggestion_is_spelled_as_it_is_known() -> None:
    assert "did you mean 'logit_diff'?" in unknown("metric", "Logit-Diff", ["kl", "logit_diff"])


def test_without_a_close_name_the_known_ones_are_listed() -> None:
    assert unknown("method", "zzz", ["acdc", "eap"]) == "method 'zzz' is unknown. Known: acdc, eap"
    assert unknown("method", 3, ["acdc"]) == "method 3 is unknown. Known: acdc"


def test_a_long_list_is_cut() -> None:
    assert unknown("node", "x", (f"a{i}" for i in range(1042))).endswith("a39 and 1,002 more")
