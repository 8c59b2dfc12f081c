"""What a distillation holds while it runs: the teacher, the rewards, and the journals of what both have said."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from posttrain.distill_data import Problem, Problems, metadata_for_rewards, with_system_prompt
from posttrain.endpoint_teacher import EndpointTeacher
from posttrain.errors import RunStopped
from posttrain.journal import Journal
from posttrain.metrics import Metric, MetricsLog
from posttrain.recipe import DistillRecipe
from posttrain.run_dir import RunDir
from posttrain.sampler import request_seed
from posttrain.selection import Answer, Judgement
from posttrain.teachers import Generation, Request, Teacher
from posttrain.types import RewardResult
from rewards.scoring import Item, RewardFunction, combine

if TYPE_CHECKING:
    from posttrain.reward_pool import RewardPool

_DETAIL = 1000  # characters of what a reward says that are kept
_SECONDS_BETWEEN_LOGS = 5.0

Done = Sequence[tuple[Problem, list[Generation]]]


@dataclass
class DistillJob:
    """The state of a run. Every answer and every judgement is on disk before it counts."""

    recipe: DistillRecipe
    run_dir: RunDir
    problems: Problems
    teacher: Teacher
    functions: Sequence[RewardFunction]
    rewards: RewardPool | None
    generations: Journal
    judgements: Journal
    log: MetricsLog
    failures: dict[str, str] = field(default_factory=dict)  # sample id -> why there is no answer
    found: int = 0  # generations that were there at the start
    started: float = field(default_factory=time.perf_counter)
    metrics: dict[str, Metric] = field(default_factory=dict)
    _judged: Counter[str] = field(default_factory=Counter)  # reward -> answers, and "<reward> failed"
    _logged: float = 0.0
    _last_step: int = -1

    # --- what is wanted -----------------------------------------------------------------------------------------------

    def requests(self, problem: Problem) -> list[Request]:
        """All samples of a prompt; the same ones in every run of the recipe."""
        messages = with_system_prompt(problem.record.messages, self.recipe.generation.system_prompt)
        prompt_id = problem.record.id
        names = [
            f"{prompt_id}#{number}" for number in range(self.teacher.count(problem.record, self.recipe.num_generations))
        ]
        return [
            Request(name, prompt_id, number, messages, request_seed(self.recipe.seed, name, 0, 0))
            for number, name in enumerate(names)
        ]

    def missing(self) -> list[Request]:
        """Samples that are not in the journal.

        Raises:
            RunStopped: one that is there answers another prompt.
        """
        wanted = []
        for problem in self.problems.asked:
            requests = self.requests(problem)
            here = [request for request in requests if request.sample_id in self.generations]
            if here and self.generations.read(here[0].sample_id)["prompt_digest"] != here[0].prompt_digest:
                raise RunStopped(
                    f"{self.generations.path}: {here[0].sample_id} answers another prompt than {problem.record.id} is now; "
                    f"restore the data, or give another output_dir"
                )
            wanted += [request for request in requests if request.sample_id not in self.generations]
        return wanted

    @cached_property
    def num_samples(self) -> int:
        """That can be had of all prompts."""
        wanted = self.recipe.num_generations
        return sum(self.teacher.count(problem.record, wanted) for problem in self.problems.asked)

    # --- answers ------------------------------------------------------------------------------------------------------

    def answers(self, should_stop: Callable[[], bool]) -> Generator[Done, None, None]:
        """Prompts whose answers are all there and not all judged, with these answers, as they come.

        Answers are journalled by a thread of their own, so that the teacher works while rewards judge. After a stop, prompts
        that are not complete are left for a later run.

        Raises:
            What the teacher raises.
        """
        missing = self.missing()
        waiting: dict[str, int] = Counter(request.prompt_id for request in missing)
        yield from self.unjudged(problem for problem in self.problems.asked if problem.record.id not in waiting)
        by_id = {problem.record.id: problem for problem in self.problems.asked if problem.record.id in waiting}
        with closing(self._arriving(missing, should_stop)) as arriving:
            for batch in arriving:
                for generation in batch:
                    waiting[generation.prompt_id] -= 1
                complete = dict.fromkeys(g.prompt_id for g in batch if not waiting[g.prompt_id])
                yield [self._with_answers(by_id.pop(prompt_id)) for prompt_id in complete]
        if not should_stop():
            yield from self.unjudged(by_id.values())  # some samples have no answer

    def unjudged(self, problems: Iterable[Problem]) -> Iterator[Done]:
        """Those of the prompts that have answers to be judged, with their answers, some at a time."""
        part: list[tuple[Problem, list[Generation]]] = []
        for problem in problems:
            found = self._with_answers(problem)
            if any(self._is_to_be_judged(generation) for generation in found[1]):
                part.append(found)
            if len(part) == 64:
                yield part
                part = []
        if part:
            yield part

    def _with_answers(self, problem: Problem) -> tuple[Problem, list[Generation]]:
        names = [request.sample_id for request in self.requests(problem)]
        return problem, [Generation(**self.generations.read(name)) for name in names if name in self.generations]

    def _arriving(
        self, missing: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Generator[list[Generation], None, None]:
        """Generations that were journalled just now, all that have come since the last time."""
        arrived: queue.SimpleQueue[list[Generation] | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()

        def take(generations: Sequence[Generation]) -> None:
            self.generations.append(generation.to_dict() for generation in generations)
            arrived.put(list(generations))

        def answer() -> None:
            try:
                if missing:
                    self.failures = self.teacher.answer(missing, take, lambda: left.is_set() or should_stop())
                arrived.put(None)
            except BaseException as error:  # handed to whoever asks for the answers
                arrived.put(error)

        thread = threading.Thread(target=answer, name="teacher", daemon=True)
        thread.start()
        try:
            ended: list[BaseException | None] = []
            while not ended:
                batch: list[Generation] = []
                found = [arrived.get()]
                while not arrived.empty():
                    found.append(arrived.get())
                for one in found:
                    if isinstance(one, list):
                        batch += one
                    else:
                        ended.append(one)
                if batch:
                    yield batch
            if ended[0] is not None:
                raise ended[0]
        finally:
            left.set()
            thread.join(self.teacher.closing_seconds)  # what is under way is paid for

    # --- judgements ---------------------------------------------------------------------------------------------------

    def _is_to_be_judged(self, generation: Generation) -> bool:
        """Whether nothing is known of an answer yet, or a failure of the infrastructure is all that is known."""
        if not self.recipe.rewards:
            return False
        if generation.sample_id not in self.judgements:
            return True
        return self._judgement(generation.sample_id).is_unjudged

    def judge(self, done: Done) -> dict[str, Metric]:
        """Judge what is not judged, and keep what was said.

        Raises:
            RunStopped: a reward fails on more answers than its `max_failed_fraction` allows.
        """
        if self.rewards is None:
            return {}
        grouped = any(function.form == "group" for function in self.functions)
        wanted: list[list[Generation]] = []
        items: list[list[Item]] = []
        for problem, generations in done:
            new = [generation for generation in generations if self._is_to_be_judged(generation)]
            if new and grouped:
                new = generations  # which are compared with one another
            if new:
                wanted.append(new)
                items.append([_item(problem, generation) for generation in new])
        if not items:
            return {}
        judged = self.rewards.judge(items)
        rows = [
            {
                "sample_id": generation.sample_id,
                "said": {
                    function.name: {**asdict(column[place][number]), "detail": column[place][number].detail[:_DETAIL]}
                    for function, column in zip(self.functions, judged.results, strict=True)
                },
            }
            for place, generations in enumerate(wanted)
            for number, generation in enumerate(generations)
        ]
        self.judgements.append(rows)
        self._require_working(rows, judged.complaints)
        return judged.metrics

    def _require_working(self, rows: Sequence[Mapping[str, Any]], complaints: Mapping[str, str]) -> None:
        """A reward that fails on most answers of the run so far is broken."""
        for section in self.recipe.rewards:
            statuses = [row["said"][section.label]["status"] for row in rows]
            self._judged[section.label] += len(statuses)
            self._judged[f"{section.label} failed"] += sum(s in ("crash", "infrastructure") for s in statuses)
            failed, total = self._judged[f"{section.label} failed"], self._judged[section.label]
            if failed > section.max_failed_fraction * total:
                raise RunStopped(
                    f"reward {section.label!r} failed on {failed} of {total} answers, more than max_failed_fraction="
                    f"{section.max_failed_fraction:g} allows; the last time: {complaints.get(section.label, 'see above')}; "
                    f"mend it and go on with --resume, which judges again what could not be judged"
                )

    # --- all of it ----------------------------------------------------------------------------------------------------

    def judged_answers(self, problem: Problem) -> list[Answer]:
        """The answers of a prompt, undecided."""
        _, generations = self._with_answers(problem)
        return [Answer(generation, self._judgement(generation.sample_id)) for generation in generations]

    def _judgement(self, sample_id: str) -> Judgement:
        if not self.recipe.rewards:
            return Judgement()
        said = {name: RewardResult(**result) for name, result in self.judgements.read(sample_id)["said"].items()}
        # Weights, clips and requirements are the recipe's of now: changing them judges nothing again.
        totals, _ = combine(self.functions, [[said[function.name] for function in self.functions]])
        return Judgement(
            totals[0],
            {name: result.score for name, result in said.items()},
            {name: result.status for name, result in said.items()},
            {name: result.detail for name, result in said.items()},
        )

    def usage(self) -> dict[str, Any]:
        """Tokens of all generations in the journal, what they cost (None without prices), and the requests of this run."""
        tokens: Counter[str] = Counter()
        for name in self.generations:
            row = self.generations.read(name)
            tokens["prompt_tokens"] += row["prompt_tokens"] or 0
            tokens["completion_tokens"] += row["completion_tokens"] or 0
        used: dict[str, Any] = {name: tokens[name] for name in ("prompt_tokens", "completion_tokens")}
        used["cost"] = None
        if isinstance(self.teacher, EndpointTeacher):
            cost = self.teacher.cost(tokens["prompt_tokens"], tokens["completion_tokens"])
            used["cost"] = cost if self.teacher.has_prices else None
            used |= {f"{name}_of_this_run": self.teacher.endpoint.counts[name] for name in ("requests", "retries")}
        return used

    def report(self, done: Done, judged: Mapping[str, Metric]) -> tuple[int, dict[str, Metric]]:
        """How far the run is, in answers, and the metrics of those that came last; logged now and then."""
        generations = [generation for _, answers in done for generation in answers]
        lengths = [g.completion_tokens for g in generations if g.completion_tokens is not None]
        new = len(self.generations) - self.found
        seconds = time.perf_counter() - self.started
        metrics = {
            **judged,
            "distill/generated": Metric(len(self.generations), "last"),
            "throughput/samples_per_second": Metric(new / seconds, "last"),
        }
        if lengths:
            cut = sum(g.finish_reason == "length" for g in generations)
            metrics["completion/length_mean"] = Metric(sum(lengths) / len(lengths), "mean")
            metrics["completion/truncated_fraction"] = Metric(cut / len(generations), "mean")
        if self.recipe.rewards and generations:
            totals = [self._judgement(g.sample_id).reward or 0.0 for g in generations]
            metrics["reward/mean"] = Metric(sum(totals) / len(totals), "mean")
        if isinstance(self.teacher, EndpointTeacher) and self.teacher.has_prices:
            metrics["distill/cost"] = Metric(self.teacher.spent, "last")
        step = len(self.generations)
        now = time.perf_counter()
        is_due = now - self._logged > _SECONDS_BETWEEN_LOGS or step >= self.num_samples
        if is_due and step > self._last_step:  # answers that are only judged again make no step
            self._logged, self._last_step = now, step
            self.log.log(step, metrics)
        self.metrics = metrics
        return step, metrics


def _item(problem: Problem, generation: Generation) -> Item:
    metadata = metadata_for_rewards(problem.record, generation.finish_reason, generation.completion_tokens)
    return Item(generation.completion, problem.record.answer, metadata)
