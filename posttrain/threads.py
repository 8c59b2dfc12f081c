"""How the OpenMP threads of a process behave, which must be said before torch is imported in it."""

from __future__ import annotations

# Idle threads spin for a moment and then sleep. Sleeping at once would make two threads slower than one for the small
# kernels of a decoding step (measured: 2.1 times); spinning for long, libgomp's default, takes the cores from others, and
# SFT of a tiny model beside one busy program almost stands still (below 1,000 tokens/s; 2,100 with these, 12,000 alone).
SHORT_SPIN = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",  # some tens of microseconds; for libgomp this goes before the policy
    "KMP_BLOCKTIME": "0",
}


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment variables for that many threads, beside other processes on the same cores."""
    return {"OMP_NUM_THREADS": str(num_threads), **SHORT_SPIN}
