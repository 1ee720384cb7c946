"""Options that several verbs have, each declared once, in groups that verbs pick from.

1. A field of a group is an `option(...)`. Its name is that of the library's keyword wherever there is one, so that
   `given` makes keywords of the options that were given; the library fills in the defaults. `PANEL` of a group is its
   heading in the help.
2. `as_text` and `value_of` stand between typer and the fields: numbers and words of a list are text to typer, and are
   checked here. Everything else is checked by the library, with its own one-line errors.

Names in help texts and lists of words stand below in full, so that help does not wait for torch; a test holds them
against the registries.
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
ALLOW_MISSING = "Take a checkpoint that lacks weights; they are then random numbers."
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


ABLATION_HELP = f"What an edge outside the circuit carries: {listed(ABLATIONS)}."
OF_PLACES = "eap-ig-inputs; atp for q and k, and where the ablation is not corrupted"  # the default
OWN_METHOD = "or package.module:name of your own"
FAMILY = f"Row of the family table to read it by, {OWN_METHOD}. Default: its type's, or an inferred one."
HELD_OUT = "Part of the pairs that is held out to judge the circuit with. Default: 0.5."
SHOW = "How many of the strongest to print."
NAMES = "NAME,NAME,..."


@dataclass(frozen=True)
class Option:
    """How a field is given.

    Attributes:
        names: `--name`, where it is not the field's; a switch that is off by default has one, others `--yes/--no`.
        keyword: the library's, where it is not the field's name.
        least: the smallest number.
        words: all that it can be.
        variable: of the environment, which gives it, too.
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
    """A field of a group, with the further attributes of its `Option`; `MISSING`: it must be given."""
    return field(default=default, metadata={"option": Option(help, **how)})


def as_text(one: Field[Any], declared: Any, panel: str | None) -> tuple[Any, Any]:
    """A field's annotation and default as typer is told of them; `panel`: the heading of its group in the help."""
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
    """What a field holds, from what typer read; an error names the option, what was given, and what may be."""
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
    """The type of what is declared, without None."""
    return next(one for one in (*get_args(declared), declared) if one is not NoneType)


def given(*groups: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The options that were given, as keywords of the library; `without`: fields that are left out."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= {keyword_of(one): getattr(group, one.name) for one in fields(group) if one.name not in without}
    return {name: value for name, value in found.items() if value is not None}


# -------------------------------------------------------------------- groups
@dataclass(frozen=True)
class UncheckedModel:
    PANEL = MODEL
    model: str = option(MODEL_HELP, "tiny", argument=True, metavar="MODEL")
    dtype: str | None = option("Precision, such as bfloat16. Default: the one of the stored weights (GGUF: float32).")
    device: str | None = option("Such as cpu or cuda:1. Default: the accelerator if there is one.")
    device_map: str | None = option(
        'Spread the model over devices: auto, balanced, sequential, or JSON such as {"": "cpu"}.', metavar="MAP"
    )
    offload_folder: Path | None = option("Where --device-map may leave weights that fit nowhere.", metavar="DIR")
    remote: str | None = option('Run on an NDIF server: "ndif", or its URL.', metavar="HOST")
    backend: str = option("What single passes run through: nnsight or hooks.", "nnsight")
    allow_missing: bool = option(ALLOW_MISSING, False)
    family: str | None = option(FAMILY, metavar="NAME")


@dataclass(frozen=True)
class Model(UncheckedModel):
    """A model that is checked when it is loaded."""

    check: bool = option("Check on loading that circuitfind computes this model right.", True)


@dataclass(frozen=True)
class Task:
    PANEL = TASK
    task: str | None = option('A built-in task; see "circuitfind tasks". Default: ioi.', metavar="NAME")
    data: Path | None = option("Your pairs: jsonl, csv, or data of other tools; - is standard input.", metavar="FILE")
    n: int | None = option("Number of pairs. Default: 64, or all of a file.", least=1)
    seed: int = option("Of the pairs, the split, random circuits.", 0, least=0)
    corruption: str | None = option("One of the task's named corruptions.")
    template: str | None = option("Only sentences of this name, such as abba or abba-3 for ioi.")
    counterfactual: str | None = option("Of MIB data: which counterfactual is the corrupted prompt.")
    align: str | None = option("spans: a file's pairs of unequal length, by its columns of spans.")
    chat: bool = option("Each prompt is one turn of the user, in the tokenizer's chat template.", False)
    answer: str | None = option(
        "Of answers of several tokens: first, the token that tells right from wrong, or all, summed. Default: refuse.",
        words=ANSWERS,
    )
    spelling: str | None = option(
        "Of answers: with a space before them, none, as given, or as the text suggests. Default: as the model prefers.",
        words=SPELLINGS,
    )
    unusable: str | None = option("Pairs that cannot be used: error, or drop them. Default: error.", words=UNUSABLE)
    metric: str | None = option(f"{listed(METRICS)}. Default: that of the given scores or circuit, else the task's.")
    bos: bool | None = option("Force a BOS token or none. Default: as the tokenizer does.")


@dataclass(frozen=True)
class Run:
    PANEL = SCORING
    ablation: str | None = option(f"{ABLATION_HELP} Default: that of the given scores or circuit, else corrupted.")
    batch_size: int | None = option("Pairs at a time. Default: what fits in memory.", least=1)


@dataclass(frozen=True)
class Scoring:
    PANEL = SCORING
    method: str | None = option(
        f"Effects of edges: {', '.join(EFFECTS)} (default: {EFFECTS[0]}); of nodes: {', '.join(NODE_EFFECTS)}"
        f" (default: {OF_PLACES}); --what q or k: atp-qk, too. Not effects: {', '.join(RANKINGS)}; of nodes:"
        f" {', '.join(NODE_RANKINGS)}; {OWN_METHOD}."
    )
    steps: int | None = option("Of integrated gradients. Default: 5.")
    rule: str | None = option("Of eap-ig-inputs: left (default), right or midpoint.")
    direction: str | None = option(f"{listed(DIRECTIONS)}. Default: that of the given scores, else noising.")


@dataclass(frozen=True)
class Places:
    PANEL = SCORING
    by_position: bool | None = option(
        "Each position on its own; prompts of equal length only. Default: for stream, attention and MLPs (where lengths"
        " differ, by span); not for the others.",
        names=("--by-position/--all-positions",),
    )
    by_span: bool = option("Each named span of the prompts on its own; prompts may differ in length.", False)
    layers: str | None = option("Only these; neurons need it. Default: all.", metavar="N,N,...")


@dataclass(frozen=True)
class Rank:
    PANEL = SEARCH
    by: str = option("Rank by |effect|, or positive effects first.", BY[0], words=BY)


@dataclass(frozen=True)
class Judge:
    """Scores of a file in place of new ones, and the part of the pairs that is held out."""

    PANEL = JUDGING
    scores: Path | None = option("Take these scores (scores.safetensors) instead of computing.", metavar="FILE")
    holdout: float | None = option("Part of the pairs that is held out to judge with. Default: 0.5.")
    top: int | None = option("How many of the strongest edges to measure exactly. Default: 50.", least=0)
    random: int | None = option("How many random circuits to compare with. Default: 20.", least=0)


@dataclass(frozen=True)
class Out:
    out: Path = option("Folder for the files.", Path("circuitfind-out"), metavar="DIR")


@dataclass(frozen=True)
class Sign:
    """What the scores of an EAP-IG file are."""

    sign: str = option(
        'Of an EAP-IG file: "effect", positive = keep, or "change" of the metric when ablated.', SIGNS[0], words=SIGNS
    )
