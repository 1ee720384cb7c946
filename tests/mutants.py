"""Mutation testing: faults that would leave a plausible number, and the tests that must notice each of them.

    python tests/mutants.py [--only NAME ...] [--jobs 1]

1. Package and tests are copied into a temporary directory. The tests of all chosen mutants pass there, unpatched.
2. One patch at a time: the exact old text, which occurs once in its file, becomes the new one; the mutant's tests run.
   A mutant is killed where they fail, and lived where they pass.
3. Exit 1 where a mutant lived, a patch no longer applies, or a test cannot be run.

`test_mutants.py` keeps the patches applicable, and the table in CONTRIBUTING.md the one that `--table` prints.
A fault that was found in use becomes a row: first the row, which lives, then the test that kills it. A fault that
changes no result is no row: MIB's area is divided by a rate that is 1, because its last circuit is all edges.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(\S+)", re.MULTILINE)
SHARED = os.environ.get("CIRCUITFIND_SHARED") or str(ROOT.parent / "shared")


class Mutant(NamedTuple):
    """A fault. file: within the package; tests: ids of pytest within the folder of tests; why: what would be wrong."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    why: str

    def applied_to(self, package: Path) -> str:
        """The file's text with the fault; ValueError where the old text does not occur exactly once."""
        text = (package / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"mutant '{self.name}': {self.file} has {self.old!r} {count} times, not once: mend the row"
            )
        return text.replace(self.old, self.new)


