"""Plans: the formulas against torch's own counts and hand-worked values, the command, its warnings and their cures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_cases import CASES
from posttrain import plan
from posttrain.architectures import ARCHITECTURES
from posttrain.planning.activations import kept_by
from posttrain.planning.hardware import load_hardware
from posttrain.planning.kernels import backward_seconds, forward_seconds
from posttrain.planning.learner import Training, communication, memory, states, sum_bytes
from posttrain.planning.lengths import Lengths
from posttrain.planning.plans import make_plan
from posttrain.planning.sampler import Engine, generation_seconds
from posttrain.planning.shapes import TINY_VOCABULARY, architecture_of, of_build
from posttrain.planning.stages import Assumptions, training_of
from posttrain.planning.work import adapter_parameters, flops, flops_per_token, forward_products, layer_parameters
from posttrain.recipe import BuildSection, GrpoRecipe, ModelSection, RecipeError
from posttrain.recipe_file import load_recipe
from posttrain.threads import thread_environment

ROOT = Path(__file__).parent.parent
V3 = ARCHITECTURES["deepseek-ai/DeepSeek-V3"]
REAL = [path for name in ("deepseek_v3", "moonlight_16b_a3b", "qwen2_5_distill", "qwen3_30b_a3b")
        for path in sorted((ROOT / "recipes" / name).glob("*.yaml"))]  # fmt: skip
BUILD = BuildSection(
    hidden_size=160, intermediate_size=448, moe_intermediate_size=96, num_hidden_layers=3, q_lora_rank=48
)


def assumed(**changes: object) -> Assumptions:
    return replace(Assumptions(load_hardware("h100")), **changes)  # type: ignore[arg-type]


def v3(*overrides: str) -> GrpoRecipe:
    recipe = load_recipe(ROOT / "recipes/deepseek_v3/grpo.yaml", overrides)
    assert isinstance(recipe, GrpoRecipe)
    return recipe


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, set_experts_implementation

    policy = build_policy(BUILD.model_dump(), build_tokenizer(), seed=0)
    set_experts_implementation(policy, "eager")
    policy.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy(input_ids=torch.randint(0, 100, (4, 64)), use_cache=False)
    products = forward_products(of_build(BUILD, TINY_VOCABULARY), 4, 64, 4 * 64)
    rotary = counter.get_total_flops() - flops(products)  # positions times frequencies, which are products too
    assert 0 <= rotary < 0.001 * counter.get_total_flops()


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_kept_is_what_autograd_saves(sparse: bool) -> None:
    import torch

    from data.chat import build_tokenizer
    from posttrain.model.load import build_policy, set_experts_implementation
    from posttrain.model.token_scorer import TokenScorer

    def saved(layers: int, dense: int) -> int:
        build = BUILD.model_copy(update={"num_hidden_layers": layers, "first_k_dense_replace": dense})
        policy = build_policy(build.model_dump(), build_tokenizer(), seed=0)
        set_experts_implementation(policy, "grouped_mm")
        own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
        found: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        ids = torch.randint(0, 100, (2, 128))
        positions = torch.arange(64).repeat(2).expand(2, 128).clone()  # two samples in a row
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            TokenScorer(policy, 256)(ids, positions, positions > 8, 1.0)
        return sum(size for size, _ in found.values())

    one_more = saved(3, 1 if sparse else 2) - saved(2, 1)
    expected = (
        kept_by(of_build(BUILD, TINY_VOCABULARY), sparse=sparse).bytes_per_token(128, 4, with_scores=True) * 2 * 128
    )
    assert expected == pytest.approx(one_more, rel=0.02)


def test_a_token_of_deepseek_v3() -> None:
    # Two operations for each weight that a token meets; the embedding is looked up and the head asked for.
    met = V3.active_parameters - V3.vocab_size * V3.hidden_size
    assert flops_per_token(V3, 1, 1.0) == pytest.approx(2 * met, rel=0.001)
    # 61 layers x 128 heads x (192 for the key + 128 for the value) x 2, for each key.
    per_key = flops_per_token(V3, 1001, 0.0) - flops_per_token(V3, 1, 0.0)
    assert per_key == pytest.approx(1000 * 61 * 128 * (192 + 128) * 2, rel=1e-9)


def test_states_of_a_rank_by_hand() -> None:
    training = Training(shape=V3, dtype="bfloat16", ranks=256, sharded=True, rows=1, width=4096, frozen=1)
    found = {part.name: part.value for part in states(training)}
    share = V3.parameters / 256
    assert found == {
        "weights": 4 * share, "gradients": 4 * share, "optimizer": 8 * share, "reference, teacher": 4 * share,
    }  # fmt: skip
    rest = {part.name: part.value for part in memory(replace(training, checkpointing=True), load_hardware("h100"))}
    # 129,280 x 4 bytes x 3 copies for each of 4,096 positions; with a chunk of 1,024 a quarter.
    assert rest["logits"] == 129280 * 4 * 3 * 4096
    chunked = memory(replace(training, logits_chunk=1024), load_hardware("h100"))
    assert next(part.value for part in chunked if part.name == "logits") == rest["logits"] / 4


def test_adapters_are_counted_as_peft_does() -> None:
    from data.chat import build_tokenizer
    from posttrain.model import lora
    from posttrain.model.load import build_policy

    policy = build_policy(BUILD.model_dump(), build_tokenizer(), seed=0)
    adapted = lora.apply_lora(policy, r=4, alpha=8, dropout=0.0, targets=["attention", "dense_mlp", "shared_experts"])
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    targets = ("attention", "dense_mlp", "shared_experts")
    assert adapter_parameters(of_build(BUILD, TINY_VOCABULARY), 4, targets) == trained


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    lengths = Lengths(2048, 0.8, 8192)
    drawn = lengths.quantiles(4000)
    assert sum(drawn) / 4000 == pytest.approx(2048, rel=0.01) and max(drawn) == 8192
    assert drawn[2000] < 2048 < drawn[-1]  # a long tail
    assert Lengths(100, 0.0, 200).quantiles(3) == [100, 100, 100]
    with pytest.raises(RecipeError, match="give a length between"):
        Lengths(300, 0.5, 200)


def engine(**changes: object) -> Engine:
    shape = ARCHITECTURES["Qwen/Qwen3-30B-A3B"]
    made = Engine(shape, "bfloat16", 2, 0.9, 4, 1024, load_hardware("h100"))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_generation_by_hand() -> None:
    one = engine()
    hardware = one.hardware
    # A single sequence of 3 tokens: three steps on a context that grows by one.
    alone = generation_seconds(one, [3], 100)
    assert alone == pytest.approx(3 * one.step_seconds(1, 101.5) + one.prefill_seconds(100, 1))
    # Four places and eight equal sequences: two rounds.
    assert generation_seconds(one, [50] * 8, 100) == pytest.approx(
        2 * 50 * one.step_seconds(4, 125) + one.prefill_seconds(100, 8)
    )
    # All weights but the experts that nobody chose, from half of the bandwidth; 20 microseconds a layer.
    read = one.weights_read(1) + 100 * one.token_bytes
    assert one.step_seconds(1, 100) == pytest.approx(read / (3350e9 * 0.5) + 48 * 20e-6)
    assert one.token_bytes == 2 * 48 * 4 * 128 * 2 / 2  # two GPUs share four heads
    chosen = 1 - (1 - 8 / 128) ** 4
    assert one.weights_read(4) < one.shape.parameters * 2 / 2 and chosen == pytest.approx(0.228, abs=0.001)
    latent = replace(one, shape=V3)
    assert latent.token_bytes == 61 * 576 * 2  # MLA's latent is whole on each GPU
    assert hardware.memory_gb == 80


def test_times_of_measured_kernels_grow_with_the_work() -> None:
    rates = load_hardware(str(ROOT / "docs/measured/plan_cpu.yaml")).calibration
    assert rates is not None
    training = Training(
        shape=of_build(BUILD, 107), dtype="float32", ranks=1, sharded=False, rows=4, width=128, scores=True
    )
    twice = replace(training, rows=8)
    assert 1.5 < forward_seconds(twice, rates) / forward_seconds(training, rates) < 2.1
    assert 1.5 < backward_seconds(training, rates) / forward_seconds(training, rates) < 3.5
    again = replace(training, checkpointing=True)
    added = backward_seconds(again, rates) - backward_seconds(training, rates)
    assert added == pytest.approx(forward_seconds(training, rates))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_real_recipes_are_planned_offline(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        plan.main([str(path), "--price", "2", "--steps", "100"] if "sft" in path.name else [str(path), "--price", "2"])
        == 0
    )
    text = capsys.readouterr().out
    numbers = [line for line in text.splitlines() if line.startswith("  ") and not line.startswith("  !")]
    assert len(numbers) > 12
    for line in numbers:
        if "assumed" not in line.split("=")[0] and not line.strip().startswith("hours unknown"):
            assert " = " in line and line.rstrip().endswith("]"), line  # a formula, and a source
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "GPU hours", "cost"):
        assert word in text, word


def test_the_plan_of_671b() -> None:
    made = make_plan(v3(), assumed(mean_length=8192.0))
    assert made.value("Memory of each of 256", "weights") == V3.parameters * 4 / 256
    assert made.value("Memory of each GPU", "KV cache of a token") == 70272
    assert made.value("Operations", "generation") == pytest.approx(8192 * 8192 * flops_per_token(V3, 256 + 4096, 1.0))
    step = made.value("Time of a step", "step")
    assert made.value("The run", "hours") == pytest.approx(650 * step)
    assert made.value("The run", "GPU hours") == pytest.approx(650 * step / 3600 * 512)
    said = "\n".join(made.warnings)
    for part in (
        "activations",
        "a sampler of this recipe is 8 GPU(s)",
        "a sampler is on one node, which has 8",
        "rollout.max_lag: 1",
    ):
        assert part in said, part
    assert "into main memory" not in said  # each rank reads its own part
    whole = make_plan(v3("learner.parallel=ddp", "learner.expert_parallel_size=1"), assumed(mean_length=8192.0))
    assert "8 ranks of a node take 19.5 TiB of its" in (said := "\n".join(whole.warnings))
    assert "set learner.parallel: fsdp" in said


def test_the_plan_of_divided_rows() -> None:
    """Eight ranks share each row of 34,816 tokens: tokens and operations of a rank are an eighth, those of all the same."""
    whole, part = (v3(f"learner.context_parallel_size={size}") for size in (1, 8))
    one, eight = (make_plan(recipe, assumed()) for recipe in (whole, part))
    memory = "Memory of each of 256"
    for name in ("activations", "tokens on their way"):
        assert one.value(memory, name) == 8 * eight.value(memory, name), name
    for name in ("weights", "attention mask", "gathered layers"):
        assert one.value(memory, name) == eight.value(memory, name), name
    assert one.value("Operations", "training") == eight.value("Operations", "training")
    found = [flops(training_of(recipe, assumed()).products()) for recipe in (whole, part)]
    assert found[0] == pytest.approx(8 * found[1])
    # Queries and keys of 192, values and what comes of them of 128, for 128 heads in 61 layers, in three passes.
    swapped = 3 * 4352 * 128 * (2 * 192 + 2 * 128) * 61 * 2 * 7 / 8
    alone = replace(training_of(part, assumed()), context_parallel=1, rows=1, width=4352)
    difference = communication(training_of(part, assumed()), 1, 1)[0] - communication(alone, 1, 1)[0]
    assert difference == pytest.approx(swapped)
    assert "learner.context_parallel_size" in "\n".join(one.warnings)


def test_the_plan_hashes_in_as_many_threads_as_samplers_do() -> None:
    from posttrain.planning import publication
    from posttrain.wire import HASH_THREADS

    assert publication._HASH_THREADS == HASH_THREADS


def test_the_plan_of_divided_experts() -> None:
    """DeepSeek-V3 over 256 ranks, one layer's experts over all of them, over 64, or gathered by each."""

    alone, some, everyone = (make_plan(v3(f"learner.expert_parallel_size={size}"), assumed()) for size in (1, 64, 256))
    assert "set learner.expert_parallel_size (up to 256)" in "\n".join(alone.warnings)
    assert "set learner.expert_parallel_size" not in "\n".join(some.warnings)
    experts = 256 * 3 * 7168 * 2048
    others = layer_parameters(V3) - experts
    memory = "Memory of each of 256"
    assert alone.value(memory, "gathered layers") == 3 * 4 * (others + experts)
    assert some.value(memory, "gathered layers") == 3 * 4 * (others + experts / 64)
    # Each rank has its one expert already; only its gradient passes.
    assert everyone.value(memory, "gathered layers") == 4 * (3 * others + experts / 256)
    pairs = 34816 * 8
    assert some.value(memory, "tokens on their way") == 4 * pairs * 7168 * 2
    sent = [made.value("Time of a step", "exchange between ranks") for made in (alone, some, everyone)]
    assert sent[0] > 2 * sent[1] >= 2 * sent[2]
    assert alone.value("Time of a step", "digest, both ends") == pytest.approx(V3.parameters * 2 * (1 + 1 / 61) / 12e9)
    # A microbatch's tokens to 58 layers and back, in three passes, and what is no expert gathered twice and scattered.
    tokens, rest = 6 * 58 * pairs * 7168 * 2 * 255 / 256, 12 * (V3.parameters - 58 * experts) * 255 / 256
    found = communication(training_of(v3("learner.expert_parallel_size=256"), assumed()), 1, 1)
    assert found[0] == pytest.approx(tokens + rest)


