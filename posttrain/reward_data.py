"""Preference pairs as token ids: read, held out, encoded, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.answers import fraction_of
from data.corruption import CORRUPTIONS
from data.mixture import blend
from data.pairs import Pair, file_pairs, task_pairs
from posttrain.errors import RunStopped
from posttrain.records import source_split, source_weights, task_split
from posttrain.reward_model_recipe import PairDatasetSection, RewardModelRecipe
from posttrain.types import Message
from rewards.learned import encode

PROBED_PAIRS = 256  # whose text is searched in what the chat template writes


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair and its two chats as token ids."""

    pair: Pair
    chosen_ids: list[int]
    rejected_ids: list[int]

    def row(self) -> dict[str, Any]:
        """As TRL's collator takes it. There is always a margin: TRL fails on a column with None in it."""
        return {"chosen_ids": self.chosen_ids, "rejected_ids": self.rejected_ids, "margin": self.pair.margin}


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What became of the pairs."""

    pairs: int
    kept: int
    too_long: int  # left out because one of the chats is
    same_tokens: int  # left out because the chat template writes both chats alike
    trained_on: int = 0  # held-out pairs left out because their prompt is trained on

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PairSets:
    """What is trained on and what is measured on."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    counts: dict[str, PairCounts]  # "train", "held_out"


def load_pairs(recipe: RewardModelRecipe, tokenizer: Any) -> PairSets:
    """All pairs of a recipe, encoded. No held-out prompt is trained on.

    Raises:
        RunStopped: nothing is left to train on or to measure on, or the chat template hides what the assistant wrote.
        ValueError: a row that is no pair.
    """
    train = section_pairs(recipe.datasets, recipe.seed, "train")
    if recipe.validation.datasets is not None:
        held_out = section_pairs(recipe.validation.datasets, recipe.seed, "eval")
    else:
        assert recipe.validation.fraction is not None  # the recipe has one of the two
        train, held_out = split_by_prompt(train, recipe.validation.fraction, recipe.seed)
    trained = {prompt_key(pair) for pair in train}
    unseen = [pair for pair in held_out if prompt_key(pair) not in trained]
    sets: dict[str, tuple[list[EncodedPair], PairCounts]] = {}
    for name, pairs, left_out in (("train", train, 0), ("held_out", unseen, len(held_out) - len(unseen))):
        require_visible_answers(tokenizer, pairs)
        sets[name] = encode_pairs(tokenizer, pairs, recipe.training.max_length, trained_on=left_out)
        require_pairs(name, *sets[name])
    return PairSets(sets["train"][0], sets["held_out"][0], {name: counts for name, (_, counts) in sets.items()})


def section_pairs(sections: Sequence[PairDatasetSection], seed: int, split: Literal["train", "eval"]) -> list[Pair]:
    """Pairs of all sources, mixed like records (see `posttrain.records.load_records`)."""
    sources = [_pairs(section, source_split(section, split), seed) for section in sections]
    return list(blend(sources, source_weights(sections, [len(pairs) for pairs in sources]), seed))


def _pairs(section: PairDatasetSection, split: str, seed: int) -> list[Pair]:
    if section.task is None:
        assert section.path is not None  # the recipe has one of the two
        wanted = section.split or split
        return file_pairs(section.path, wanted, section.columns, section.name, section.size, section.adapter)
    assert section.size is not None
    return task_pairs(
        section.task,
        section.levels,
        task_split(section, split),
        section.size,
        seed,
        kinds=section.kinds or CORRUPTIONS,
        worked_fraction=section.worked_fraction,
    )


def prompt_key(pair: Pair) -> str:
    """The same for pairs with the same prompt."""
    return json.dumps([dict(message) for message in pair.chosen[:-1]], sort_keys=True)


def split_by_prompt(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: about `fraction` of the prompts are held out, each with all its pairs.

    A hash of the prompt and the seed decides, so a prompt stays on its side whatever is added or reordered.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[fraction_of(f"held out/{seed}/{prompt_key(pair)}") < fraction].append(pair)
    return sides


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], max_length: int, *, trained_on: int = 0
) -> tuple[list[EncodedPair], PairCounts]:
    """Token ids of both chats; a pair with a chat longer than `max_length` is left out."""
    kept: list[EncodedPair] = []
    too_long = same = 0
    for pair in pairs:
        encoded = EncodedPair(pair, encode(tokenizer, pair.chosen), encode(tokenizer, pair.rejected))
        if max(len(encoded.chosen_ids), len(encoded.rejected_ids)) > max_length:
            too_long += 1
        elif encoded.chosen_ids == encoded.rejected_ids:
            same += 1
        else:
            kept.append(encoded)
    return kept, PairCounts(len(pairs) + trained_on, len(kept), too_long, same, trained_on)


def require_pairs(name: str, kept: Sequence[EncodedPair], counts: PairCounts) -> None:
    """Refuse to go on with nothing.

    Raises:
        RunStopped: no pair is left.
    """
    if not kept:
        raise RunStopped(
            f"no {name.replace('_', '-')} pair is left of {counts.pairs}: {counts.too_long} are longer than "
            f"training.max_length, {counts.same_tokens} have two answers of the same tokens, {counts.trained_on} have a "
            f"prompt that is trained on; correct datasets or validation, or raise training.max_length"
        )


def require_visible_answers(tokenizer: Any, pairs: Sequence[Pair]) -> None:
    """Refuse a chat template that cuts the assistant's text, as DeepSeek's own cuts it at </think>.

    Raises:
        RunStopped: a text is not in what the template writes.
    """
    for pair in pairs[:PROBED_PAIRS]:
        for chat in (pair.chosen, pair.rejected):
            written = tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False)
            if _text(chat[-1]) not in written:
                raise RunStopped(
                    f"{pair.label}: the chat template does not write all that the assistant says, so the reward model "
                    f"would not see it; set training.chat_template, e.g. to deepseek_v3"
                )


def _text(message: Message) -> str:
    return str(message["content"]).strip()


def set_pad_token(tokenizer: Any, pad_token: str | None) -> None:
    """Make sure of a padding token of its own: the score is read at the last token that is none.

    Raises:
        RunStopped: there is none, it is not in the vocabulary, or it ends the turns.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise RunStopped(f"training.pad_token: {pad_token!r} is not in the vocabulary; name a token that is")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise RunStopped(
            f"the padding token is {tokenizer.pad_token!r} and the end of a turn {tokenizer.eos_token!r}: the score is read "
            f"at the last token that is no padding, so they must differ; set training.pad_token to an unused token of the "
            f"vocabulary"
        )
