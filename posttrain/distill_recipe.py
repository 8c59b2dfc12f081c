"""The recipe of distillation: prompts, a teacher, what is rejected, what is picked, and what is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.sections import (
    DatasetSection,
    Fraction,
    ModelSection,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveInt,
    Recipe,
    RewardSection,
    SamplerSection,
    Section,
    Tracker,
    require_checkpoint,
)
from posttrain.sft_recipe import DecontaminationSection

Pick = Literal["shortest", "best", "all", "diverse"]
RowKind = Literal["response", "system_response", "original"]
GENERATIONS = 4  # of a prompt, where the recipe says nothing


class EndpointSection(Section):
    """A model behind an OpenAI-compatible address (vLLM's or SGLang's server, hosted ones)."""

    model: str  # the name it is served under
    base_url: str | None = None  # such as http://127.0.0.1:8000/v1; None is the client's default
    api_key_env: str | None = None  # environment variable that holds the key; None sends none
    timeout_seconds: Positive = 600  # of one attempt
    max_retries: NonNegativeInt = 10  # after 408, 409, 429, 5xx, a time-out or no connection
    max_concurrency: PositiveInt = 32  # requests under way at the same time
    requests_per_minute: Positive | None = None  # attempts included
    send_seed: bool = True  # false for endpoints that refuse the parameter
    extra_body: Mapping[str, Any] = Field(default_factory=dict)  # more for the request
    prompt_price: NonNegative = 0.0  # for a million tokens, in whatever currency
    completion_price: NonNegative = 0.0  # for a million tokens
    max_cost: Positive | None = None  # beyond it no request is begun
    max_failed_fraction: Fraction = 0.05  # of all samples; beyond it the run stops

    @model_validator(mode="after")
    def _can_be_asked(self) -> EndpointSection:
        if self.base_url is None and self.api_key_env is None:
            raise ValueError("base_url: none, so a hosted endpoint is meant, which needs a key; add api_key_env")
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(
                f"max_cost={self.max_cost:g} without prices is never reached; add prompt_price and completion_price"
            )
        return self


class RecordingsSection(Section):
    """Generations of another time: rows with a completion and what it answers (see docs/distill.md)."""

    path: str  # .jsonl, .parquet, a folder of them, or a hub name
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"
    columns: Mapping[str, str] = Field(default_factory=dict)  # our column name -> theirs


class DistillTeacherSection(Section):
    """Who answers the prompts. Exactly one of the three."""

    model: ModelSection | None = None  # a checkpoint, on vLLM workers
    endpoint: EndpointSection | None = None
    recordings: RecordingsSection | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> DistillTeacherSection:
        if sum(kind is not None for kind in (self.model, self.endpoint, self.recordings)) != 1:
            raise ValueError("give exactly one of model (a checkpoint), endpoint and recordings")
        if self.model is not None:
            require_checkpoint(self.model, "a teacher")
        return self


class GenerationSection(Section):
    """How a teacher answers. Sampling keys as in TRL's GRPOConfig."""

    num_generations: PositiveInt | None = None  # of a prompt; None: 4, and of recordings all that are there
    max_completion_length: PositiveInt = 128  # tokens
    temperature: NonNegative = 1.0  # 0 is greedy
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0  # 0 keeps the whole vocabulary
    system_prompt: str | None = None  # before the problem

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerationSection:
        if self.temperature == 0 and self.num_generations != 1:
            raise ValueError("temperature=0 gives the same answer each time; set num_generations: 1, or a temperature")
        return self


class LanguageRule(Section):
    """Rejects answers that mix languages: `rewards.language_consistency` below a share."""

    language: str = "en"  # ISO 639 code; a record's own column `language` goes first
    min_share: Fraction = 0.9  # of the words that must be in it; an answer without words passes
    part: Literal["reasoning", "all"] = "all"


class LengthRule(Section):
    """Bounds of an answer's length, both included."""

    min_tokens: NonNegativeInt | None = None  # the teacher's tokens
    max_tokens: PositiveInt | None = None
    min_characters: NonNegativeInt | None = None
    max_characters: PositiveInt | None = None

    @property
    def in_tokens(self) -> bool:
        return self.min_tokens is not None or self.max_tokens is not None

    @model_validator(mode="after")
    def _bounds_fit(self) -> LengthRule:
        if not self.in_tokens and self.min_characters is None and self.max_characters is None:
            raise ValueError("length without a bound rejects nothing; give max_tokens, max_characters, ...")
        for unit in ("tokens", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit}={low} exceeds max_{unit}={high}; lower it")
        return self


class RepetitionRule(Section):
    """Rejects answers that repeat themselves: share of n-grams that were there before, as `rewards.repetition`."""

    ngram_size: PositiveInt = 4  # words
    max_share: Fraction = 0.5


class RejectionSection(Section):
    """What is no sample to learn from. Each key is a reason in the data card."""

    correctness: Mapping[str, Number] = Field(default_factory=dict)  # reward -> the score it must reach
    format: Literal["think_answer", "think"] | None = None  # the tags that an answer must have
    language: LanguageRule | None = None
    length: LengthRule | None = None
    repetition: RepetitionRule | None = None
    truncated: bool = True  # answers that were cut off


