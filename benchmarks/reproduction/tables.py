"""The five tables. What a sentence claims is computed from the runs; nothing here knows what they have found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reproduction.runs import (
    Answers,
    Compute,
    funnel,
    rl_compute,
    sft_compute,
    teacher_compute,
)
from eval.statistics import Estimate, paired_difference

WHY_REASONING = (
    "A direct answer has to count all letters in the layers that one token passes, "
    "reasoning counts one letter at a time. "
)


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the page."""

    letter: str
    title: str
    claim: str  # the papers'
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentence: str  # whether the claim holds here, and why


def all_tables(run_dir: Path) -> list[Table]:
    """Tables (a) to (e) of a finished run of recipes/tiny/r1.yaml."""
    return [zero(run_dir), student(run_dir), distilled_reasoning(run_dir), rejection(run_dir), language(run_dir)]


def zero(run_dir: Path) -> Table:
    base = Answers.of(run_dir / "zero", "before")
    zero = Answers.of(run_dir / "zero", "after")
    cold = Answers.of(run_dir / "reasoning_rl", "before")
    warm = Answers.of(run_dir / "reasoning_rl", "after")
    policies = {
        "base": (base, greedy(run_dir / "zero", "before")),
        "R1-Zero: RL from the base": (zero, greedy(run_dir / "zero", "after")),
        "cold start": (cold, greedy(run_dir / "reasoning_rl", "before")),
        "cold start + RL": (warm, greedy(run_dir / "reasoning_rl", "after")),
    }
    gain, growth = paired_difference(base.scores, zero.scores), paired_difference(base.lengths, zero.lengths)
    lead = paired_difference(zero.scores, warm.scores)
    return Table(
        "a",
        "R1-Zero and cold start",
        "RL alone, from the base model, finds reasoning: accuracy and length rise together; a cold start before RL makes the "
        "reasoning readable and is no worse (R1, sections 2.2 and 2.3).",
        ("policy", "pass@1", "greedy", "tokens", "answers that reason", "words in the question's language"),
        [
            (name, share(a.accuracy), share(g.accuracy), number(a.length), plain(a.worked_share), share(a.language))
            for name, (a, g) in policies.items()
        ],
        f"{claim('RL alone raises accuracy', gain)}, {claim('and its answers grow', growth, tokens)}: of the base model's "
        f"answers those that reason are right in {share(base.accuracy_where(True))} and the others in "
        f"{share(base.accuracy_where(False))}, and RL took the share of those that reason from {plain(base.worked_share)} to "
        f"{plain(zero.worked_share)}. {claim('Cold start and RL end above R1-Zero after as many steps of RL', lead)}; of its "
        f"words {share(warm.language)} are in the question's language, of R1-Zero's {share(zero.language)}.",
    )


