r"""Whole completions: where the final answer is looked for."""

from __future__ import annotations

from tests.math_cases import Case

COMPLETIONS = [
    Case("3", r"so it is \boxed{3}", True, "a box in plain text"),
    Case("3", r"so it is $\boxed{3}$.", True, "a box in dollars"),
    Case("3", r"so it is \boxed{4}", False, "a wrong box"),
    Case("3", r"\boxed{4}, no, wait: \boxed{3}", True, "the last box counts"),
    Case("4", r"\boxed{4}, no, wait: \boxed{3}", False, "the last box counts"),
    Case("3", r"\boxed{1}\boxed{2}\boxed{3}\boxed{4}", False, "all candidates boxed"),
    Case("3", "the answer is 3", False, "no box and no block"),
    Case("3", "3", False, "no box and no block"),
    Case("3", "", False, "empty"),
    Case("3", "   \n", False, "white space"),
    Case("3", r"\boxed{}", False, "an empty box"),
    Case("3", r"\boxed{ }", False, "an empty box"),
    Case("3", r"\boxed{3", False, "a box that never closes"),
    Case("3", r"\boxed 3", True, "a box without braces"),
    Case("3", r"\boxed{3} and more text", True, "text after the box"),
    Case(r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True, "nested braces"),
    Case(r"\frac{1}{2}", r"\boxed{\dfrac{\sqrt{4}}{2^{2}}}", True, "deeply nested braces"),
    Case(r"\{1,2\}", r"\boxed{\{1,2\}}", True, "escaped braces"),
    Case("3", r"<think>\boxed{3}</think> I do not know", False, "the box is in the reasoning only"),
    Case("3", r"<think>\boxed{3}</think> it is \boxed{4}", False, "the reference is in the reasoning only"),
    Case("3", r"<think>\boxed{4}</think> it is \boxed{3}", True, "the box after the reasoning counts"),
    Case("3", r"<think>it may be \boxed{3}", False, "the reasoning never ends"),
    Case("3", r"it may be \boxed{4}</think> it is \boxed{3}", True, "the prompt has opened the reasoning"),
    Case("3", "<think>3</think><answer>4</answer>", False, "the reference is in the reasoning only"),
    Case("3", "<think>4</think><answer>3</answer>", True, "the block counts"),
    Case("3", "<answer>\n3\n</answer>", True, "white space in the block"),
    Case("3", r"<answer>so \boxed{3}</answer>", True, "text before the box in the block"),
    Case("3", "<answer></answer>", False, "an empty block"),
    Case("3", "<answer>3</answer><answer>3</answer>", False, "two blocks"),
    Case("3", "<answer>3</answer><answer>4</answer>", False, "two blocks"),
    Case("3", "<answer>3</answer> or 4", False, "text after the block"),
    Case("3", r"<answer>4</answer> \boxed{3}", False, "a box outside the block"),
    Case("3", "<answer>3", False, "a block that never closes"),
    Case("3", "3</answer>", False, "a block that never opens"),
    Case("3", "<answer><answer>3</answer></answer>", False, "a block in a block"),
]
