"""How the model is run, and which kinds of run there are.

The model is never rewritten. A run is a forward pass through the user's own modules that calls a *visitor* at each site
(`models/backends.py`), in the order of computation. The visitor gets the site's tensor and returns a tensor to put in
its place, None to leave it, or STOP to end the pass. Runs differ in where they **start**, what they **change** and what
they **return**. *Writers* (nodes) add to the residual stream, *readers* are the inputs that read it.

    residual stream   embed ──●────────────●──▶ ... ──●──▶ final norm ──▶ logits at the read positions
                              │ norm       ▲ (+)      │
    readers (changed)         ├▶ q k v     │          └▶ logits
                              └▶ MLP in    │
    writers (recorded)          heads z, MLP out
                              in a circuit with mask m, reader v sees    base_v + sum of m_uv (value_u - ablated_u)

| run | starts at | changes | returns |
|---|---|---|---|
| `capture` | layer 0 | nothing | a `Run`: residual streams, writers, q/k/v, logits |
| `capture_gradients` | layer 0, or at every block in turn | nothing | a `Run` and the gradients at its readers |
| `prepare` | layer 0 | nothing; in the empty run all readers see ablated values | clean, corrupted, empty run |
| `run_circuits` | layer 0 | each reader sees only the edges that a 0/1 mask keeps | logits |
| `run_without` | the first block with a missing edge | readers of missing edges do not see these edges | logits |
| `run_masked` | layer 0 | each reader sees its edges times a soft mask | logits, differentiable in the mask |
| `mask_gradient` | layer 0 | the same | the metric and its gradient with respect to the mask |
| `pair_gradients` | layer 0 | the same | the same for each pair separately |
| `Restart` | the first layer that a patch changes | one reader's input, the stream, or q, k or v | logits |
| `CircuitState` | the first reader that a removal affects | every reader that it affects | logits; the next state |
| `capture_site` | layer 0 | nothing | one site's values: patterns, neurons, head outputs, ... |
| `attention_scores` | one layer's attention | its queries or keys | what enters the softmax |

Benchmarks measure that each special path is worth having (`benchmarks/gpt2_small.py`, `acdc.py`, `patching.py`): a
restart from the middle layer costs half a forward pass, a sparse circuit less than a full one, and a trial of ACDC only
the modules that its removal affects.

The modules, in reading order. A call's model, pairs and setting travel together as one `Experiment`.

1. `memory_plan.py`: every byte budget. `batches.py`: the loop over pairs, with smaller batches when memory runs out.
2. `writers.py`: what each node adds to the residual stream. (The affine map from the stream to q, k and v is
   `AttentionReaders` in `models/layer.py`.)
3. `capture.py`, `ablation.py`, `prepare.py`, `prefix.py`, `experiment.py`: the runs that do not depend on a circuit.
   Tokens before the first difference between clean and corrupted prompts are run once and then read from a cache.
4. `reader_gradients.py`: the backward pass, whole or block by block. `backward_rules.py`: other backward rules (RelP,
   GIM). `edge_effects.py` and `stream_effects.py`: first-order effects of edges, and of nodes and places.
5. `circuit_run.py`: exact circuits. `masked_run.py`, `masked_streams.py`: circuits with soft masks, and gradients with
   respect to the mask. `reach.py`, `revision.py`: a circuit that loses edges one after the other.
6. `restart.py`, `sites.py`: patched runs and the values to patch. `measure.py`: the loop of all exact patching.
   `score_form.py`: a head's attention scores as a bilinear form.
7. `identities.py`, `derivatives.py`: the checks that a model must pass before its numbers are trusted.
   `unembedding.py`: from the final norm to the logits.
"""