class SelectionSection(Section):
    """What is kept of the answers that are left."""

    pick: Pick = "shortest"
    per_prompt: PositiveInt | None = None  # at most so many; None: 1, and for `all` all
    deduplicate: bool = True  # of equal prompts the first, of equal chats the first
    decontamination: DecontaminationSection | None = None  # of prompts before they are answered, and of answers

    @property
    def limit(self) -> int | None:
        """Answers of a prompt that are kept at most; None for all."""
        return self.per_prompt if self.per_prompt is not None or self.pick == "all" else 1

    @model_validator(mode="after")
    def _limit_fits(self) -> SelectionSection:
        if self.pick == "all" and self.per_prompt is not None:
            raise ValueError(
                f"per_prompt={self.per_prompt} with pick: all; remove it, or pick shortest, best or diverse"
            )
        if self.pick == "diverse" and (self.per_prompt or 1) < 2:
            raise ValueError("pick: diverse needs per_prompt of 2 or more: a single answer differs from no other")
        return self


class OutputSection(Section):
    """The file for SFT."""

    format: Literal["parquet", "jsonl"] = "parquet"
    # response: <problem, answer>; system_response: <system prompt, problem, answer>; original: <problem, the record's own
    # response>, once for a prompt with a kept answer (DeepSeek-V3, section 5.1).
    kinds: Annotated[tuple[RowKind, ...], Field(min_length=1)] = ("response",)
    system_prompt: str | None = None  # of system_response; None: that of generation
    # Preference pairs of a prompt, written beside the dataset for a reward model: an answer that is right over one that
    # `rejection.correctness` rejects.
    pairs_per_prompt: NonNegativeInt = 0

    @model_validator(mode="after")
    def _kinds_fit(self) -> OutputSection:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds={list(self.kinds)} names a kind twice; name each once")
        if self.system_prompt is not None and "system_response" not in self.kinds:
            raise ValueError("system_prompt is written by kinds: [system_response] only; add that kind, or remove it")
        return self


class DistillRecipe(Recipe):
    """Prompts -> teacher -> verified answers -> a dataset for SFT."""

    stage: Literal["distill"] = "distill"
    teacher: DistillTeacherSection
    datasets: tuple[DatasetSection, ...] = Field(min_length=1)  # the prompts
    generation: GenerationSection = GenerationSection()
    rewards: tuple[RewardSection, ...] = ()
    rejection: RejectionSection = RejectionSection()
    selection: SelectionSection = SelectionSection()
    output: OutputSection = OutputSection()
    sampler: SamplerSection = SamplerSection()
    ray_address: str | None = None  # None: the surrounding Ray job's cluster, or a local one
    report_to: tuple[Tracker, ...] = ()

    @property
    def num_generations(self) -> int | None:
        """Answers of a prompt; None for recordings, of which all are taken."""
        given = self.generation.num_generations
        return given or (None if self.teacher.recordings else GENERATIONS)

    @property
    def system_prompt(self) -> str | None:
        """Of the rows of kind system_response."""
        return self.output.system_prompt or self.generation.system_prompt

    @model_validator(mode="after")
    def _rewards_fit(self) -> DistillRecipe:
        labels = Counter(reward.label for reward in self.rewards)
        twice = [label for label, count in labels.items() if count > 1]
        if twice:
            raise ValueError(f"rewards: {labels[twice[0]]} are named {twice[0]!r}; give each its own name")
        unknown = [label for label in self.rejection.correctness if label not in labels]
        if unknown:
            choices = f"choose one of {', '.join(labels)}" if labels else "there are no rewards; add it to them"
            raise ValueError(f"rejection.correctness: {unknown[0]!r} is none of the rewards; {choices}")
        if self.output.pairs_per_prompt and not self.rejection.correctness:
            raise ValueError(
                f"output.pairs_per_prompt={self.output.pairs_per_prompt} needs to know which answers are wrong; give a "
                f"reward and its threshold in rejection.correctness, or set it to 0"
            )
        if self.selection.pick == "best" and not any(reward.weight for reward in self.rewards):
            raise ValueError("selection.pick: best compares rewards, and none has a weight; add one, or pick shortest")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> DistillRecipe:
        for index, dataset in enumerate(self.datasets):
            dataset.refuse(f"datasets.{index}", "worked_fraction", "careless_fraction")
        if "system_response" in self.output.kinds and self.system_prompt is None:
            raise ValueError(
                "output.kinds: system_response needs a text; add output.system_prompt or generation.system_prompt"
            )
        if self.teacher.model is None:
            if self.sampler != SamplerSection():
                raise ValueError("sampler: only a teacher of kind model has vLLM workers; remove the section")
        elif self.generation.max_completion_length >= self.sampler.max_model_len:
            raise ValueError(
                f"generation.max_completion_length={self.generation.max_completion_length} leaves no room for a prompt in "
                f"sampler.max_model_len={self.sampler.max_model_len}; raise sampler.max_model_len"
            )
        if self.teacher.recordings is not None:
            plain = GenerationSection(num_generations=self.generation.num_generations)
            if self.generation != plain:
                raise ValueError(
                    "generation: recordings were made already, so only num_generations has a meaning; remove the others"
                )
        return self
