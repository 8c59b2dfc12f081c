"""What an environment's messages add to a chat whose last turn was sampled: text, then tokens.

The tokens that a policy sampled are never written anew by the chat template: it might drop the reasoning of earlier turns, or
the tokenizer might cut the same text otherwise. Only what comes after a turn is rendered, as the difference between two
chats with a stand-in for the sampled text:

    before  <bos><|user|>Guess.<|assistant|>STAND-IN<eos>
    after   <bos><|user|>Guess.<|assistant|>STAND-IN<eos><|user|>higher<|assistant|>
    added                                           <eos><|user|>higher<|assistant|>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.rendering import render_chat
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_IN = "STANDSFORTHESAMPLEDTURN"


def added_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], messages: Sequence[Message]) -> str:
    """What follows a sampled turn: its end as the template writes it, the messages, and the header of the next turn.

    Args:
        tokenizer: its chat template is used.
        prompt: the chat before the turn.
        messages: that the environment adds, at least one.

    Raises:
        ValueError: the template cannot write the messages, or writes what came before them otherwise when they are there.
    """
    chat = [*prompt, {"role": "assistant", "content": STAND_IN}]
    before = render_chat(tokenizer, chat).text
    after = render_chat(tokenizer, [*chat, *messages], prompt=True).text
    if STAND_IN not in before or not after.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        raise ValueError(
            f"the chat template is not prefix-stable: with messages of role {messages[0]['role']} after it, a chat is written "
            f"otherwise from {before[max(0, same - 20) : same + 20]!r} on; several turns need a template that only appends"
        )
    return after[after.rindex(STAND_IN, 0, len(before)) + len(STAND_IN) :]


def added_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], messages: Sequence[Message], last_token: int
) -> tuple[int, ...]:
    """`added_text` as tokens, to be put after a turn that ends with `last_token`.

    The end-of-turn token that was sampled is not repeated. Raises what `added_text` raises.
    """
    text = added_text(tokenizer, prompt, messages)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[1:] if ids and ids[0] == last_token else ids


def require_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template with which several turns are not possible, whoever speaks to the policy: user or tool.

    Raises:
        ValueError: says what is wrong with it.
    """
    error: ValueError | None = None
    for role in ("user", "tool"):
        try:
            added_text(tokenizer, [{"role": "user", "content": "a"}], [{"role": role, "content": "b"}])
            return
        except ValueError as found:
            error = error or found
    assert error is not None
    raise error
