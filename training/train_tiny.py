"""Train the embedded model from scratch and write it, with its tokenizer and its figures, into the package.

    python training/train_tiny.py

GPT-2 class, 4 layers of 8 heads, d=128, about a million parameters, one thread; the same seed and library
versions give the same result. Two things decide whether IOI is learnt within minutes:
1. The answer's position, and every position of a repeated list that the first half determines, weighs 1; all
   others weigh 0.05 (batches.py). With equal weights IOI stays near a coin toss for thousands of steps.
2. Names are repeated in lists and filler sentences too, not only in IOI's templates (see corpus.py).
An answer with several right continuations (greater-than) is trained towards the uniform distribution over them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

import corpus  # noqa: E402
from batches import Batch, make_batch  # noqa: E402
from make_tokenizer import END, make_tokenizer  # noqa: E402
from measure import measure  # noqa: E402

from circuitfind.tasks.builder import SingleTokens  # noqa: E402

OUT = ROOT / "circuitfind" / "models" / "tiny"
CONTEXT = 128
SHIFT_SHARE = 0.25
MIX = {
    "ioi": 24,
    "induction": 16,
    "lists": 8,
    "greater-than": 10,
    "gendered-pronoun": 6,
    "subject-verb-agreement": 6,
    "filler": 6,
}


def streams(words: SingleTokens, seed: int) -> dict[str, Iterator[corpus.Sample]]:
    """One endless stream of samples a kind, each with a seed of its own."""
    made = {name: corpus.behaviour_samples(name, words, seed * 100 + i) for i, name in enumerate(corpus.BEHAVIOURS)}
    return {
        **made,
        "lists": corpus.list_samples(seed * 100 + 50),
        "filler": corpus.filler_samples(seed * 100 + 51),
    }


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Weighted cross-entropy over the batch's items."""
    # Padding is on the right, where a causal model does not look: every place may be attended to.
    logits = model(batch.ids, attention_mask=torch.ones_like(batch.ids), position_ids=batch.position_ids).logits
    log_p = logits.log_softmax(-1)
    return -(log_p[batch.row, batch.position, batch.target] * batch.weight).sum() / batch.weight.sum()


def fresh_model(tokenizer: Any) -> transformers.GPT2LMHeadModel:
    end = tokenizer.convert_tokens_to_ids(END)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return transformers.GPT2LMHeadModel(config)


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Save under the class name that every version of transformers knows (5 writes a new one)."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def figures(model: Any, tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Every behaviour under every corruption, on held-out combinations; IOI on unseen names besides."""
    model.eval()
    words = SingleTokens(tokenizer)
    out: dict[str, Any] = {}
    for name, behaviour in corpus.BEHAVIOURS.items():
        out[name] = {}
        for corruption in behaviour.corruptions:
            rows = corpus.evaluation_rows(name, words, n, seed, corruption)
            result = measure(model, tokenizer, rows, behaviour.metric)
            out[name][corruption] = {"metric": behaviour.metric, "flips": rows[0].flips, **result}
    rows = corpus.unseen_name_rows(n, seed)
    unseen = measure(model, tokenizer, rows, "logit_diff")
    out["ioi"]["s2-io-flip, names never seen in IOI"] = {"metric": "logit_diff", "flips": True, **unseen}
    model.train()
    return out


def short(found: dict[str, Any]) -> str:
    """One line: accuracy and flipped (or lowered) by behaviour, default corruption, and for unseen names."""
    parts = []
    for name, by_corruption in found.items():
        for i, (corruption, f) in enumerate(by_corruption.items()):
            if i == 0 or "never" in corruption:
                label = name if i == 0 else "unseen"
                parts.append(f"{label} {f['accuracy']:.3f}/{f['flipped' if f['flips'] else 'lowered']:.3f}")
    return "  ".join(parts)


def train(steps: int, seed: int, rate: float, decay: float, shift_share: float) -> tuple[Any, Any, float]:
    """The trained model, its tokenizer, and the seconds it took."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    words = SingleTokens(tokenizer)
    model = fresh_model(tokenizer).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    sources = streams(words, seed)
    began, mean_loss = time.time(), 0.0
    for step in range(1, steps + 1):
        samples = [next(sources[kind]) for kind, count in MIX.items() for _ in range(count)]
        loss = loss_of(model, make_batch(samples, tokenizer, rng, shift_share))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 250 == 0 or step == steps:
            line = short(figures(model, tokenizer, 200, seed=1))
            print(f"{step:5d}/{steps} {time.time() - began:5.0f}s loss {mean_loss:.3f}  {line}", flush=True)
    return model, tokenizer, time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--shift-share", type=float, default=SHIFT_SHARE)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model, tokenizer, seconds = train(options.steps, options.seed, options.rate, options.decay, options.shift_share)
    model.eval()
    model.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)  # written for its owner only
    save_tokenizer(tokenizer, options.out)
    found = figures(model, tokenizer, 2000, seed=12345)
    training = {
        "steps": options.steps,
        "seed": options.seed,
        "batch": sum(MIX.values()),
        "mix": MIX,
        "rate": options.rate,
        "weight_decay": options.decay,
        "shift_share": options.shift_share,
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
        "held_out": f"one combination of content words in {corpus.HELD_OUT_ONE_IN}",
        "names_never_in_ioi": corpus.UNSEEN_IN_IOI,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps({"behaviours": found, "training": training}, indent=1)
    (options.out / "figures.json").write_text(text + "\n")
    print(short(found))


if __name__ == "__main__":
    main()
