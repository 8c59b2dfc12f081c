"""The evaluation stage with its real parts: vLLM workers, an endpoint over HTTP, the graders; numbers counted again apart."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from benchmark_rows import FIXTURES, MULTIPLE
from fake_judge import serve
from openai_server import Scripted, body
from stage_commands import run

from eval.__main__ import main
from posttrain.recipe_file import load_recipe
from rewards.sandbox import SandboxUnavailableError, close_shared_pools, shared_pool


def read_rows(run_dir: Path, suite: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run_dir / "samples" / f"eval-{suite}.parquet").to_pylist()
    return found


def recount(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, pass@2 and length from the rows alone, with a grader of three lines and the definition of pass@k."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        whole = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", row["completion"], re.DOTALL)
        alone = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", row["completion"], re.DOTALL)
        text = whole or alone
        right[row["prompt_id"]].append(text is not None and text[1].strip() == row["answer"])
    pairs = [[hits[i] or hits[j] for i in range(len(hits)) for j in range(i)] for hits in right.values()]
    return {
        "mean": sum(sum(hits) / len(hits) for hits in right.values()) / len(right),
        "pass@2": sum(sum(found) / len(found) for found in pairs) / len(pairs),
        "length": sum(row["length"] for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows),
    }


RECIPE = """
stage: eval
seed: 1234  # of the evaluation's problems too
model: {model_name_or_path: %s}
eval:
  datasets: [{task: letter_counting, levels: [1], size: 8}]
  max_completion_length: 12
  benchmarks: [{name: tiny_tasks, size: 9, num_samples: 3, max_completion_length: 12}]
  contamination: {datasets: [{task: letter_counting, levels: [1], size: 30, split: eval}]}
sampler: {max_model_len: 96, num_threads: 1}
"""


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_and_compared(policy_path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(RECIPE % policy_path)
    code, output = run("eval", str(recipe), f"output_dir={tmp_path / 'run'}")
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"] and list(summary["eval"]) == ["eval", "tiny_tasks"]
    found, rows = summary["eval"]["tiny_tasks"], read_rows(tmp_path / "run", "tiny_tasks")
    counted = recount(rows)
    assert len(rows) == 27 and found["counts"]["completions"] == 27 and found["pass_at_1"]["n"] == 9
    assert found["pass_at_1"]["value"] == pytest.approx(counted["mean"])
    assert found["metrics"]["pass@2"]["value"] == pytest.approx(counted["pass@2"])
    assert found["completion_length_mean"] == pytest.approx(counted["length"])
    assert found["counts"]["truncated"] == counted["truncated"] > 0  # random weights hardly ever stop
    assert list(found["metrics"]) == ["bootstrap", "pass@2", "pass@3", "cons@3"]
    own = summary["eval"]["eval"]
    assert own["pass_at_1"]["n"] == 8 and own["contamination"]["share"] == 1.0  # the very problems, as training data
    assert own["contamination"]["clean"] is None and found["contamination"]["share"] < 1.0
    assert (tmp_path / "run" / "report.html").exists()
    code, output = run("eval", "compare", str(tmp_path / "run"), str(tmp_path / "run"), "--json")
    assert code == 0, output
    lines = [json.loads(line) for line in output.splitlines()]
    assert {(line["suite"], line["mode"]) for line in lines} == {
        ("eval", "sampled"),
        ("eval", "greedy"),
        ("tiny_tasks", "sampled"),
    }
    assert all(line["difference"] == 0 and line["p_value"] == 1 for line in lines)


class Model(BaseHTTPRequestHandler):
    """A served model that adds, and breaks off now and then."""

    seen: ClassVar[Counter[str]] = Counter()
    refuses: ClassVar[set[str]] = set()  # texts it never answers
    asked: ClassVar[list[dict[str, Any]]] = []
    lock: ClassVar[Lock] = Lock()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = request["messages"][-1]["content"]
        with self.lock:
            Model.seen[text] += 1
            Model.asked.append({key: request.get(key) for key in ("seed", "temperature", "top_k")})
        if any(part in text for part in self.refuses):
            self._send(400, {"error": {"message": "not this one"}})
            return
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        message = {
            "role": "assistant",
            "content": f"So it is \\boxed{{{sum(numbers)}}}.",
            "reasoning_content": "I add.",
        }
        choice = {"index": 0, "message": message, "finish_reason": "length" if len(numbers) > 2 else "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        self._send(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage},
        )

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    Thread(target=server.serve_forever, daemon=True).start()
    Model.seen.clear()
    Model.refuses.clear()
    Model.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def gsm8k(path: Path) -> None:
    asked = ["3 and 4 pens?", "10 and 20 pens?", "1 and 2 and 3 pens?", "5 and 6 pens, less 1?"]
    answers = ["7", "30", "6", "10"]
    rows = [{"question": q, "answer": f"Add.\n#### {a}"} for q, a in zip(asked, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ENDPOINT = """
