"""The other end of `rewards.math_answer`: a process that runs math-verify and can be killed.

math-verify's own time limits use SIGALRM, which works in main threads only, and some expressions (9^9^9^9) hold the
interpreter for as long as they like. So it runs here, without limits of its own, and whoever asks kills the process.

Run as a module, `python -m rewards.math_worker`. One JSON object per line on standard input: {"reference", "answer",
"timeout"}; one per line back: {"verdict": "right" | "wrong" | "bad_reference"}. The first line out is
{"verdict": "ready"}.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys

from rewards.math_equal import judge

MEMORY_LIMIT = 4 * 2**30  # bytes of address space, for expressions that grow without end
GRACE = 5  # seconds after which the process ends itself when nobody is left to kill it


def main() -> None:
    """Answer requests until standard input closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    judge("1", "1")  # imports and warms the parser
    print(json.dumps({"verdict": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(math.ceil(request["timeout"]) + GRACE)
        verdict = judge(request["reference"], request["answer"])
        signal.alarm(0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main()
