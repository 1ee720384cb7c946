"""Options shared by several verbs, declared once, in groups from which verbs choose.

1. A field of a group is an `option(...)`. It has the name of the library's keyword where there is one, so that `given`
   can turn the options that were typed into keywords. The library fills in the defaults. `PANEL` of a group is its
   heading in the help.
2. `as_text` and `value_of` convert between typer and the fields. Typer reads numbers and words of a list as text; they
   are checked here. Everything else is checked by the library, which raises its own one-line errors.

The names in help texts are spelled out below, so that `--help` does not have to import torch. A test compares them with
the registries.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

import typer

from circuitfind.errors import CircuitfindError, unknown

MODEL, TASK, SCORING, SEARCH, JUDGING = "Model", "Task", "Scoring", "Search", "Verification"
MODEL_HELP = 'The embedded model "tiny", a Hugging Face id, a folder, or a .gguf file.'
ALLOW_MISSING = "Load a checkpoint even if weights are missing; missing weights are then random."
SCORES_OR_CIRCUIT = "A circuit.json, scores.safetensors, or EAP-IG's .json or .pt."

EFFECTS = ("eap-ig-inputs", "eap-ig-activations", "eap", "relp", "gim", "clean-corrupted", "exact")
RANKINGS = ("ifr", "activation", "weights", "random")  # their scores are not effects
NODE_EFFECTS = ("eap-ig-inputs", "eap-ig-activations", "atp", "relp", "gim", "clean-corrupted", "exact", "direct")
NODE_RANKINGS = ("atp-star", "hisp", "activation", "random")
ESTIMATES = ("eap-ig-inputs", "atp", "relp", "gim", "clean-corrupted", "atp-qk")  # of places
LEARNED = ("edge-pruning", "subnetwork-probing", "ugs", "matryoshka")
OBJECTIVES = ("metric", "faithfulness", "both")
ABLATIONS = ("corrupted", "zero", "mean", "mean-position", "resample")
KINDS = ("resid", "resid-mid", "attn", "mlp", "attn-out", "mlp-out", "heads", "q", "k", "v", "pattern", "neurons")
METRICS = ("logit_diff", "prob_diff", "logprob", "kl")
ORDERS = ("reverse-topological", "reverse-topological-earliest", "reverse-topological-shuffled", "shuffled", "scores")
BY, LEVELS, DIRECTIONS = ("absolute", "signed"), ("edge", "node"), ("noising", "denoising")
SIGNS = ("effect", "change")
ANSWERS, SPELLINGS, UNUSABLE = ("first", "all"), ("space", "none", "given", "text"), ("error", "drop")
CRITERIA, SEARCHES = ("mean", "at-least", "pairs", "kl"), ("balanced", "absolute", "signed")


def listed(words: tuple[str, ...], last: str = "or") -> str:
    """`a, b or c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


ABLATION_HELP = f"Value that ablated edges carry: {listed(ABLATIONS)}."
OF_PLACES = "eap-ig-inputs; atp for q and k, and where the ablation is not corrupted"  # the default
OWN_METHOD = "or your own as package.module:name"
FAMILY = f"Family: a row of the family table, {OWN_METHOD}. Default: by the model's type, else inferred."
HELD_OUT = "Fraction of pairs held out to judge the circuit. Default: 0.5."
SHOW = "Number of rows to print, strongest first."
NAMES = "NAME,NAME,..."


@dataclass(frozen=True)
class Option:
    """How an option is typed.

    Attributes:
        names: spellings, if not the field's name. A switch that is off by default has one; others have `--yes/--no`.
        keyword: the library's keyword, if not the field's name.
        least: the smallest number allowed.
        words: all values allowed.
        variable: environment variable that sets the option.
        argument: positional, without a `--name`.
    """

    help: str
    names: tuple[str, ...] = ()
    keyword: str = ""
    metavar: str | None = None
    least: int | None = None
    words: tuple[str, ...] = ()
    variable: str | None = None
    argument: bool = False


def option(help: str, default: Any = None, **how: Any) -> Any:
    """A field of a group. `how`: further attributes of its `Option`; default `MISSING`: the option is required."""
    return field(default=default, metadata={"option": Option(help, **how)})


def as_text(one: Field[Any], declared: Any, panel: str | None) -> tuple[Any, Any]:
    """A field's annotation and default for typer. `panel`: heading of its group in the help."""
    option, kind, metavar = one.metadata["option"], _kind(declared), one.metadata["option"].metavar
    default = Parameter.empty if one.default is MISSING else one.default
    if metavar is None and (option.words or kind in (int, float)):
        metavar = "|".join(option.words) or ("N" if kind is int else "X")
        metavar += "" if option.least is None else f">={option.least}"
    if option.argument:
        return Annotated[declared, typer.Argument(metavar=metavar, help=option.help)], default
    spelled = spelled_of(one)
    two = kind is bool and default is not False
    names = option.names or (f"{spelled}/--no-{spelled[2:]}" if two else spelled,)
    told = typer.Option(*names, metavar=metavar, help=option.help, rich_help_panel=panel, envvar=option.variable)
    if kind in (int, float):
        declared = str | None if get_origin(declared) is UnionType else str
        default = default if default in (None, Parameter.empty) else str(default)
    return Annotated[declared, told], default


def value_of(one: Field[Any], declared: Any, text: Any) -> Any:
    """Convert the text that typer read into the field's value; a CircuitfindError says what is allowed."""
    option, kind, spelled = one.metadata["option"], _kind(declared), spelled_of(one)
    if text is None or (kind not in (int, float) and not option.words):
        return text
    if option.words:
        if text not in option.words:
            raise CircuitfindError(unknown(spelled, text, option.words))
        return text
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (option.least is not None and value < option.least):
        limit = "" if option.least is None else f", {option.least} or more"
        raise CircuitfindError(f"{spelled} {text}: give a {'whole ' if kind is int else ''}number{limit}")
    return value


def spelled_of(one: Field[Any]) -> str:
    """The option as it is typed."""
    names: tuple[str, ...] = one.metadata["option"].names
    return names[0] if names else f"--{one.name.replace('_', '-')}"


def keyword_of(one: Field[Any]) -> str:
    return one.metadata["option"].keyword or one.name


def _kind(declared: Any) -> Any:
    """The declared type, without None."""
    return next(one for one in (*get_args(declared), declared) if one is not NoneType)


def given(*groups: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The options that were typed, as keywords of the library, without the fields in `without`."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= {keyword_of(one): getattr(group, one.name) for one in fields(group) if one.name not in without}
    return {name: value for name, value in found.items() if value is not None}


# -------------------------------------------------------------------- groups
@dataclass(frozen=True)
class UncheckedModel:
    PANEL = MODEL
    model: str = option(MODEL_HELP, "tiny", argument=True, metavar="MODEL")
    dtype: str | None = option("Precision, such as bfloat16. Default: that of the stored weights (GGUF: float32).")
    device: str | None = option("Device, such as cpu or cuda:1. Default: an accelerator if there is one.")
    device_map: str | None = option(
        'Spread the model over devices: auto, balanced, sequential, or JSON such as {"": "cpu"}.', metavar="MAP"
    )
    offload_folder: Path | None = option("Folder for weights that fit on no device of --device-map.", metavar="DIR")
    remote: str | None = option('Run on an NDIF server: "ndif", or the URL of another server.', metavar="HOST")
    backend: str = option("How single forward passes are run: nnsight or hooks.", "nnsight")
    allow_missing: bool = option(ALLOW_MISSING, False)
    family: str | None = option(FAMILY, metavar="NAME")


@dataclass(frozen=True)
class Model(UncheckedModel):
    """A model that is checked when it is loaded."""

    check: bool = option("Check at loading that circuitfind's arithmetic equals the model's own.", True)


@dataclass(frozen=True)
class Task:
    PANEL = TASK
    task: str | None = option('Name of a built-in task ("circuitfind tasks" lists them). Default: ioi.', metavar="NAME")
    data: Path | None = option(
        "File with your own pairs: jsonl, csv, or a format of another tool; - is standard input.", metavar="FILE"
    )
    n: int | None = option("Number of pairs. Default: 64, or all pairs of a file.", least=1)
    seed: int = option("Random seed of pairs, the held-out split and random circuits.", 0, least=0)
    corruption: str | None = option("How prompts are corrupted: a name that the task defines.")
    template: str | None = option("Use only this template, such as abba or abba-3 for ioi.")
    counterfactual: str | None = option("For MIB data: the counterfactual to use as the corrupted prompt.")
    align: str | None = option('"spans": align prompts of unequal length by the named spans in the file.')
    chat: bool = option("Wrap each prompt as a user turn in the tokenizer's chat template.", False)
    answer: str | None = option(
        "For answers of several tokens: use the first token that tells right from wrong, or sum over all tokens."
        " Default: refuse such answers.",
        words=ANSWERS,
    )
    spelling: str | None = option(
        "Spelling of answers: with a leading space, without one, as given, or as the prompt's end suggests. Default: as"
        " the model prefers.",
        words=SPELLINGS,
    )
    unusable: str | None = option("What to do with unusable pairs. Default: error.", words=UNUSABLE)
    metric: str | None = option(f"{listed(METRICS)}. Default: that of the given scores or circuit, else the task's.")
    bos: bool | None = option("Add a BOS token, or remove it. Default: what the tokenizer does.")


@dataclass(frozen=True)
class Run:
    PANEL = SCORING
    ablation: str | None = option(f"{ABLATION_HELP} Default: that of the given scores or circuit, else corrupted.")
    batch_size: int | None = option("Pairs per batch. Default: as many as fit in memory.", least=1)


@dataclass(frozen=True)
class Scoring:
    PANEL = SCORING
    method: str | None = option(
        f"Method of scores. Effects of edges: {', '.join(EFFECTS)} (default: {EFFECTS[0]}). Effects of nodes:"
        f" {', '.join(NODE_EFFECTS)} (default: {OF_PLACES}); with --what q or k also atp-qk. Rankings that are not"
        f" effects: {', '.join(RANKINGS)}; of nodes: {', '.join(NODE_RANKINGS)}. Can also be your own:"
        " package.module:name."
    )
    steps: int | None = option("Steps of integrated gradients. Default: 5.")
    rule: str | None = option("Integration rule of eap-ig-inputs: left (default), right or midpoint.")
    direction: str | None = option(
        f"Direction of patching: {listed(DIRECTIONS)}. Default: that of the given scores, else noising."
    )


@dataclass(frozen=True)
class Places:
    PANEL = SCORING
    by_position: bool | None = option(
        "Patch each position separately (prompts of equal length only). Default: yes for the residual stream, attention"
        " and MLPs (by span where lengths differ), no for other places.",
        names=("--by-position/--all-positions",),
    )
    by_span: bool = option("Patch each named span of the prompts separately; prompts may differ in length.", False)
    layers: str | None = option("Layers to patch; required for neurons. Default: all.", metavar="N,N,...")


@dataclass(frozen=True)
class Rank:
    PANEL = SEARCH
    by: str = option(
        "Rank by |effect| (absolute), or by effect with the largest positive first (signed).", BY[0], words=BY
    )


@dataclass(frozen=True)
class Judge:
    """Scores from a file, and the split into pairs for estimates and held-out pairs."""

    PANEL = JUDGING
    scores: Path | None = option(
        "Use the scores in this file (scores.safetensors) instead of computing them.", metavar="FILE"
    )
    holdout: float | None = option("Fraction of pairs held out for measuring. Default: 0.5.")
    top: int | None = option("Number of strongest edges to measure exactly. Default: 50.", least=0)
    random: int | None = option("Number of random circuits to compare with. Default: 20.", least=0)


@dataclass(frozen=True)
class Out:
    out: Path = option("Folder for output files.", Path("circuitfind-out"), metavar="DIR")


@dataclass(frozen=True)
class Sign:
    """Sign convention of an EAP-IG file."""

    sign: str = option(
        'Sign of an EAP-IG file: "effect" (positive = supports the task) or "change" of the metric when ablated.',
        SIGNS[0],
        words=SIGNS,
    )
