"""The page of `make reproduce`, from a small made-up run whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.reproduction import runs, tables
from benchmarks.reproduction.page import markdown, page
from benchmarks.reproduction.plots import draw_all
from eval.statistics import Estimate
from posttrain.recipe import PipelineRecipe
from posttrain.recipe_file import load_recipe
from posttrain.records import evaluation_records

ROOT = Path(__file__).parent.parent
DIRECT, ZH, KO, MIXED = "", "a零e一e二", "a영e일e이", "a零e일e二"
CONFIG = {
    **{"hidden_size": 8, "intermediate_size": 16, "moe_intermediate_size": 4, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 1, "vocab_size": 131},
}
# stage -> moment -> for eight Chinese questions: how many are right, and how each of them is reasoned about
EVALUATIONS: dict[str, dict[str, tuple[int, list[str]]]] = {
    "zero": {"before": (2, [DIRECT] * 4 + [MIXED] * 4), "after": (8, [MIXED] * 8)},
    "zero_language": {"after": (8, [ZH] * 8)},
    "reasoning_rl": {"before": (6, [ZH] * 8), "after": (8, [ZH] * 8)},
    "reasoning_rl_no_language": {"after": (8, [ZH] * 4 + [KO] * 4)},
    "all_scenarios": {"before": (8, [ZH] * 8), "after": (8, [ZH] * 8)},
    "sft_direct_evaluation": {"eval": (3, [DIRECT] * 8)},
    "student_rl": {"before": (1, [MIXED] * 8), "after": (4, [MIXED] * 8)},
    "student_sft_evaluation": {"eval": (8, [ZH] * 8)},
    "student_rl_seed_1": {"after": (6, [MIXED] * 8)},
    "student_sft_seed_1_evaluation": {"eval": (8, [ZH] * 8)},
    "student_rl_seed_2": {"after": (8, [MIXED] * 8)},
    "student_sft_seed_2_evaluation": {"eval": (8, [ZH] * 8)},
}


def eval_rows(right: int, reasonings: list[str]) -> list[dict[str, Any]]:
    def row(mode: str, kind: str, place: int, reasoning: str) -> dict[str, Any]:
        return {
            "mode": mode,
            "prompt_id": f"{kind}/eval/{place}",
            "kind": kind,
            "prompt": "e:aee几?" if kind != "chain_sum/1" else "1+1=",
            "completion": f"<think>{reasoning}</think><answer>2</answer>",
            "score": float(place < right),
            "length": 4 + len(reasoning),
        }

    counting = [
        row(mode, "bilingual_counting/2", place, reasoning)
        for mode in ("sampled", "greedy")
        for place, reasoning in enumerate(reasonings)
    ]
    return counting + [row("sampled", "chain_sum/1", place, "") for place in range(4)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of recipes/tiny/r1.yaml that has written what the page is made of, and little else."""
    run = tmp_path / "r1"
    recipe = load_recipe(ROOT / "recipes/tiny/r1.yaml")
    assert isinstance(recipe, PipelineRecipe)
    names = [stage.name for stage in recipe.stages]
    for name in names:
        (run / name / "samples").mkdir(parents=True)
        (run / name / "checkpoints/latest").mkdir(parents=True)
        write(run / name / "summary.json", {"seconds": 30.0, "steps": 2, "finished": True})
        write(run / name / "checkpoints/latest/config.json", CONFIG)
        for moment, (right, reasonings) in EVALUATIONS.get(name, {}).items():
            pq.write_table(
                pa.Table.from_pylist(eval_rows(right, reasonings)), run / name / "samples" / f"eval-{moment}.parquet"
            )
    for name in ("zero", "zero_language", "reasoning_rl", "reasoning_rl_no_language", "student_rl"):
        lines = [
            {
                "step": step,
                "time/step": 3.0,
                "groups/with_signal": 0.5,
                "completion/length_mean": 10.0 * step,
                "reward/accuracy/mean": 0.5,
                "reward/language/mean": 0.5,
            }
            for step in (1, 2)
        ]
        (run / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for step in (1, 2):
            table = pa.Table.from_pylist([{"prompt": "e:aee几?", "length": 8}] * 10)
            pq.write_table(table, run / name / "samples" / f"step-{step:06d}.parquet")
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 16}
    (run / "student_sft/metrics.jsonl").write_text(json.dumps({"step": 2, "seconds": 5.0}))
    (run / "student_sft/recipe.yaml").write_text(yaml.safe_dump({"training": training}))
    teacher = {"teacher": {"model": {"model_name_or_path": str(run / "reasoning_rl/checkpoints/latest")}}}
    (run / "rejection/recipe.yaml").write_text(yaml.safe_dump(teacher))
    write(run / "rejection/data_card.json", CARD)
    evaluated = {"eval": {"after": {"pass_at_1": {"n": 8}}}}
    write(run / "summary.json", {"stages": {name: evaluated if name == "zero" else {} for name in names}})
    environment = {"processor_count": 2, "gpus": [], "python": "3.11", "packages": {"torch": "2.13"}, "seed": 0}
    write(run / "environment.json", environment)
    return run