@pytest.mark.parametrize(
    ("broken", "knob", "cure"),
    [
        (
            "learner.gradient_checkpointing=false",
            "learner.gradient_checkpointing: true",
            "learner.gradient_checkpointing=true",
        ),
        ("learner.logits_chunk=null", "lower learner.logits_chunk", "learner.logits_chunk=1024"),
        ("learner.num_workers=2", "raise learner.num_workers", "learner.num_workers=16"),
    ],
)
def test_a_warning_names_the_key_that_mends_it(broken: str, knob: str, cure: str) -> None:
    path = ROOT / "recipes/qwen3_30b_a3b/grpo.yaml"
    wide = ["learner.expert_parallel_size=1"]
    if "logits" in broken:
        wide.append("learner.max_tokens_per_microbatch=20480")

    def complaints(*overrides: str) -> list[str]:
        made = make_plan(load_recipe(path, [*wide, *overrides]), assumed())
        return [warning for warning in made.warnings if warning.startswith("each learner rank needs")]

    (complaint,) = complaints(broken)
    assert knob in complaint
    assert complaints(broken, cure) == []


def test_a_plan_by_measured_ceilings(policy_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "grpo.yaml"
    path.write_text(
        f"stage: grpo\nmax_steps: 10\nmodel: {{model_name_or_path: {policy_path}}}\n"
        "datasets: [{task: letter_counting, size: 10}]\nrewards: [{func: 'rewards.task_answer:score'}]\n"
    )
    hardware = load_hardware(str(ROOT / "docs/measured/plan_cpu.yaml"))
    made = make_plan(load_recipe(path), assumed(hardware=hardware, price=1.0))
    assert 0 < made.value("Time of a step", "learning") < 60
    shape = architecture_of(ModelSection(model_name_or_path=str(policy_path)))
    assert shape is not None and shape.num_hidden_layers == 2 and shape.head_dim == 32
    text = made.text()
    assert "rates measured by benchmarks/plan.py" in text and "cost" in text


def test_a_pipeline_is_planned_stage_by_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # GRPO starts from what SFT is going to make, so its shape is known although there is no file yet.
    assert (
        plan.main(
            ["recipes/tiny/quickstart.yaml", "output_dir=runs/never", "--hardware", "docs/measured/plan_cpu.yaml"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "1. sft\nplan        sft" in text and "2. grpo\nplan        grpo" in text
    sizes = [line.split(": ")[1].split(" parameters")[0] for line in text.splitlines() if line.startswith("plan ")]
    assert sizes == ["890K", "890K"]


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(REAL[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (stage,) = found.values()
    assert {"name", "value", "unit", "formula", "source"} == set(stage["sections"]["The run"][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "abacus"], "neither a file nor one of h100, h800, h200, a100"),
        (["--price", "-1"], "--price -1: give a number above 0"),
        (["--mean-length", "99999"], "1 to rollout.max_completion_length=32768 tokens"),
        (["--ranks", "8"], "a GRPO recipe says it itself"),
        (["--splits", "1:2"], "add --simulate"),
        (["model.model_name_or_path=some/other"], "the shape of some/other is not known here"),
        (["learner.num_worker=3"], "did you mean 'learner.num_workers'"),
    ],
)
def test_what_makes_no_plan_is_said_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([str(ROOT / "recipes/deepseek_v3/grpo.yaml"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.slow
def test_memory_of_a_learner_is_what_the_plan_says(tmp_path: Path) -> None:
    def measure(*words: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.plan_parts", *words]
        environment = {**os.environ, **thread_environment(1)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    measured = measure("case", "--name", "small", "--directory", str(tmp_path))["bytes"]
    hardware = load_hardware(str(ROOT / "docs/measured/plan_cpu.yaml"))
    # The process itself is this machine's, not that of the file.
    planned = memory(CASES["small"].training(), hardware.model_copy(update={"runtime_gb": measure("runtime")}))
    # benchmarks/plan.py holds to 10%: it fits the allocator on the same machine, which this takes from the file.
    assert sum_bytes(planned) == pytest.approx(measured, rel=0.15)


def test_a_hardware_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: x\nmemory_gb: -3\n")
    with pytest.raises(RecipeError, match="memory_gb: .*; mend the file"):
        load_hardware(str(tmp_path / "own.yaml"))
    for name in ("h100", "h800", "h200", "a100"):
        hardware = load_hardware(name)
        figures = set(type(hardware).model_fields) - {"name", "sources", "calibration"}
        assert figures == set(hardware.sources), name  # no figure without a source