def student(run_dir: Path) -> Table:
    seeds = student_seeds(run_dir)
    by_rl = {seed: run_dir / f"student_rl{suffix}" for seed, suffix in seeds.items()}
    by_sft = {seed: run_dir / f"student_sft{suffix}_evaluation" for seed, suffix in seeds.items()}
    rl = {seed: Answers.of(directory, "after") for seed, directory in by_rl.items()}
    distilled = {seed: Answers.of(directory, "eval") for seed, directory in by_sft.items()}
    all_rl, all_distilled = together(rl.values()), together(distilled.values())
    base, teacher = Answers.of(run_dir / "student_rl", "before"), Answers.of(run_dir / "reasoning_rl", "after")
    rl_cost = rl_compute(run_dir / "student_rl")
    sft, sampling = sft_compute(run_dir / "student_sft"), teacher_compute(run_dir / "rejection")
    sft_cost = Compute(sft.flops + sampling.flops, sft.seconds + sampling.seconds)
    lead = paired_difference(all_rl.scores, all_distilled.scores)
    each = [paired_difference(rl[seed].scores, distilled[seed].scores) for seed in seeds]
    rows = [
        ("smaller base", base, greedy(run_dir / "student_rl", "before"), None),
        *((f"+ RL, seed {seed}", rl[seed], greedy(by_rl[seed], "after"), None) for seed in seeds),
        ("+ RL, all seeds", all_rl, together(greedy(path, "after") for path in by_rl.values()), rl_cost),
        *((f"+ distillation, seed {seed}", distilled[seed], greedy(by_sft[seed], "eval"), None) for seed in seeds),
        (
            "+ distillation, all seeds",
            all_distilled,
            together(greedy(path, "eval") for path in by_sft.values()),
            sft_cost,
        ),
        ("its teacher", teacher, greedy(run_dir / "reasoning_rl", "after"), None),
    ]
    return Table(
        "b",
        "Distillation and RL for a smaller model",
        "SFT of a smaller model on what a larger one has written beats RL of the smaller one (R1, section 4.1).",
        ("policy", "pass@1", "greedy", "tokens", "right where it reasons", "TFLOP", "seconds"),
        [
            (
                name,
                share(answers.accuracy),
                share(once.accuracy),
                number(answers.length),
                share(answers.accuracy_where(True)),
                f"{cost.flops / 1e12:.1f}" if cost else "",
                f"{cost.seconds:.0f}" if cost else "",
            )
            for name, answers, once, cost in rows
        ],
        f"{claim('Distillation beats RL', lead)}, by seed {', '.join(f'{100 * found.value:+.1f}' for found in each)}, with "
        f"{sft_cost.flops / rl_cost.flops:.2f} times the compute of RL and {sft_cost.seconds / rl_cost.seconds:.2f} times its "
        f"seconds, the teacher's sampling included, its training not. RL took the share of answers that reason from "
        f"{plain(base.worked_share)} to {plain(all_rl.worked_share)} and how often those are right from "
        f"{share(base.accuracy_where(True))} to {share(all_rl.accuracy_where(True))}; distillation took them to "
        f"{plain(all_distilled.worked_share)} and {share(all_distilled.accuracy_where(True))}.",
    )


def student_seeds(run_dir: Path) -> dict[int, str]:
    """The seeds with which the student was trained, and what the names of their stages have after them."""
    known = {0: "", **{seed: f"_seed_{seed}" for seed in range(1, 10)}}
    return {seed: suffix for seed, suffix in known.items() if (run_dir / f"student_rl{suffix}").exists()}


def together(found: Iterable[Answers]) -> Answers:
    """Answers of several policies to the same problems; intervals still draw problems, so they do not cover the seeds."""
    return Answers([row for answers in found for row in answers.rows])


def distilled_reasoning(run_dir: Path) -> Table:
    direct = Answers.of(run_dir / "sft_direct_evaluation", "eval")
    reasoned = Answers.of(run_dir / "all_scenarios", "before")
    final = Answers.of(run_dir / "all_scenarios", "after")
    sums = [
        Answers.of(run_dir / stage, moment, task="chain_sum")
        for stage, moment in (
            ("sft_direct_evaluation", "eval"),
            ("all_scenarios", "before"),
            ("all_scenarios", "after"),
        )
    ]
    gain = paired_difference(direct.scores, reasoned.scores)
    growth = paired_difference(direct.lengths, reasoned.lengths)
    longer = reasoned.length.value / direct.length.value
    names = ("SFT on direct answers", "SFT on distilled reasoning", "the same + RL for all scenarios")
    return Table(
        "c",
        "SFT with and without distilled reasoning",
        "Distilling from R1 makes answers of DeepSeek-V2.5 better and longer: MATH-500 74.6 to 83.2 at 769 and 1,510 tokens "
        "(DeepSeek-V3, section 5.4.1).",
        ("policy", "pass@1", "tokens", "answers that reason", "general problems, pass@1", "tokens"),
        [
            (
                name,
                share(answers.accuracy),
                number(answers.length),
                plain(answers.worked_share),
                share(general.accuracy),
                number(general.length),
            )
            for name, answers, general in zip(names, (direct, reasoned, final), sums, strict=True)
        ],
        f"{claim('Distilled reasoning raises accuracy', gain)}, {claim('and makes answers longer', growth, tokens)}, here "
        f"{longer:.2f} times as long, with the same number of steps and of tokens in each. "
        f"{WHY_REASONING if gain.low > 0 else ''}The general problems, which both saw with the same direct answers, differ by "
        f"{points(paired_difference(sums[0].scores, sums[1].scores))}.",
    )


