"""Data: where records come from, how they become tokens, in which order they are used.

    tasks/      generated problems with worked solutions and scorers; training and evaluation never share a prompt
    sources.py  tasks, files and hub datasets -> records; mixing, order, cursor
    chat.py     records -> tokens and loss mask; the character tokenizer

A record in a file (JSONL or Parquet), one per row:

    SFT    {"messages": [{"role": "user", "content": "4-1="}, {"role": "assistant", "content": "<think>..."}]}
    RL     {"prompt": "4-1=", "answer": "3", ...}      or   {"prompt": [{"role": "user", ...}], "answer": "3", ...}

Columns with other names are metadata, which reward functions receive as keyword arguments. From the project, this
package imports only `posttrain.types`.
"""