# fmt: off
MUTANTS = (
    # lived when they were first tried
    Mutant("bias-of-attention-unscaled", "models/layer.py",
           "attn * self.multiplier", "attn",
           "test_direct.py::test_contributions_and_constants_are_the_logit_difference[granite-biased]",
           "Granite's attention bias without the residual multiplier"),
    Mutant("bias-of-mlp-unscaled", "models/layer.py",
           "mlp * self.multiplier", "mlp",
           "test_direct.py::test_contributions_and_constants_are_the_logit_difference[granite-biased]",
           "Granite's MLP bias without the residual multiplier"),
    Mutant("bias-of-logits-unscaled", "attribution/direct.py",
           ".to(work) * head.slope * counts).sum(-1)", ".to(work) * counts).sum(-1)",
           "test_direct.py::test_the_unembeddings_bias_is_scaled_with_the_logits",
           "the unembedding's bias without the logit scale"),
    Mutant("scale-before-the-head", "attribution/direct.py",
           "(head.scale * head.slope)", "head.slope",
           "test_direct.py::test_contributions_and_constants_are_the_logit_difference[minicpm3]",
           "direct effects without MiniCPM's scale before the unembedding"),
    Mutant("latent-norm-scale-held", "models/latent.py",
           "self.kv_latent_norm.pull_back(read.v, at @ weight.squeeze(1).T)",
           "self.kv_latent_norm.scale(read.v) * self.kv_latent_norm.weight * (at @ weight.squeeze(1).T)",
           "test_families.py::test_scores_equal_autograd_through_split_readers[youtu]",
           "gradients at a latent as if its norm's scale did not depend on it"),
    Mutant("gate-left-out-of-queries", "models/layer.py",
           'self.family.gated and kind != "q" else read', "self.family.gated else read",
           "test_circuit_run.py::test_circuits_equal_the_literal_evaluation[qwen3_next]",
           "circuits replace a query and leave its gate"),
    Mutant("kl-against-the-base-run", "patching/path.py",
           "batch.with_reference(full)", "batch.with_reference(prepared.clean.logits)",
           "test_path.py::test_one_receiver_at_a_time_is_one_edge_at_a_time[llama-denoising-kl]",
           "KL of denoising paths is against the corrupted run"),
    Mutant("ifr-weights-tokens-over-the-batch", "attribution/ifr.py",
           "mask / mask.sum(1, keepdim=True)", "mask / mask.sum() * len(mask)",
           "test_ifr.py::test_every_reader_and_token[llama]",
           "IFR: long prompts of a batch weigh more than short ones"),
    Mutant("places-do-not-communicate", "placed_scores.py",
           "np.where(here, read, read.any(axis=0))", "read",
           "test_placed_scores.py::test_pruning_follows_tokens",
           "pruning as if a head wrote where it reads its values"),
    Mutant("minimality-threshold-tie", "evaluation/minimality.py",
           "(np.abs(means) < threshold)", "(np.abs(means) <= threshold)",
           "test_minimality.py::test_the_threshold_is_on_magnitudes",
           "minimality: an effect equal to the threshold is superfluous"),
    Mutant("minimality-order-of-ties", "evaluation/minimality.py",
           'order = np.argsort(-means, kind="stable")', 'order = np.argsort(means, kind="stable")[::-1]',
           "test_minimality.py::test_an_edge_that_leads_nowhere_is_superfluous",
           "minimality: equal effects turn the circuit's order round"),
    Mutant("accuracy-counts-ties", "metrics.py",
           "> bar", ">= bar",
           "test_metrics.py::test_an_answer_that_ties_with_a_wrong_one_is_not_accurate",
           "accuracy counts an answer that ties with a wrong one"),
    Mutant("lowered-counts-ties", "evaluation/diagnosis.py",
           "empty < full", "empty <= full",
           "test_tasks_diagnosis.py::test_a_pair_whose_two_sides_measure_the_same_is_not_lowered",
           "`lowered` counts pairs that measure the same on both sides"),
    Mutant("own-decade-is-wrong", "tasks/numbers.py",
           "(self.whole and answer == own)", "answer == own",
           "test_tasks_numbers.py::test_decades_are_compared_where_the_decade_ends_a_token[digits-01]",
           "greater-than by decades: the start year's own decade counts as wrong"),
    Mutant("mib-wrong-is-any-letter", "tasks/formats.py",
           "others if theirs == right else [theirs]", "others",
           "test_tasks_formats.py::test_mib_multiple_choice",
           "MIB's multiple choice: other letters in place of the counterfactual's answer"),
    Mutant("resample-without-seed", "engine/ablation.py",
           "manual_seed(seed)", "manual_seed(0)",
           "test_circuit_run.py::test_resampling_gives_nobody_its_own_prompt",
           "`resample` deals alike whatever the seed"),
    Mutant("resample-seed-not-asked", "engine/experiment.py",
           "resampled(batch, self.setting.seed, self.bound.copies)", "resampled(batch, 0, self.bound.copies)",
           "test_path.py::test_metric_and_ablation_of_the_call",
           "a call's seed does not reach `resample`"),
    Mutant("random-circuit-back-from-input", "evaluation/random_circuits.py",
           "node = int(self.rng.integers(self.graph.limits[reader]))", "node = 0",
           "test_evaluation.py::test_random_paths_lead_back_through_every_writer[plain]",
           "random circuits and paths lead back to `input` directly"),
    Mutant("acdc-dangling-edges-backwards", "search/acdc_pruning.py",
           "np.flatnonzero(self._states[0].mask[node]).tolist():",
           "np.flatnonzero(self._states[0].mask[node]).tolist()[::-1]:",
           "test_acdc_options.py::test_dangling_nodes_go_before_the_next_edge_and_in_their_order[4]",
           "ACDC: a dangling node's edges go in another order"),
    Mutant("acdc-dangling-nodes-backwards", "search/acdc_pruning.py",
           "node, *pending = pending", "*pending, node = pending",
           "test_acdc_options.py::test_dangling_nodes_go_before_the_next_edge_and_in_their_order[4]",
           "ACDC: dangling nodes go last first"),
    Mutant("acdc-dangling-late", "search/acdc_pruning.py",
           "None if place is None else place + 1", "None",
           "test_acdc_options.py::test_dangling_nodes_go_before_the_next_edge_and_in_their_order[4]",
           "ACDC side by side: dangling nodes wait for the edges tried with the one that left them"),
    Mutant("key-without-wrong-answers", "engine/experiment.py",
           "batch.answers, batch.wrong]", "batch.answers]",
           "test_acdc_checkpoint.py::test_the_key_of_a_run_knows_every_pair[wrong_answers]",
           "a checkpoint of other wrong answers is taken up"),
    # engine and models
    Mutant("hooks-proved-on-random-tokens", "engine/experiment.py",
           "require_identities_on(model.adapter, bound.batch)", "pass",
           "test_model_state.py::test_a_hook_that_acts_on_long_prompts_is_refused",
           "a user's hook that acts on late positions or long prompts only goes unnoticed"),
    Mutant("derivatives-of-whole-prompts", "engine/derivatives.py",
           "inside, along = list(leaves", "return 0.0\n    inside, along = list(leaves",
           "test_model_state.py::test_a_hook_that_changes_gradients_only_is_refused",
           "a user's hook that detaches or scales gradients goes unnoticed"),
    Mutant("norm-gradient-of-scale", "models/norms.py",
           "value=-1)", "value=1)",
           "test_norms.py::test_the_vector_jacobian_product_is_autograds[bloom]",
           "gradients at a norm's input: sign of the scale's part"),
    Mutant("norm-fold-other-axis", "models/norms.py",
           "folded.mean(0, keepdim=True)", "folded.mean(-1, keepdim=True)",
           "test_norms.py::test_folding_into_a_projection[bloom]",
           "LayerNorm's mean taken over the projection's outputs"),
    Mutant("post-norm-without-weight", "models/layer.py",
           "norm.centre(weight) * norm.weight", "norm.centre(weight)",
           "test_families.py::test_writers_are_the_literal_ones[gemma2]",
           "heads' outputs without the post-norm's weight"),
    Mutant("post-norm-of-the-heads", "models/layer.py",
           "self.post_attn_norm.scale(attn_out.to(self.work))", "self.post_attn_norm.scale(z.to(self.work))",
           "test_families.py::test_writers_are_the_literal_ones[gemma2]",
           "post-norm's scale taken before the output projection"),
    Mutant("closed-edges-of-idle-writers", "engine/masked_run.py",
           "        leading = useful(edges)", "        pass",
           "test_masked_run.py::test_gradients_equal_autograd_through_split_readers[gpt2-corrupted]",
           "masked gradients: a closed edge's writer is not computed if nothing open reads it"),
    Mutant("scale-constant-under-masks", "models/layer.py",
           "along * scale**2 / -streams.shape[-1]", "along * 0",
           "test_masked_run.py::test_gradients_equal_autograd_through_split_readers[gpt2-corrupted]",
           "masked gradients: the norm's scale of q, k and v is a constant"),
    Mutant("post-norm-heads-uncoupled", "engine/circuit_run.py",
           "feeding(graph, prepared.adapter.coupled)", "feeding(graph, False)",
           "test_circuit_run.py::test_circuits_of_few_edges_agree_in_both_forms[gemma2]",
           "circuits forget that a post-norm ties a layer's heads together"),
    Mutant("fused-keys-and-values-exchanged", "models/layer.py",
           "groups[..., -2, :], groups[..., -1, :])", "groups[..., -1, :], groups[..., -2, :])",
           "test_families.py::test_scores_equal_autograd_through_split_readers[falcon-new]",
           "Falcon: keys taken for values"),
    Mutant("quarters-in-another-order", "models/layer.py",
           "q, v, k = rearrange(features", "q, k, v = rearrange(features",
           "test_families.py::test_scores_equal_autograd_through_split_readers[codegen]",
           "CodeGen: keys taken for values"),
    Mutant("readers-unproved", "engine/identities.py",
           "yield from (Identity(name, error, tolerance / 10) for name, error in", "list(error for name, error in",
           "test_inference.py::test_a_wrong_row_is_caught",
           "a wrong order of a fused projection's features goes unnoticed"),
    Mutant("inferred-row-unproved", "loading.py",
           "if not check and not model.adapter.inferred:", "if not check:",
           "test_inference.py::test_an_inferred_row_is_proved_whether_or_not_a_check_is_asked_for",
           "check=False takes an inferred row as it is"),
    Mutant("mlp-with-its-bias", "models/layer.py",
           "x = x if bias is None else x - bias", "x = x",
           "test_families.py::test_writers_are_the_literal_ones[gpt2]",
           "MLPs' outputs with the bias that is no writer's"),
    Mutant("shared-norm-counts-twice", "engine/reader_gradients.py",
           "self.at[site, layer] = value.view_as(value)", "self.at[site, layer] = value",
           "test_families.py::test_scores_equal_autograd_through_split_readers[phi]",
           "parallel blocks: MLP gradients count attention's, too"),
    Mutant("positions-from-1", "batch.py",
           "self.whole_mask.long().cumsum(-1) - 1", "self.whole_mask.long().cumsum(-1)",
           "test_traps.py::test_positions_are_given_explicitly",
           "position ids are one too high"),
    Mutant("divided-past-what-is-read", "engine/prefix.py",
           "return min(int(same.long().cumprod(0).sum()), read)", "return int(same.long().cumprod(0).sum())",
           "test_prefix.py::test_divided_no_later_than_what_is_read",
           "tokens that are read count as run before"),
    Mutant("divided-unproved", "engine/prefix.py",
           "holds = error <=", "holds = error != error or error >= 0 or error <=",
           "test_prefix.py::test_a_model_that_forgets_its_cache_runs_whole_prompts",
           "a model that forgets its cache is run in two parts"),
    Mutant("visitors-see-parts", "models/backends.py",
           "here = gathered(value.to(home)", "here = gathered(value",
           "test_devices.py::test_no_tensor_is_formed_on_the_wrong_device",
           "what a module on another device holds is worked with there"),
    Mutant("offloaded-weights-kept", "models/placement.py",
           "if value.requires_grad or value.is_meta:", "if value is not None:",
           "test_devices.py::test_autograd_keeps_no_offloaded_weights",
           "autograd holds on to every weight that was loaded from disk"),
    Mutant("padding-in-the-mean", "engine/ablation.py",
           "weight = mask.to(value.device, value.dtype)",
           "weight = torch.ones_like(mask).to(value.device, value.dtype)",
           "test_circuit_run.py::test_ablations_equal_the_literal_evaluation[llama-mean]",
           "mean ablation sums over padding"),
    Mutant("mean-counts-clean-tokens", "engine/ablation.py",
           "int(batch.corrupted.mask.sum())", "int(batch.clean.mask.sum())",
           "test_circuit_run.py::test_means_are_of_the_corrupted_prompts_alone",
           "mean ablation of unequal prompts divides by the clean side's tokens"),
    Mutant("mean-of-the-clean-prompts", "engine/ablation.py",
           "capture(adapter, batch.corrupted, stop=True).writers", "capture(adapter, batch.clean, stop=True).writers",
           "test_evaluation.py::test_faithfulness_equals_the_literal_evaluation[gpt2-mean]",
           "mean ablation averages the clean prompts"),
    Mutant("empty-run-other-bias", "engine/prepare.py",
           "self._add(self.values.mlps[layer], layer, 1)", "self._add(self.values.mlps[layer], layer, 0)",
           "test_evaluation.py::test_faithfulness_equals_the_literal_evaluation[gpt2-zero]",
           "the empty run adds attention's bias twice, the MLP's never"),
    Mutant("trimmed-to-the-clean-side", "batch.py",
           "(self.clean.mask | self.corrupted.mask).any(0)", "self.clean.mask.any(0)",
           "test_aligned_spans.py::test_pairs_of_equal_length_lose_their_alignment",
           "longer corrupted prompts lose their end"),
    Mutant("another-process-trial-not-run", "search/acdc_pruning.py",
           "chain(*self._groups[: trial + 1])", "chain(*self._groups[:trial])",
           "test_processes.py::test_two_processes_equal_one",
           "ACDC by several processes: an edge that another one tried stays here"),
    Mutant("pairs-of-processes-run-twice", "engine/batches.py",
           "(division is not None or divided.place == 0)", "True",
           "test_processes.py::test_two_processes_equal_one",
           "more processes than pairs: a pair counts as often as it was run"),
    Mutant("parts-of-processes-reversed", "engine/batches.py",
           "for rows, result, _ in parts:", "for rows, result, _ in parts[::-1]:",
           "test_processes.py::test_two_processes_equal_one",
           "several processes: results of pairs in another order"),
    Mutant("ranks-in-step-by-their-own-clocks", "processes.py",
           "if group().size == 1 and not group().in_step:", "if group().size == 1:",
           "test_processes.py::test_ranks_in_step_divide_nothing_and_agree",
           "processes that divide a model's heads do not agree on what may differ between them"),
    Mutant("clean-streams-after-a-removal", "engine/revision.py",
           "self._clean[self._trial.readers] = False", "pass",
           "test_revision.py::test_streams_over_budget_are_computed_again",
           "ACDC: readers that a removal reached read the clean run's streams"),
    Mutant("clean-streams-of-cut-off-writers", "engine/revision.py",
           "~missing & ~(self.mask & ablated[:, None]).any(axis=0)", "~missing",
           "test_revision.py::test_a_reader_of_all_edges_reads_what_cut_off_writers_carry[llama-corrupted]",
           "ACDC, gone on with: readers of all edges read clean values of writers that nothing reaches"),
    Mutant("proof-of-blocks-outlives-them", "models/adapter.py",
           "self.divided, self.by_block = 0, None", "self.divided = 0",
           "test_reader_gradients.py::test_blocks_that_meet_outside_the_stream_go_back_in_one_pass",
           "gradients block by block of a model whose modules were replaced since it was proved"),
    Mutant("blocks-under-hooks", "engine/memory_plan.py",
           "adapter.by_block is False or adapter.state.hooks", "adapter.by_block is False",
           "test_reader_gradients.py::test_under_hooks_gradients_go_back_in_one_pass",
           "gradients block by block under hooks that tie blocks together at late tokens"),
    Mutant("trials-not-cumulative", "engine/revision.py",
           "masks[trial:, writer, reader] = False", "masks[trial, writer, reader] = False",
           "test_revision.py::test_trials_equal_circuits_run_from_scratch[bloom-backwards]",
           "ACDC side by side: each trial removes its own edge only"),
    Mutant("stream-replaced-without-bias", "engine/restart.py",
           "after if bias is None else after + bias", "after",
           "test_patching.py::test_every_place_equals_a_forward_pass_of_its_own[gpt2-resid-mid]",
           "the stream after a replaced middle lacks the MLP's bias"),
    Mutant("pattern-of-another-group", "models/layer.py",
           "value.repeat_interleave(self.layout.n_heads // self.layout.n_kv_heads, dim=-2)",
           "torch.cat([value] * (self.layout.n_heads // self.layout.n_kv_heads), dim=-2)",
           "test_patching.py::test_every_place_equals_a_forward_pass_of_its_own[llama-pattern]",
           "patterns times another group's values"),
    Mutant("gradient-of-the-mlp-missing", "engine/stream_effects.py",
           "stream if adapter.graph.parallel else stream + at_mlp, stream)", "stream, stream)",
           "test_families.py::test_node_scores_equal_autograd_through_split_readers[gpt2]",
           "heads' node scores without the paths through their own MLP"),
    Mutant("relp-gate-not-halved", "engine/backward_rules.py",
           "gradient / 2", "gradient",
           "test_relp.py::test_edges_equal_autograd_through_the_rules[llama-noising-1]",
           "RelP: both factors of a gated MLP count in full"),
    Mutant("gim-softmax-as-it-is", "engine/backward_rules.py",
           "TEMPERATURE = 2.0", "TEMPERATURE = 1.0",
           "test_gim.py::test_edges_equal_autograd_through_the_rules[llama-noising-1]",
           "GIM: softmax keeps its own derivative"),
    Mutant("gim-all-is-handed-on", "engine/reader_gradients.py",
           "value if self.hand_on is None else self.hand_on(site, layer, value)", "value",
           "test_gim.py::test_edges_equal_autograd_through_the_rules[llama-noising-1]",
           "GIM: all that arrives at queries, keys and values is handed on"),
    Mutant("copies-of-the-next-heads", "engine/reader_gradients.py",
           ".repeat_interleave(layout.d_head) % view.copies", ".repeat_interleave(layout.d_head) // layout.n_kv_heads",
           "test_ungrouped.py::test_estimates_equal_autograd_through_each_heads_own_copy[eap-alphas0-llama]",
           "scores by query head: a copy's gradient is that of the heads side by side"),
    Mutant("copies-patched-together", "engine/restart.py",
           "self._for_one_copy(layer, head, visit) if copies > 1 else visit", "visit",
           "test_ungrouped.py::test_exact_effects_equal_a_run_with_one_heads_copy_patched[llama-noising]",
           "exact effects by query head: the whole group attends to the patched key"),
    Mutant("half-precision-gradients-unscaled", "engine/reader_gradients.py",
           "gradient if scale == 1 else gradient * scale", "gradient",
           "test_attribute.py::test_small_gradients_survive_float16",
           "float16: gradients keep the scale that saved them from underflow"),
    Mutant("blocks-unproved", "engine/reader_gradients.py",
           " and _equal_by_block(whole)", "",
           "test_reader_gradients.py::test_blocks_that_meet_outside_the_stream_go_back_in_one_pass",
           "gradients block by block miss what blocks hand on beside the stream"),
    Mutant("unreached-nodes-under-zero", "engine/circuit_run.py",
           "if not prepared.interchange:  # then nodes", "if False:  # then nodes",
           "test_circuit_run.py::test_ablations_equal_the_literal_evaluation[llama-zero]",
           "zero ablation: nodes that nothing reaches count as ablated"),
    Mutant("site-means-clean-mask", "engine/sites.py",
           "mask, count = part.corrupted.mask,", "mask, count = part.clean.mask,",
           "test_aligned_spans.py::test_means_of_places_are_over_the_corrupted_prompts_tokens",
           "sweeps: means of unequal prompts under the clean side's mask"),
    Mutant("sink-in-the-pattern", "engine/sites.py",
           "scores.softmax(-1)[..., :length]", "scores[..., :length].softmax(-1)",
           "test_qk_fix.py::test_every_position_is_its_change_of_the_pattern[gpt_oss-q]",
           "attention scores: a sink takes no attention"),
    # attribution
    Mutant("score-without-the-norms-own-scale", "engine/score_form.py",
           "return Affine(linear * ratio.unsqueeze(-1), constant)", "return Affine(linear, constant)",
           "test_attention_attribution.py::test_parts_equal_the_literal_ones[qwen3]",
           "parts of attention scores with the unit vectors' scale of a norm of queries"),
    Mutant("score-of-another-key-head", "engine/score_form.py",
           'head if kind == "q" else head // adapter.graph.group', "head if kind == \"q\" else 0",
           "test_attention_attribution.py::test_parts_equal_the_literal_ones[llama]",
           "parts of attention scores read another group's keys"),
    Mutant("clusters-of-any-cloud", "evaluation/clusters.py",
           "if p_value <= LEVEL else", "if p_value <= 1 else",
           "test_clusters.py::test_one_behaviour_is_not_split",
           "a task of one behaviour is divided into clusters"),
    Mutant("confirmed-edges-dropped-in-haste", "search/complete.py",
           "circuit.mask | (self.tests.effects >= KEPT), circuit, late=True", "circuit.mask, circuit, late=True",
           "test_recovery.py::test_a_complete_search_keeps_the_time_limit",
           "what a complete search confirmed before its time was up is dropped"),
    Mutant("clusters-that-serve-each-other", "evaluation/clusters.py",
           "found = joined[found]", "found = found + 0",
           "test_clusters.py::test_circuits_that_serve_each_others_pairs_are_one",
           "scores that change by degrees are clusters, though one circuit serves them all"),
    Mutant("own-mlp-not-rerun", "attribution/exact.py",
           "moved = restart.after_mlp(layer, written)", "moved = written",
           "test_exact_nodes.py::test_a_node_is_all_its_outgoing_edges[gpt2-corrupted]",
           "exact effects of heads past their own layer's MLP"),
    Mutant("denoising-at-the-clean-run", "attribution/eap.py",
           '1.0 if direction == "noising" else 0.0', "1.0",
           "test_attribute.py::test_estimates_equal_autograd_through_split_readers[gpt2-eap-denoising-alphas1]",
           "denoising scores from the clean run's gradient"),
    Mutant("ig-left-is-right", "attribution/eap.py",
           '"left": 0.0', '"left": 1.0',
           "test_attribute.py::test_the_points_of_integrated_gradients",
           "EAP-IG's default rule uses the other ends"),
    Mutant("ig-activations-from-corrupted", "attribution/eap.py",
           "for k in range(1, steps + 1)]", "for k in range(steps)]",
           "test_eap_ig_activations.py::test_activations_equal_autograd_with_one_component_held[gpt2]",
           "EAP-IG-activations takes the corrupted end in place of the clean one"),
    Mutant("direct-reads-summed", "attribution/direct.py",
           "* (head.scale * head.slope) * counts.unsqueeze(-1)\n", "* (head.scale * head.slope)\n",
           "test_direct.py::test_several_read_positions_are_averaged",
           "direct effects sum over read positions"),
    Mutant("grad-drop-own-layer", "attribution/atp_star.py",
           "(at != torch.tensor(layers, device=effects.device))", "(at > -1).expand(-1, len(layers))",
           "test_grad_drop.py::test_nodes_are_mean_magnitudes[gpt2-noising]",
           "GradDrop averages the drop of a node's own layer in"),
    Mutant("qk-fix-other-group", "attribution/atp_star.py",
           ".values_by_head(base.v)", ".values_by_head(base.v.flip(2))",
           "test_qk_fix.py::test_every_position_is_its_change_of_the_pattern[llama-q]",
           "QK fix: queries meet another group's values"),
    Mutant("weights-other-group", "attribution/weights.py",
           'rearrange(_r(weights.q), "(g n) r e -> g n r e", n=group)',
           'rearrange(_r(weights.q), "(n g) r e -> g n r e", n=group)',
           "test_weights.py::test_weight_composition_equals_the_product_of_whole_matrices[llama]",
           "composition of keys with another group's queries"),
    Mutant("ifr-mlp-reads-before-attention", "attribution/ifr.py",
           'add(layer, "mlp", middle[layer])', 'add(layer, "mlp", resid[layer])',
           "test_ifr.py::test_every_reader_and_token[llama]",
           "IFR: MLPs read the stream before attention"),
    Mutant("activation-of-padding", "attribution/baselines.py",
           "norms * batch.clean.mask.to(norms.device)", "norms",
           "test_baselines.py::test_activation_magnitude_counts_real_tokens_through_each_readers_norm[gpt2-corrupted]",
           "activation magnitudes of padding count"),
    Mutant("hisp-of-positions", "attribution/baselines.py",
           ".sum(-1).abs().sum(-1)", ".abs().sum(-1).sum(-1)",
           "test_baselines.py::test_hisp_is_the_mean_magnitude_of_each_examples_mask_gradient",
           "head importance: magnitude of each position in place of each example"),
    Mutant("qk-fix-denoising-sign", "attribution/components.py",
           "total = -changed if noising else changed", "total = -changed",
           "test_qk_fix.py::test_all_positions_of_padded_prompts",
           "QK fix: denoising has the sign of noising"),
    Mutant("qk-fix-moves-the-sink", "attribution/atp_star.py",
           "new = new + (scores - new)[..., length:]", "new = new + 0",
           "test_qk_fix.py::test_every_position_is_its_change_of_the_pattern[gpt_oss-k]",
           "QK fix: a key's change reaches the attention sink"),
    Mutant("direct-norm-bias-at-the-stream", "attribution/direct.py",
           "einsum(norm.bias, direction,", "einsum(norm.bias, at_stream,",
           "test_direct.py::test_contributions_and_constants_are_the_logit_difference[gpt2]",
           "direct effects: the final norm's bias goes through the norm"),
    # patching
    Mutant("denoising-ends-exchanged", "patching/path.py",
           "ends if noising else ends[::-1]", "ends",
           "test_path.py::test_denoising_several_receivers_restores_their_edges_together",
           "denoising paths: metric_full and metric_empty exchanged"),
    Mutant("path-of-an-edge-backwards", "patching/path.py",
           "if writer < graph.limits[reader]]", "if writer <= graph.limits[reader]]",
           "test_path.py::test_one_receiver_at_a_time_is_one_edge_at_a_time[gpt2-noising-logit_diff]",
           "paths from a sender computed after the receiver"),
    Mutant("normalised-by-magnitude", "patching/sweep.py",
           "self.effects / difference.mean()", "self.effects / abs(difference.mean())",
           "test_patching.py::test_normalised_effects_are_parts_of_what_there_is_to_win",
           "normalised effects change sign where the metric rises under ablation"),
    Mutant("sweep-ignores-alignment", "patching/patch.py",
           "moved(value, batch)", "value",
           "test_aligned_spans.py::test_sweeps_equal_one_run_a_place[gpt2]",
           "sweeps of unequal prompts patch in the corrupted run's own positions"),
    # evaluation
    Mutant("kl-of-a-circuit-negative", "evaluation/faithfulness.py",
           '-METRICS["kl"]', 'METRICS["kl"]',
           "test_evaluation.py::test_other_metrics_override_the_tasks",
           "an evaluation's KL is negative"),
    Mutant("whole-model-accuracy-of-circuit", "evaluation/faithfulness.py",
           "self.share(self.full_accurate)", "self.share(accurate)",
           "test_evaluation.py::test_accuracy_counts_answers_above_all_wrong_ones",
           "`accuracy_full` is the circuit's"),
    Mutant("curve-rounds-sizes", "evaluation/curve.py",
           "int(p * n_edges) for p", "round(p * n_edges) for p",
           "test_curve.py::test_mib_cuts_at_ten_fractions_and_prunes",
           "MIB's curve rounds sizes up"),
    Mutant("second-way-of-single-parts", "evaluation/completeness.py",
           "inside = tried if found.model >= MOST else inside", "inside = inside",
           "test_find.py::test_a_second_way_of_which_the_circuit_holds_a_part",
           "find: backups of several parts of the circuit together go unseen"),
    Mutant("completeness-gap-of-magnitudes", "evaluation/completeness.py",
           "np.abs(differences[1:].mean(-1)).mean(keepdims=True)", "np.abs(differences[1:]).mean(keepdims=True)",
           "test_completeness.py::test_complement_and_knockouts_equal_the_literal_runs",
           "completeness: mean gap of examples' magnitudes"),
    Mutant("beaten-from-below-only", "evaluation/verify.py",
           "abs(1 - value) > abs(1 - self.faithfulness)", "value < self.faithfulness",
           "test_evaluation.py::test_verification_measures_the_top_candidates",
           "`beaten` counts circuits that overshoot as better"),
    Mutant("slope-turned-round", "evaluation/verify.py",
           "power = float((estimates**2).sum())", "power = float((exact**2).sum())",
           "test_evaluation.py::test_verification_measures_the_top_candidates",
           "slope of estimates on exact effects"),
    Mutant("chance-of-one-read", "evaluation/diagnosis.py",
           "** times.numpy()", "** 1",
           "test_tasks_diagnosis.py::test_chances_by_counting",
           "guessing several read positions right is as likely as one"),
    Mutant("whole-answer-averaged", "batch.py",
           "(values * self.summed.to(values)).sum(-1)", "(values * self.summed.to(values)).mean(-1)",
           "test_prompts.py::test_all_is_the_sum_over_the_answers_tokens",
           "a whole answer's metric is a mean over its tokens"),
    Mutant("padding-in-a-whole-answer", "batch.py",
           "(values * self.summed.to(values)).sum(-1)", "values.sum(-1)",
           "test_prompts.py::test_all_is_the_sum_over_the_answers_tokens",
           "the last token of a short answer counts several times"),
    Mutant("chat-with-a-second-bos", "tasks/tokens.py",
           " and not self.templated\n", "\n",
           "test_prompts.py::test_a_template_decides_on_bos",
           "the tokenizer adds a BOS token that the chat template does not have"),
    Mutant("spelling-least-preferred", "tasks/spelling.py",
           "masses.index(max(masses))", "masses.index(min(masses))",
           "test_prompts.py::test_the_model_prefers_a_spelling",
           "answers are spelled as the model would not"),
    Mutant("spans-in-the-template", "tasks/spans.py",
           "if not isinstance(prompt, Rendered) or prompt.holds(at, at + len(text))", "if True",
           "test_prompts.py::test_spans_are_found_in_the_messages",
           "a span of a chat is found in the template's own words"),
    Mutant("mib-cuts-the-top", "evaluation/agreement.py",
           "scores.greedy(size, by)", "scores.top(size, by)",
           "test_agreement.py::test_mib_area_by_hand",
           "MIB's area of the strongest edges in place of grown circuits"),
    Mutant("equivalence-without-ties", "evaluation/hypotheses_tests.py",
           "above + len(change) - below", "above + above",
           "test_hypotheses.py::test_equivalence_counts_ties_half_and_ignores_rounding",
           "equivalence: ties count as below"),
    Mutant("partial-necessity-rounding", "evaluation/hypotheses_tests.py",
           "loss > losses + rounding", "loss > losses - rounding",
           "test_hypotheses.py::test_differences_within_rounding_beat_nothing[partial-necessity]",
           "partial necessity: differences within rounding count as beaten"),
    Mutant("stability-curve-of-all-pairs", "evaluation/stability.py",
           "rng.integers(n, size=size)", "rng.integers(size, size=size)",
           "test_stability.py::test_a_resample_s_circuit_is_that_of_attribute_on_it[absolute]",
           "stability by sample size draws from the first pairs only"),
    Mutant("change-of-the-stream-before", "evaluation/approximation.py",
           "base.resid[layer + 1].to(work)", "base.resid[layer].to(work)",
           "test_approximation.py::test_sizes_of_changes_by_their_definition[noising]",
           "approximation: a change's size is relative to the stream before it"),
    Mutant("random-circuits-without-seed", "evaluation/verify.py",
           "np.random.default_rng(evaluator.seed)", "np.random.default_rng(0)",
           "test_evaluation.py::test_random_circuits_to_compare_with_follow_the_seed",
           "verify draws the same random circuits whatever the seed"),
    Mutant("stability-without-seed", "evaluation/stability.py",
           "np.random.default_rng(each[0].setting.seed)", "np.random.default_rng(0)",
           "test_stability.py::test_a_resample_s_circuit_is_that_of_attribute_on_it[absolute]",
           "stability draws the same samples whatever the seed"),
    Mutant("greedy-searches-alike", "evaluation/completeness.py",
           "[self.evaluator.seed, number + 1]", "[self.evaluator.seed, 1]",
           "test_completeness.py::test_greedy_searches_draw_candidates_of_their_own",
           "completeness: every greedy search is the first one"),
    # search
    Mutant("acdc-keeps-below-threshold", "search/acdc_rule.py",
           "return self._size(effect) < self.threshold", "return self._size(effect) <= self.threshold",
           "test_acdc.py::test_edges_without_any_effect_stay_at_threshold_zero",
           "ACDC removes an edge whose effect equals the threshold"),
    Mutant("wilson-width", "search/acdc_rule.py",
           "Z**2 / 4", "Z**2 / 2",
           "test_acdc_options.py::test_the_rate_of_wrong_skips_has_wilsons_interval",
           "screening: interval of wrong skips too wide"),
    Mutant("close-calls-of-one-metric", "search/acdc_rule.py",
           "2 * rounding", "rounding",
           "test_rounding.py::test_decisions_of_acdc_within_rounding_are_listed",
           "ACDC's close calls count the rounding of one of the two metrics"),
    Mutant("acdc-scores-largest-threshold", "search/acdc.py",
           "zip(grid[-2::-1], masks[::-1], strict=True)", "zip(grid[:-1], masks, strict=True)",
           "test_acdc_options.py::test_scores_are_the_smallest_thresholds_at_which_edges_go[gpt2-False-factors0]",
           "ACDC's scores are the largest thresholds at which edges go"),
    Mutant("screening-factor-ignored", "search/acdc_rule.py",
           "np.abs(scores.values) < factor * threshold", "scores.values < factor * threshold",
           "test_acdc_options.py::test_screened_edges_go_untested_and_are_checked_exactly",
           "screening lets strong negative edges go untested"),
    Mutant("learned-size-from-the-start", "search/training.py",
           "(self.gates - self.target) * min(1.0", "self.target * min(1.0",
           "test_learned.py::test_the_target_shrinks_and_its_multipliers_follow_the_gap",
           "learned masks steer to another size"),
    Mutant("threshold-without-gradient", "search/matryoshka.py",
           "slope * (gradient - mean)", "slope * gradient",
           "test_learned.py::test_soft_masks_have_k_expected_edges_and_the_gradient_of_their_definition[7.3]",
           "matryoshka: the threshold counts as a constant in the gradient"),
    Mutant("always-raised", "search/training.py",
           "-(values - full.to(values)).abs() if faithful else values", "values",
           "test_learned.py::test_matryoshka_takes_turns_between_the_metric_by_sign_and_faithfulness_by_magnitude",
           "matryoshka: faithfulness beyond 1 is raised further"),
    Mutant("pruning-beyond-the-tolerance", "search/pruning.py",
           "limit = min(start.distance + growth, max(trials.tolerance, start.distance))",
           "limit = start.distance + growth",
           "test_find.py::test_pruning_takes_the_weakest_first",
           "find prunes beyond its tolerance"),
    Mutant("pruning-strongest-first", "search/pruning.py",
           "np.argsort(strength[tuple(edges.T)]", "np.argsort(-strength[tuple(edges.T)]",
           "test_find.py::test_pruning_takes_the_weakest_first",
           "find prunes the strongest edges first"),
    Mutant("judged-on-search-pairs", "search/find.py",
           "judge = Evaluator(whole.on(held_out))", "judge = evaluator",
           "test_find.py::test_the_search_and_its_judgement_share_no_pair",
           "find verifies on the pairs that it searched with"),
    Mutant("target-on-one-half", "search/trials.py",
           "worst = max(distance(self.criterion, outcome, self.evaluator.ends, fold) for fold in self.folds)",
           "worst = distance(self.criterion, outcome, self.evaluator.ends)",
           "test_find.py::test_criteria",
           "find's target holds on the mean over all search pairs only"),
    Mutant("dropped-without-balance", "search/rescoring.py",
           "count = int(counts[np.abs(wanted - (lost[counts] + won[n - counts])).argmin()])",
           "count = int((effect[order[:n]] >= 0).sum())",
           "test_rescoring.py::test_the_mean_is_balanced_as_well_as_it_can_be",
           "re-scoring drops the weakest edges, whatever they add up to"),
    Mutant("predictions-never-learn", "search/rescoring.py",
           "MEMORY * (self._expected[name] + float((now - predicted).mean()))", "0.0",
           "test_rescoring.py::test_errors_of_prediction_are_expected_again",
           "re-scoring does not learn from its errors of prediction"),
    Mutant("split-without-seed", "search/find.py",
           "held_out(holdout, whole.setting.seed)", "held_out(holdout, 0)",
           "test_find.py::test_the_same_seed_gives_the_same_bits",
           "find splits the pairs alike whatever the seed"),
    Mutant("mini-batches-without-seed", "search/training.py",
           "manual_seed(self.seed + 1 + epoch)", "manual_seed(1 + epoch)",
           "test_learned.py::test_mini_batches_come_in_an_order_of_seed_and_epoch",
           "learned masks: mini-batches come alike whatever the seed"),
    Mutant("epochs-in-one-order", "search/training.py",
           "manual_seed(self.seed + 1 + epoch)", "manual_seed(self.seed + 1)",
           "test_learned.py::test_mini_batches_come_in_an_order_of_seed_and_epoch",
           "learned masks: every epoch has the order of the first"),
    Mutant("price-by-mini-batches", "search/training.py",
           "for runs in self.batches) / len(self.experiment)", "for runs in self.batches) / len(self.batches)",
           "test_learned.py::test_the_default_price_and_steering_know_the_metrics_scale",
           "learned masks: the price grows with the pairs"),
    Mutant("skip-check-of-the-first", "search/acdc_rule.py",
           "permutation(len(skipped))[:CHECKED]", "arange(len(skipped))[:CHECKED]",
           "test_acdc_options.py::test_screened_edges_go_untested_and_are_checked_exactly",
           "screening: the first skipped edges are checked, not a random sample"),
    # tasks, metrics, statistics, scores, graph, files
    Mutant("reads-before-the-last-token", "tasks/given.py",
           "[[len(row) - 1] for row in rows]", "[[len(row) - 2] for row in rows]",
           "test_task.py::test_strings_become_padded_ids",
           "logits are read one token early"),
    Mutant("last-column-of-a-name", "tasks/files.py",
           "if name and names.count(name) > 1", "if name and names.count(name) > 2",
           "test_cli_runs.py::test_columns_that_are_there_twice_are_refused",
           "csv: of two columns of one name the last is taken, silently"),
    Mutant("negative-position-off-by-one", "tasks/given.py",
           "p % len(row) for p in wanted", "p % max(map(len, rows)) for p in wanted",
           "test_task.py::test_positions_count_a_prompts_own_tokens",
           "negative positions count from the longest prompt's end"),
    Mutant("corrupted-reads-unaligned", "tasks/bound.py",
           "alignment.gather(1, read)", "read",
           "test_aligned_spans.py::test_positions_are_counted_in_the_clean_prompt",
           "unequal corrupted prompts are read at the clean prompt's position"),
    Mutant("ioi-answers-the-subject", "tasks/ioi.py",
           "Pair.filled(pattern, said, corrupted, [io], [s],", "Pair.filled(pattern, said, corrupted, [s], [io],",
           "test_behaviours.py::test_ioi_corruptions_do_what_they_are_called",
           "IOI's answer is the repeated name"),
    Mutant("greater-than-or-equal", "tasks/numbers.py",
           "if answer > own]", "if answer >= own]",
           "test_behaviours.py::test_greater_than_splits_all_endings_at_the_start_year",
           "greater-than counts the starting year as an answer"),
    Mutant("padding-answers-count", "metrics.py",
           ".masked_fill(ids < 0, -torch.inf)", "",
           "test_metrics.py::test_metrics_are_their_definitions[logprob]",
           "padding of answer sets has probability"),
    Mutant("top1-at-any-read", "metrics.py",
           "(best == batch.answers).any(-1).all(-1)", "(best == batch.answers).any(-1).any(-1)",
           "test_metrics.py::test_correctness_is_its_definition",
           "top-1 right at one of several read positions is enough"),
    Mutant("standard-error-of-population", "statistics.py",
           "((groups - 1) * left_out.var(-1)) ** 0.5", "(groups * left_out.var(-1)) ** 0.5",
           "test_evaluation.py::test_the_standard_error_of_a_mean",
           "the standard error is a little too large"),
    Mutant("ranks-of-ties", "statistics.py",
           "(counts - 1) / 2", "(counts - 1)",
           "test_evaluation.py::test_correlations",
           "tied values share their lowest rank"),
    Mutant("holm-not-monotone", "statistics.py",
           "np.maximum.accumulate(p_values[order] * factors)", "p_values[order] * factors",
           "test_hypotheses.py::test_corrections_equal_the_textbook",
           "Holm: a larger p-value is corrected to less"),
    Mutant("threshold-strict", "scores.py",
           "(self.key(by) >= t)", "(self.key(by) > t)",
           "test_scores.py::test_threshold_keeps_what_reaches_it",
           "scores equal to a threshold are cut off"),
    Mutant("shared-head-serves-one", "graph.py",
           "(head * self.group, self.group)", "(head * self.group, 1)",
           "test_graph.py::test_what_a_reader_serves",
           "a shared key/value head feeds the first head of its group only"),
    Mutant("parallel-mlp-sees-own-heads", "graph.py",
           'if kind == "mlp" and not self.parallel else', 'if kind == "mlp" else',
           "test_graph.py::test_names_and_their_order",
           "parallel blocks have edges that do not exist"),
    Mutant("layer-sums-are-means", "scores.py",
           "value[real].sum() if real.any()", "value[real].mean() if real.any()",
           "test_rows.py::test_layers_sum_all_edges",
           "heat map of layers shows means in place of sums"),
    Mutant("one-cell-drowns-the-rest", "export/html.py",
           "return most if known[-1] > 2 * most else float(known[-1])", "return float(known[-1])",
           "test_html.py::test_one_cell_does_not_drown_a_heat_map",
           "the colour scale of a heat map ends at its largest cell"),
    Mutant("folded-width-of-the-sum", "export/arrows.py",
           "sum(abs(arrow.effect or 0.0) for arrow in inside)", "abs(sum(arrow.effect or 0.0 for arrow in inside))",
           "test_export.py::test_dot_folds_large_circuits_by_layer",
           "folded pictures: effects of both signs between two layers cancel"),
    Mutant("foreign-file-writer-by-writer", "export/eap_ig.py",
           "if graph.parallel:  # both", "if not graph.parallel:  # both",
           "test_eap_ig_files.py::test_json_as_the_library_writes_it",
           "EAP-IG files list edges in another order"),
    Mutant("foreign-pickle-names-anything", "export/pickled.py",
           'raise FileError(f"it names', 'return super().find_class(module, name)\n            raise FileError(f"',
           "test_exchange.py::test_pickles_of_more_than_data_are_not_run",
           "a pickle of another tool names code, and is read"),
    Mutant("minus-infinity-ranks-first", "export/eap_ig.py",
           "np.nextafter(np.float32(lowest), np.float32(-np.inf))", "np.float32(1e30)",
           "test_exchange.py::test_importances_with_minus_infinity",
           "an edge or node that is never in, by its score, comes first"),
    Mutant("links-of-the-page-overwrite", "export/neuronpedia.py",
           '"weight": sum(edges.values())', '"weight": list(edges.values())[-1]',
           "test_exchange.py::test_a_circuit_as_a_graph_of_neuronpedia",
           "Neuronpedia's link from node to node has the weight of one of its edges only"),
    Mutant("tooltips-of-one-level", "report/hover.js",
           "` (${data.level} ", "` (95% ",
           "test_report.py::test_intervals_are_of_the_level_that_is_given",
           "the report's tooltips call every interval one of 95%"),
    Mutant("proof-of-true-edges-only", "testbed/known.py",
           "or most > known.inert:", "or False:",
           "test_testbed.py::test_a_wrong_truth_is_noticed[input->a1.h0<q>]",
           "a known circuit is proved though an edge beside it matters"),
    Mutant("trained-is-compiled", "testbed/build.py",
           "None if base == circuit else load_trained(base, form)", "None",
           "test_testbed.py::test_trained[induction-trained-gpt2]",
           "a trained model of the testbed has compiled weights"),
)
# fmt: on