stage: eval
endpoint: {model: adder, base_url: "%s", max_retries: 0, timeout_seconds: 20}
eval: {benchmarks: [{name: gsm8k, path: %s}]}
output_dir: %s
"""


def test_an_endpoint_is_asked_once_for_each_answer(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gsm8k(tmp_path / "gsm8k.jsonl")
    recipe, out = tmp_path / "eval.yaml", tmp_path / "run"
    recipe.write_text(ENDPOINT % (served, tmp_path / "gsm8k.jsonl", out))
    Model.refuses.add("10 and 20")
    assert main([str(recipe)]) == 3  # one has no answer, which is more than max_failed_fraction
    said = capsys.readouterr().err
    assert "of 4 completions 1 have no answer" in said and "--resume" in said
    assert len((out / "generations" / "gsm8k.jsonl").read_text().splitlines()) == 3
    assert main([str(recipe)]) == 3 and "add --resume" in capsys.readouterr().err  # nothing that was paid for is lost
    Model.refuses.clear()
    Model.seen.clear()
    assert main([str(recipe), "--resume"]) == 0
    assert sum(Model.seen.values()) == 1 and "10 and 20" in next(iter(Model.seen))  # only what was missing
    found = json.loads((out / "summary.json").read_text())["eval"]["gsm8k"]
    rows = read_rows(out, "gsm8k")
    assert [row["score"] for row in rows] == [1.0, 1.0, 1.0, 0.0]  # the last adds what had to be taken away
    assert found["pass_at_1"]["value"] == 0.75 and found["counts"]["truncated"] == 2
    assert rows[0]["completion"] == "<think>I add.</think>So it is \\boxed{7}." and rows[0]["length"] == 7
    table = (out / "comparison.md").read_text()
    assert "| GSM8K (base) (8-shot EM) | 75.0 [" in table and "DeepSeek-V3-Base" in table and "89.3" in table


def test_answers_that_failed_count_as_wrong_where_that_is_allowed(served: str, tmp_path: Path) -> None:
    gsm8k(tmp_path / "gsm8k.jsonl")
    recipe, out = tmp_path / "eval.yaml", tmp_path / "run"
    recipe.write_text(ENDPOINT % (served, tmp_path / "gsm8k.jsonl", out))
    Model.refuses.add("10 and 20")
    changes = ["endpoint.send_seed=false", "endpoint.extra_body={top_k: 5}"]
    assert main([str(recipe), "eval.max_failed_fraction=0.25", *changes]) == 0
    assert Model.asked == [{"seed": None, "temperature": 0.0, "top_k": 5}] * 4
    found = json.loads((out / "summary.json").read_text())["eval"]["gsm8k"]
    assert found["pass_at_1"]["value"] == 0.5 and found["counts"]["no_answer"] == 1
    rows = read_rows(out, "gsm8k")
    assert [row["status"] for row in rows] == ["ok", "infrastructure", "ok", "ok"]


def test_benchmarks_that_need_a_judge_are_judged(served: str, tmp_path: Path) -> None:
    for name in ("simpleqa", "arena_hard"):
        rows = [{**row, "prompt": f"{row['prompt']} 1 + 2"} if "prompt" in row else row for row in FIXTURES[name].rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, out = tmp_path / "eval.yaml", tmp_path / "run"
    with serve() as judge:
        recipe.write_text(
            f"stage: eval\nendpoint: {{model: adder, base_url: '{served}'}}\noutput_dir: {out}\n"
            f"eval:\n  judge: {{model: judge, base_url: '{judge}'}}\n"
            f"  benchmarks: [{{name: simpleqa, path: {tmp_path / 'simpleqa.jsonl'}}}, "
            f"{{name: arena_hard, path: {tmp_path / 'arena_hard.jsonl'}}}]\n"
        )
        assert main([str(recipe)]) == 0
    found = json.loads((out / "summary.json").read_text())["eval"]
    assert found["simpleqa"]["pass_at_1"]["value"] == 0.0  # a number is no painter
    assert (
        found["arena_hard"]["pass_at_1"]["value"] == 0.5
    )  # neither it nor the baseline is "good": ties, in both orders
    assert found["arena_hard"]["counts"]["no_verdict"] == 0
    assert len((out / "generations" / "arena_hard-verdicts.jsonl").read_text().splitlines()) == 2


def test_programs_in_several_languages_are_measured(tmp_path: Path) -> None:
    chosen = ["python", "bash", "cpp"]
    for language in chosen:
        try:
            shared_pool("bubblewrap", language=language)
        except SandboxUnavailableError as error:
            pytest.skip(str(error))
        finally:
            close_shared_pools()
    rows = [row for row, _, _ in MULTIPLE.values()]
    (tmp_path / "mul.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(request: dict[str, Any], _number: int) -> tuple[int, dict[str, str], bytes]:
        text = request["messages"][-1]["content"]
        language = next(name for name in chosen if f"```{name}\n" in text)
        _, right, wrong = MULTIPLE[language]
        return 200, {}, body(f"```{language}\n{wrong if language == 'cpp' else right}\n```")

    recipe, out = tmp_path / "eval.yaml", tmp_path / "run"
    with Scripted(answer) as server:
        recipe.write_text(
            f"stage: eval\nendpoint: {{model: coder, base_url: '{server.url}'}}\noutput_dir: {out}\n"
            f"eval: {{benchmarks: [{{name: humaneval_mul, path: {tmp_path / 'mul.jsonl'}, languages: {chosen}}}]}}\n"
        )
        assert main([str(recipe)]) == 0
    found = json.loads((out / "summary.json").read_text())["eval"]["humaneval_mul"]
    assert {name: part["value"] for name, part in found["by_level"].items()} == {"python": 1.0, "bash": 1.0, "cpp": 0.0}
    assert (found["pass_at_1"]["value"], found["languages"]) == (pytest.approx(2 / 3), sorted(chosen))
    assert found["counts"]["rows_left_out"] == 2
    assert {row["cluster"] for row in read_rows(out, "humaneval_mul")} == {"HumanEval/900"}
    table = (out / "comparison.md").read_text()
    assert "HumanEval-Mul (Pass@1) | 66.7" in table and "82.6" in table and "Languages: bash, cpp, python" in table


def test_what_does_not_fit_is_said_before_anything_starts(policy_path: Path, tmp_path: Path, capsys: Any) -> None:
    gsm8k(tmp_path / "gsm8k.jsonl")
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(
        f"stage: eval\nmodel: {{model_name_or_path: {policy_path}}}\noutput_dir: {tmp_path / 'run'}\n"
        f"eval: {{benchmarks: [{{name: gsm8k, path: {tmp_path / 'gsm8k.jsonl'}}}]}}\n"
    )
    assert main([str(recipe)]) == 2
    assert "answers be 1024 tokens long and sampler.max_model_len=256" in capsys.readouterr().err
    assert main([str(recipe), "eval.benchmark_defaults.max_completion_length=200"]) == 2
    assert re.search(
        r"4 of 4 prompts of gsm8k do not fit.*sampler.max_model_len to at least \d+", capsys.readouterr().err
    )
    assert main([str(recipe), "eval.benchmarks.0.num_samples=3", "sampler.max_model_len=2000"]) == 2
    assert "at temperature 0 gives the same answer" in capsys.readouterr().err
    assert main([str(recipe), "eval.benchmarks=[simpleqa]"]) == 2
    assert "add eval.judge" in capsys.readouterr().err


def test_recipes_name_one_thing_to_evaluate(tmp_path: Path) -> None:
    recipe = tmp_path / "eval.yaml"
    recipe.write_text("stage: eval\neval: {benchmarks: [tiny_tasks, {name: mmlu, size: 3}]}\n")
    with pytest.raises(ValueError, match="exactly one of model"):
        load_recipe(recipe)
    found = load_recipe(recipe, ["endpoint.model=m", "eval.benchmark_defaults.num_samples=2"])
    assert [section.name for section in found.eval.benchmarks] == ["tiny_tasks", "mmlu"]
    assert found.eval.options(found.eval.benchmarks[1]) == {"size": 3, "num_samples": 2}
    for change, message in (
        ("eval.benchmarks.1.method=lm_eval", "reads log-likelihoods of a checkpoint"),
        ("eval.benchmarks=[]", "give datasets, benchmarks, or both"),
        ("eval.benchmarks=[mmlu, mmlu]", "mmlu is named twice"),
        ("eval.environment.func=a:B", "benchmarks have graders of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(recipe, ["endpoint.model=m", change])


def test_long_prompts_lose_their_middle(tmp_path: Path) -> None:
    from data.chat import build_tokenizer
    from eval.benchmark_task import prepare
    from posttrain.recipe import BenchmarkSection, EvalSuiteSection

    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FIXTURES["longbench_v2"].rows))
    section = BenchmarkSection(name="longbench_v2", path=str(file), max_completion_length=20)
    suite = EvalSuiteSection(benchmarks=(section,))
    task = prepare(section, suite, build_tokenizer(), 320)
    assert task.shortened == 2 and all(280 <= len(prompt.token_ids) <= 300 for prompt in task.prompts)
    text = task.prompts[0].messages[-1]["content"]
    assert text.startswith("Read this text") and text.endswith("\\boxed{}.") and len(text) < 300
    whole = prepare(section, suite, build_tokenizer(), 2000)
    assert whole.shortened == 0


def test_reward_bench_is_the_mean_of_its_parts() -> None:
    from eval.benchmark_task import headline
    from eval.benchmarks import get_benchmark

    of_kind = {"math-prm": [[1.0], [1.0]], "hep-cpp": [[0.0]], "alpacaeval-easy": [[1.0], [0.0], [0.0], [0.0]]}
    found = headline(get_benchmark("reward_bench").macro, of_kind, [s for part in of_kind.values() for s in part], None)
    # Chat 1/4; Reasoning (1 + 0) / 2; parts without problems are left out.
    assert found.value == pytest.approx((0.25 + 0.5) / 2) and found.n == 7
    assert not math.isnan(found.low) and found.low < found.value < found.high
