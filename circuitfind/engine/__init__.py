"""How a run of the model is made, and which runs there are.

The model is never rewritten. A run is a forward pass of the user's own modules with a *visitor* at its sites
(`models/backends.py`): it is shown each site's tensor in the order of computation, and returns a new tensor, nothing,
or STOP. So every run is three things: where it **starts**, what it **edits**, and what is **remembered** of it.

    residual stream   embed ──●────────────●──▶ ... ──●──▶ final norm ──▶ logits at the read positions
                              │ norm       ▲ (+)      │
    readers (edited)          ├▶ q k v     │          └▶ logits
                              └▶ MLP in    │
    writers (remembered)        heads z, MLP out
                                  each reader sees    base + sum of m_uv (value_u - ablated_u)

| run | starts | edits | remembers |
|---|---|---|---|
| `capture` | layer 0 | nothing | a `Run`: streams, writers, q/k/v, logits |
| `capture_gradients` | layer 0, or every block | a leaf at every reader | a `Run` and the gradients at readers |
| `prepare` | layer 0 | nothing; every reader sees the ablated values | clean, corrupted and empty run |
| `run_circuits` | layer 0 | each reader sees what a 0/1 mask lets through | logits |
| `run_without` | the first block with a missing edge | the same, from the clean run | logits |
| `run_masked` | layer 0 | the same with a mask between 0 and 1 | logits, differentiable in the mask |
| `mask_gradient`, `pair_gradients` | layer 0 | the same | the gradient of all edges or some; of each pair |
| `Restart` | where a patch first changes anything | one reader, the stream, or q, k or v | logits |
| `CircuitState` | the first reader that a removal reaches | the readers that it affects | the new current run |
| `sites` | layer 0, or one layer's attention | nothing | patterns, attention scores, neurons |

Each special path is held by a benchmark (`benchmarks/gpt2_small.py`, `benchmarks/acdc.py`, `benchmarks/patching.py`):
a restart from the middle layer costs half a forward pass, a sparse circuit less than a full one, and a trial of ACDC
what its removal changes.

What the runs are about is said once, in an `Experiment` (`experiment.py`): the model, the pairs, and the setting. From
the bottom up:

1. `writers.py`: what adds to the stream. (What reads it, as one affine map: `AttentionReaders` in `models/layer.py`.)
2. `capture.py`, `ablation.py`, `prepare.py`, `experiment.py`: the runs that do not depend on a circuit. Where pairs
   begin alike, the first tokens are run once and all other runs hold the later tokens only (`prefix.py`).
3. `reader_gradients.py`: backward passes, whole or block by block; `backward_rules.py`: other rules back.
   `edge_effects.py`, `stream_effects.py`: first-order effects from them, of edges, of nodes and places.
4. `circuit_run.py`, `masked_run.py` (on `masked_streams.py`): exact circuits, hard and soft.
5. `restart.py`, `sites.py`, `measure.py`: patching, and the one loop that measures it; attention scores of a head:
   `score_form.py`.
6. `reach.py`, `revision.py`: a circuit that loses edges.
7. `identities.py`, `derivatives.py`: what every model must pass before its numbers are believed; `unembedding.py`.
8. `memory_plan.py`: every byte budget; `batches.py`: the loop over pairs, which backs off where memory runs out.
"""