def rejection(run_dir: Path) -> Table:
    found = funnel(run_dir / "rejection")
    return Table(
        "d",
        "Rejection sampling",
        "What is wrong, unreadable or in mixed languages is left out of what the RL policy samples (R1, section 2.3.3).",
        ("", "answers", "share of the sampled"),
        [(name, f"{count:,}", f"{count / found.sampled:.1%}") for name, count in found.stages],
        f"{found.kept / found.sampled:.1%} of the samples are kept, for {found.prompts_kept / found.prompts:.1%} of the "
        f"problems; {found.rejected / found.sampled:.1%} fail a check, so at this size the policy that samples leaves "
        f"{'little' if found.rejected / found.sampled < 0.1 else 'much'} to reject.",
    )


def language(run_dir: Path) -> Table:
    pairs = {
        "from the base": (Answers.of(run_dir / "zero", "after"), Answers.of(run_dir / "zero_language", "after")),
        "from the cold start": (
            Answers.of(run_dir / "reasoning_rl_no_language", "after"),
            Answers.of(run_dir / "reasoning_rl", "after"),
        ),
    }
    starts = {
        "from the base": Answers.of(run_dir / "zero", "before"),
        "from the cold start": Answers.of(run_dir / "reasoning_rl", "before"),
    }
    rows = []
    sentences = []
    for name, (off, on) in pairs.items():
        for label, answers in (("before RL", starts[name]), ("off", off), ("on", on)):
            rows.append(
                (
                    name,
                    label,
                    share(answers.language),
                    share(answers.accuracy),
                    number(answers.length),
                    plain(answers.worked_share),
                )
            )
        kept = paired_difference(*common(off, on))
        cost = paired_difference(off.scores, on.scores)
        sentences.append(
            f"{claim(f'RL {name}: the reward keeps the reasoning in the language of the question', kept)}, "
            f"{claim('at a cost in accuracy', negative(cost))}"
        )
    drift = paired_difference(*common(starts["from the cold start"], pairs["from the cold start"][0]))
    return Table(
        "e",
        "The language consistency reward",
        "Without it RL mixes languages in its reasoning; with it the reasoning stays in one, at a slight cost in accuracy "
        "(R1, section 2.3.2).",
        ("RL", "reward", "words in the question's language", "pass@1", "tokens", "answers that reason"),
        rows,
        f"{'. '.join(sentences)}. Without the reward RL changes the share that the cold start had by {points(drift)}"
        f"{drifted(drift)}.",
    )


def drifted(change: Estimate) -> str:
    """What the change of a language's share in RL without the reward says."""
    if change.high < 0:
        return ": mixing grows, as in the paper"
    if change.low > 0:
        return ": mixing does not grow here, unlike in the paper"
    return ": mixing neither grows nor shrinks, because a right count earns the same in either language"


def common(first: Answers, second: Answers) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Language shares of the problems that both answered with words."""
    both = sorted(set(first.language_shares) & set(second.language_shares))
    return {key: first.language_shares[key] for key in both}, {key: second.language_shares[key] for key in both}


def greedy(directory: Path, moment: str) -> Answers:
    return Answers.of(directory, moment, mode="greedy")


# --- words ------------------------------------------------------------------------------------------------------------


def verdict(difference: Estimate) -> str:
    """Whether a difference that is claimed to be positive is."""
    if difference.low > 0:
        return "holds"
    return "does not hold" if difference.high < 0 else f"cannot be told from {difference.n} problems"


def claim(text: str, difference: Estimate, unit: Callable[[Estimate], str] | None = None) -> str:
    """A claim, whether it holds, and by how much."""
    return f"{text}: {verdict(difference)} ({(unit or points)(difference)})"


def negative(difference: Estimate) -> Estimate:
    return Estimate(0.0 - difference.value, 0.0 - difference.high, 0.0 - difference.low, difference.n)


def share(found: Estimate | None) -> str:
    """ "97.5% [95.5, 98.6]"; a dash where there is nothing."""
    return f"{found.value:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found else "-"


def plain(value: float) -> str:
    return f"{value:.1%}"


def number(found: Estimate) -> str:
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def points(difference: Estimate) -> str:
    """ "+4.2 points [+1.0, +7.5]"."""
    return f"{100 * difference.value:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def tokens(difference: Estimate) -> str:
    return f"{difference.value:+.1f} tokens [{difference.low:+.1f}, {difference.high:+.1f}]"