CARD = {
    "funnel": {
        "steps": [
            {"step": "generated", "left": 100, "removed": 0},
            {"step": "judged", "left": 100, "removed": 0, "reason": "unjudged"},
            {"step": "correct", "left": 80, "removed": 20, "reason": "correctness"},
            {"step": "in one language", "left": 75, "removed": 5, "reason": "language"},
            {"step": "not a duplicate", "left": 60, "removed": 15, "reason": "duplicate"},
            {"step": "kept", "left": 40, "removed": 20, "reason": "not_picked"},
        ],
        "prompts": {"all": 50, "with_a_correct_answer": 45, "with_a_kept_answer": 40},
    },
    "usage": {"prompt_tokens": 300, "completion_tokens": 700},
}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def test_answers_by_hand(run_dir: Path) -> None:
    base = runs.Answers.of(run_dir / "zero", "before")
    assert (base.accuracy.value, base.accuracy.n, base.worked_share) == (0.25, 8, 0.5)
    direct, worked = base.accuracy_where(False), base.accuracy_where(True)
    assert direct is not None and worked is not None
    assert (direct.value, direct.n, worked.value, worked.n) == (0.5, 4, 0.0, 4)
    assert base.language is not None and base.language.value == pytest.approx(2 / 3)
    assert len(base.language_shares) == 4  # the answers without words say nothing
    assert base.length.value == (4 * 4 + 4 * 10) / 8
    assert runs.Answers.of(run_dir / "sft_direct_evaluation", "eval").language is None
    assert len(runs.Answers.of(run_dir / "zero", "before", task="chain_sum").rows) == 4


def test_compute_by_hand(run_dir: Path) -> None:
    from posttrain.planning.shapes import parameter_count
    from posttrain.recipe import BuildSection

    everything = parameter_count(BuildSection(**{k: v for k, v in CONFIG.items() if k != "vocab_size"}), 131)
    active = everything - 2 * 3 * 8 * 4 - 131 * 8  # two of four experts are idle; the embedding is looked up
    assert runs.active_parameters(run_dir / "zero/checkpoints/latest") == active
    # Two steps of ten samples of 7 + 3 prompt and 8 answer tokens: once forward to generate; of the half that has signal
    # twice forward to score and three times forward to train.
    assert runs.rl_compute(run_dir / "zero").flops == 2 * active * 2 * 180 * (1 + 0.5 * 5)
    assert runs.sft_compute(run_dir / "student_sft").flops == 6 * active * 2 * 8 * 16
    assert (runs.rl_compute(run_dir / "zero").seconds, runs.sft_compute(run_dir / "student_sft").seconds) == (6.0, 5.0)
    assert runs.teacher_compute(run_dir / "rejection").flops == 2 * active * 1000


def test_sentences_follow_from_the_figures(run_dir: Path) -> None:
    zero, student, reasoning, rejection, language = tables.all_tables(run_dir)
    assert "RL alone raises accuracy: holds (+75.0 points" in zero.sentence
    assert "as many steps of RL: cannot be told from 8 problems (+0.0 points [+0.0, +0.0])" in zero.sentence
    assert "of its words 100.0% [100.0, 100.0] are in the question's language, of R1-Zero's 66.7%" in zero.sentence
    assert "Distillation beats RL: holds (+25.0 points [" in student.sentence
    assert "], by seed +50.0, +25.0, +0.0, with" in student.sentence.replace(")", "")
    assert [row[0] for row in student.rows][-1] == "its teacher" and student.rows[-1][-1] == ""
    assert "raises accuracy: holds (+62.5 points" in reasoning.sentence and "2.50 times" in reasoning.sentence
    assert [row[1] for row in rejection.rows] == ["100", "80", "75", "60", "40"]
    assert rejection.sentence.startswith("40.0% of the samples are kept, for 80.0% of the problems; 25.0% fail")
    assert (
        "RL from the base: the reward keeps the reasoning in the language of the question: holds (+33.3"
        in language.sentence
    )
    assert (
        "RL from the cold start: the reward keeps the reasoning in the language of the question: holds"
        in language.sentence
    )
    assert "at a cost in accuracy: cannot be told from 8 problems (+0.0" in language.sentence
    assert "by -50.0 points" in language.sentence and "mixing grows, as in the paper" in language.sentence


def test_a_claim_that_the_figures_contradict_is_said_not_to_hold() -> None:
    assert tables.verdict(Estimate(0.1, 0.05, 0.15, 400)) == "holds"
    assert tables.verdict(Estimate(-0.1, -0.15, -0.05, 400)) == "does not hold"
    assert tables.verdict(Estimate(0.1, -0.05, 0.2, 400)) == "cannot be told from 400 problems"
    assert tables.verdict(tables.negative(Estimate(-0.1, -0.15, -0.05, 400))) == "holds"
    assert tables.drifted(Estimate(0.1, 0.05, 0.15, 400)).endswith("unlike in the paper")


def test_the_page_has_everything(run_dir: Path, tmp_path: Path) -> None:
    drawings = draw_all(run_dir, tmp_path / "out")
    found = tables.all_tables(run_dir)
    text = page(run_dir, found, drawings)
    for table in found:
        assert f"## ({table.letter}) {table.title}" in text and table.sentence in text
    for path in drawings.values():
        assert f"]({path.name})" in text
        assert path.read_text().startswith("<?xml") and path.stat().st_size < 100_000
    assert "2 CPU cores, no GPU" in text and "| student_rl | 30 |" in text
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


TINY = sorted(path for room in ("r1", "v3_experts") for path in (ROOT / "recipes/tiny" / room).glob("*.yaml"))


@pytest.mark.parametrize("path", TINY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_held_out_problems_of_the_recipes_exist(path: Path) -> None:
    """Small levels have few of them, and a stage would say so only when it evaluates."""
    section = getattr(load_recipe(path), "eval", None)
    if section is not None:
        asked = sum(dataset.size or 0 for dataset in section.datasets)
        assert len(evaluation_records(section.datasets, section.seed)) == asked
