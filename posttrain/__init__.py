"""Post-training of mixture-of-experts language models: SFT, GRPO and distillation on TRL, accelerate, vLLM and Ray.

The rooms:

    stages          sft.py, reward_model.py, grpo.py, distill.py, upcycle.py, pipeline.py: each file is its stage's
                    algorithm; cli.py is their command line
    description     recipe.py (the door), sections.py (what stages share), sft_recipe.py, reward_model_recipe.py,
                    grpo_recipe.py with grpo_sections.py, distill_recipe.py, eval_recipe.py, lora_section.py;
                    recipe_file.py (YAML), dry_run.py (what it would do), records.py (its data)
    on paper        plan.py with planning/ (memory, time, cost; simulation), architectures.py (shapes of published models)
    what flows      types.py: Prompt, Completion, Group, Sample, Microbatch, TrainBatch
    mathematics     losses.py, policy_losses.py, balance_losses.py, distillation_losses.py (a teacher's distribution),
                    distillation.py (a teacher in the advantage), advantages.py, packing.py, prompt_sharing.py (a group's
                    prompt once): pure functions; algorithms.py (presets), objective.py (a recipe's loss), conformance.py
                    (the same gradient for every layout)
    SFT             sft_data.py (chats to packed rows), preflight.py (a look before the first step), sft_trainer.py (losses,
                    checkpoints), sft_callbacks.py, sft_parts.py (puts them together)
    reward model    reward_data.py (pairs to tokens), reward_trainer.py, reward_metrics.py (what its scores are worth),
                    reward_view.py, reward_parts.py (puts them together); rewards/learned.py scores with it
    TRL's trainers  trainer_arguments.py, whole_checkpoints.py, guarded_steps.py, ranks.py: what both of the above use
    rewards         reward_setup.py, reward_pool.py (actors around rewards.warden), audit.py (a verifier beside the rewards)
    environments    environments.py (what one is), environment_pool.py and environment_process.py (a process for each episode),
                    episodes.py (turns to completions), episode_reward.py (their reward beside the others)
    distillation    distill_setup.py, distill_job.py (answers and judgements as they come), teachers.py, endpoint_teacher.py,
                    journal.py (what was paid for), selection.py (what is kept), distill_data.py, distill_output.py,
                    distill_pairs.py (for a reward model), data_card.py, distill_plan.py
    pipelines       pipeline_graph.py (who needs whom), pipeline_plan.py (what would run, and why), stage_inputs.py,
                    fingerprints.py (content hashes), stage_records.py (stage.json, what to do about a stage),
                    stage_process.py, pipeline_progress.py (time left), lineage.py
    evaluation      eval/: __main__.py (a run), benchmarks/ (one file each), benchmark_task.py, suite.py, grading.py,
                    samplers.py, generations.py, statistics.py, compare.py, likelihood.py (lm-eval), contamination.py,
                    published.py
    looking         watch.py, watch_server.py (the report while a run goes on), watch_view.py (terminal); eval/report*.py and
                    eval/page/ (the page), eval/plots.py
    engines         sampler.py with request_loop.py, vllm_extension.py, decoding.py (vLLM), layout.py (over several
                    devices) with shared_names.py (in /dev/shm), learner.py (accelerate) with learner_parallel.py (FSDP2),
                    expert_parallel.py, context_parallel.py, collectives.py, step_guard.py (steps that must
                    not be taken)
    the policy      model/: load, router, balance, mtp (multi-token prediction), lora, upcycle, policy_files, reward_head, fp8,
                    conversion, checkpoint_files, adapter_deltas
    export, serving export.py, export_check.py (both engines agree), model_card.py, serve.py (vLLM's server), quantized.py
                    (what must be converted)
    agreement       wire.py, weights.py (publication and its receipt), weight_buckets.py (to an engine's worker processes),
                    parity.py (sampler against learner, token by token)
    the cluster     cluster/: the only room that imports ray; dispatch.py (prompts to samplers), fleet.py (samplers that come
                    and go), health.py (who hangs or crawls), placement.py (room on the nodes), threads.py
    the run         grpo_job.py, rollout.py, run_dir.py, metrics.py, token_records.py (tokens that samples keep), router_log.py
                    (loads of the experts), progress.py, interrupt.py (Ctrl-C, SIGTERM, a reader that has left)
    going on        checkpoint.py, saving.py (beside the run, on full disks), manifest.py (checksums), resume.py (does the
                    recipe mean the same), grpo_resume.py, log_file.py, disk.py, rng.py, skip_watch.py, restarts.py
                    (--max-restarts)
    trouble         doctor.py with doctor_machine.py, doctor_stage.py, doctor_probes.py; fault_log.py, flight_recorder.py,
                    process_logs.py, bundles.py (of bad steps), replay.py
    who may look    ray_network.py (who reaches Ray), redaction.py (secrets)

One SFT step, as PolicyTrainer takes it:

    Rows                    packed rows -> input_ids, position_ids, labels; no attention mask
    get_batch_samples       the microbatches of a step, and the counts that its losses are divided by
    compute_loss            cross-entropy (TRL), balance loss, prediction loss; expert loads
    EndStep                 the router's correction bias moves by the loads of the global batch
    log, evaluate, save     metrics, exact held-out loss, a whole checkpoint

One GRPO batch, as `grpo.train` walks it:

    rollout.stream          prompts -> SamplerPool.generate, or EpisodeSampler.generate around it -> rewards -> groups
    advantages              each reward against its group
    LearnerGroup.score      the learner's own logprobs, the reference's, and parity with the sampler's
    LearnerGroup.forward_backward, optim_step    once per minibatch: packed, loss over global token counts, router bias
    Publisher.publish       version n + 1 on every sampler, proved by a canary
    GrpoJob.end_step        metrics, samples, checkpoint
"""

from importlib.util import find_spec
from pathlib import Path


def check_packages() -> None:
    """`rewards`, `data` and `eval` are common names: make sure that ours are the ones imported.

    Raises:
        ImportError: another package of that name comes first on the path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("rewards", "data", "eval"):
        spec = find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
        if home / name not in places:
            found = ", ".join(map(str, places)) or (spec and spec.origin) or "nowhere"
            raise ImportError(
                f"the package {name!r} is imported from {found} and not from {home / name}: rename that one, or start "
                f"from a directory without it"
            )


check_packages()  # here, because every entry point imports those packages before it has parsed a word
