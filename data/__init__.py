"""Data: where records come from, how they become tokens, in which order they are used.

    tasks/      generated problems with worked solutions and scorers; training and evaluation never share a prompt
    files.py    files, folders and hub datasets -> raw rows, each with its place
    records.py  a row -> a record; the columns that have a meaning
    sources.py  tasks and files -> records, all at once or to be streamed
    streams.py  records without end: shuffled with a bounded buffer, blended, resumed at any record
    mixture.py  several sources as one, in proportion to their weights
    clean.py    exact duplicates; evaluation problems in training chats
    pairs.py    rows and problems -> preference pairs, for reward models; corruption.py makes the worse answers
    answers.py  problems -> finished chats, for SFT
    prompts.py  problems -> prompts, in order or shuffled without end with a cursor
    chat.py     records -> tokens and loss mask; the character tokenizer

A record in a file (JSONL or Parquet), one per row:

    SFT    {"messages": [{"role": "user", "content": "4-1="}, {"role": "assistant", "content": "<think>..."}]}
           {"prompt": "4-1=", "completion": "<think>..."}
           {"conversations": [{"from": "human", "value": "4-1="}, {"from": "gpt", "value": "<think>..."}]}
    pairs  {"prompt": "4-1=", "chosen": "3", "rejected": "4", "margin": 0.5}     or   whole chats in chosen and rejected
    RL     {"prompt": "4-1=", "answer": "3", ...}      or   {"prompt": [{"role": "user", ...}], "answer": "3", ...}

Columns with other names are metadata, which reward functions receive as keyword arguments. From the project, this
package imports only `posttrain.types`.
"""
