"""The recipe of an evaluation: a checkpoint or an endpoint, on problems of our own data and on benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from posttrain.sections import (
    DatasetSection,
    EvalSection,
    Fraction,
    ModelSection,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Recipe,
    SamplerSection,
    Section,
    require_checkpoint,
)


class JudgeSection(Section):
    """A model behind an OpenAI-compatible address that grades; see `rewards.endpoint`."""

    model: str  # the name it is served under
    base_url: str | None = None  # such as http://127.0.0.1:8000/v1; None is the client's default
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    timeout_seconds: Positive = 600.0  # of one attempt
    max_retries: NonNegativeInt = 3
    max_concurrency: PositiveInt = 32


class ServedModelSection(JudgeSection):
    """A model behind such an address that is evaluated."""

    send_seed: bool = True  # false for endpoints that refuse the parameter
    extra_body: Mapping[str, Any] = Field(default_factory=dict)  # more for the request


class BenchmarkOptions(Section):
    """What a recipe changes of a benchmark; None keeps what the benchmark says."""

    size: PositiveInt | None = None  # so many of its problems, the first ones
    num_samples: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    temperature: NonNegative | None = None
    max_completion_length: PositiveInt | None = None


class BenchmarkSection(BenchmarkOptions):
    """One benchmark of `eval.benchmarks`."""

    name: str  # see docs/eval.md
    path: str | None = None  # a copy of its data: .jsonl, .parquet, or a folder with a file for each split
    languages: tuple[str, ...] | None = Field(
        None, min_length=1
    )  # of programs, where a benchmark has several; None: all
    method: Literal["generate", "lm_eval"] = "generate"  # or log-likelihoods, by EleutherAI's lm-eval


class ContaminationSection(Section):
    """Training data in which the problems are looked for, by the rules of `data.clean`."""

    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    ngram: PositiveInt = 13  # words in a row


def _by_name(value: Any) -> Any:
    """`math_500` stands for `{name: math_500}`."""
    if isinstance(value, list | tuple):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return value


class EvalSuiteSection(EvalSection):
    """What an evaluation stage runs: `datasets` as the training stages do, and `benchmarks`."""

    datasets: tuple[DatasetSection, ...] = ()
    benchmarks: Annotated[tuple[BenchmarkSection, ...], BeforeValidator(_by_name)] = ()
    benchmark_defaults: BenchmarkOptions = BenchmarkOptions()  # for benchmarks that do not say otherwise
    judge: JudgeSection | None = None  # for benchmarks that a language model grades
    contamination: ContaminationSection | None = None
    sandbox: Literal["bubblewrap", "landlock"] = "bubblewrap"  # for benchmarks that run programs; see docs/sandbox.md
    max_failed_fraction: Fraction = 0.0  # of the completions of a suite, without answer or verdict; they count as wrong

    @model_validator(mode="after")
    def _something_to_do(self) -> EvalSuiteSection:
        if not self.datasets and not self.benchmarks:
            raise ValueError("give datasets, benchmarks, or both; e.g. benchmarks: [tiny_tasks]")
        if self.environment is not None and not self.datasets:
            raise ValueError("environment: benchmarks have graders of their own; remove it, or give datasets")
        twice = [name for name, count in Counter(section.name for section in self.benchmarks).items() if count > 1]
        if twice:
            raise ValueError(f"benchmarks: {twice[0]} is named twice; name each once")
        return self

    def options(self, section: BenchmarkSection) -> Mapping[str, Any]:
        """What the recipe changes of a benchmark, without what it leaves as it is."""
        names = BenchmarkOptions.model_fields
        own = {name: getattr(section, name) for name in names}
        common = {name: getattr(self.benchmark_defaults, name) for name in names}
        return {
            name: common[name] if value is None else value
            for name, value in own.items()
            if value is not None or common[name] is not None
        }


class EvalRecipe(Recipe):
    """Evaluation of one checkpoint, or of a model behind an endpoint."""

    stage: Literal["eval"] = "eval"
    model: ModelSection | None = None
    endpoint: ServedModelSection | None = None
    eval: EvalSuiteSection
    sampler: SamplerSection = SamplerSection()

    @model_validator(mode="after")
    def _eval_fits(self) -> EvalRecipe:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give exactly one of model (a checkpoint) and endpoint (a served model)")
        if self.endpoint is not None and self.eval.environment is not None:
            raise ValueError(
                "eval.environment: episodes need the tokens of a checkpoint; give model instead of endpoint"
            )
        by_likelihood = [section.name for section in self.eval.benchmarks if section.method == "lm_eval"]
        if self.endpoint is not None and by_likelihood:
            raise ValueError(
                f"eval.benchmarks: {by_likelihood[0]} with method: lm_eval reads log-likelihoods of a checkpoint; give "
                f"model instead of endpoint, or leave method out"
            )
        if self.model is not None:
            require_checkpoint(self.model, "evaluation")
            if self.eval.datasets:
                self.eval.check_fits(self.sampler, during_training=False)
        return self
