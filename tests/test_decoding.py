"""Text of completions, against hand-written expectations and vLLM's own."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.decoding import completion_text


def of_words() -> PreTrainedTokenizerFast:
    """As sentencepiece: a mark stands for the blank before a word, and the first one of a text is dropped."""
    words = ["<unk>", "▁a", "▁bee", "s", "▁flies", "<end>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def of_bytes() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_blank_before_the_first_word_stays() -> None:
    assert completion_text(of_words(), [1, 2], [4], ended=False) == " flies"
    assert completion_text(of_words(), [1, 2], [3, 4], ended=False) == "s flies"


def test_what_ends_a_completion_is_no_text() -> None:
    assert completion_text(of_words(), [1], [2, 3, 5], ended=True) == " bees"
    assert completion_text(of_words(), [1], [2, 3, 4], ended=True) == " bees"  # an end that is not called special


def test_characters_of_several_tokens() -> None:
    tokenizer = of_bytes()
    ids = tokenizer.encode("é 漢字 x")
    assert completion_text(tokenizer, [], ids, ended=False) == "é 漢字 x"
    cut = tokenizer.encode("x 漢")[:-1]
    assert completion_text(tokenizer, [], cut, ended=False) == "x "


@pytest.mark.parametrize("tokenizer", [of_words(), of_bytes()])
def test_any_tokens_give_the_text_that_a_stream_of_vllm_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    rng = random.Random(0)
    for number in range(200):
        prompt, completion = ([rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))] for _ in range(2))
        request = EngineCoreRequest(
            request_id=str(number), prompt_token_ids=prompt, sampling_params=SamplingParams(), mm_features=None,
            pooling_params=None, arrival_time=0, lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        theirs = FastIncrementalDetokenizer(tokenizer, request)
        theirs.update(completion, stop_terminated=False)
        assert completion_text(tokenizer, prompt, completion, ended=False) == theirs.output_text