def table(mutants: Sequence[Mutant] = MUTANTS) -> str:
    """In Markdown."""
    rows = [f"| `{one.name}` | {one.why} | {', '.join(map(_short, one.tests.split()))} |" for one in mutants]
    return "\n".join(["| mutant | what would be wrong | killed by |", "|---|---|---|", *rows])


def _short(test: str) -> str:
    """A test's file and name: "circuit_run: ablations equal the literal evaluation"."""
    file, _, name = test.partition("::")
    name = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    return f"`{file.removeprefix('test_').removesuffix('.py')}`{': ' if name else ''}{name}"


# -------------------------------------------------------------------- running
def outcomes(mutants: Sequence[Mutant], base: Path, jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with "killed by TEST", "lived", or what went wrong; in the order in which they end."""
    waiting, running = list(mutants), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            folder = _copied(base / mutant.name)
            if mutant.file:
                text = mutant.applied_to(folder / "circuitfind")
                (folder / "circuitfind" / mutant.file).write_text(text, encoding="utf-8")
            running[_started(folder, mutant.tests.split())] = mutant
        pid, status = os.wait()
        folder, code = base / running[pid].name, os.waitstatus_to_exitcode(status)
        said = (folder / "output").read_text(encoding="utf-8")
        known = {0: "lived", 1: f"killed by {', '.join(FAILED.findall(said))}"}
        yield running.pop(pid), known.get(code) or f"pytest ended with {code}:\n{said[-2000:]}"
        shutil.rmtree(folder)


def _copied(folder: Path) -> Path:
    for name in ("circuitfind", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _started(folder: Path, tests: Sequence[str]) -> int:
    """The id of a process that runs tests on a copy. It is forked, so that it need not import torch again."""
    if pid := os.fork():
        return pid
    code = 3
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(folder)
        sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
        paths = [f"tests/{test}" for test in tests]
        code = int(pytest.main(["-x", "-q", "--tb=short", "-n", "0", "-p", "no:cacheprovider", *paths]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _import_what_takes_time() -> None:
    """All but the package itself, of which every child has its own copy."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CIRCUITFIND_SHARED": SHARED, "CI": "1"}
    import families
    import torch

    torch.set_num_threads(1)
    for name in ("gpt2", "llama", "gpt_neox", "gemma2"):
        families.build(name)
    del sys.modules["families"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of CONTRIBUTING.md and end")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return 0
    chosen = [one for one in MUTANTS if not asked.only or any(part in one.name for part in asked.only)]
    if not chosen:
        print(f"no mutant is called {' or '.join(asked.only)}")
        return 1
    for mutant in chosen:
        mutant.applied_to(ROOT / "circuitfind")
    _import_what_takes_time()
    nothing = Mutant(
        "no mutant", "", "", "", " ".join(sorted({test for one in chosen for test in one.tests.split()})), ""
    )
    killed = lived = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant, said in outcomes([nothing], Path(folder), 1):
            print(f"{mutant.name:36} {said}", flush=True)
            if said != "lived":
                return 1
        for mutant, said in outcomes(chosen, Path(folder), asked.jobs):
            print(f"{mutant.name:36} {said}", flush=True)
            killed, lived = killed + said.startswith("killed"), lived + (said == "lived")
    print(f"{killed} of {len(chosen)} killed, {lived} lived")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
