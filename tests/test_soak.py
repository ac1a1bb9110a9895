"""A short soak (tests/soak/soak.py): random requests and engines, a tiny pool, a sample replayed alone."""

from __future__ import annotations

import math

from soak.soak import soak


def test_a_hundred_and_fifty_requests():
    # Two engines for short prompts, one in chunks of 256 tokens, one in one go; one with asynchronous scheduling.
    run = soak(requests=150, seconds=math.inf, per_engine=75, seed=427)
    assert not run.faults, "\n".join(run.faults)
    assert run.counts["requests"] == 150
    assert {"greedy", "seeded", "prefix hit", "chunked", "preempted", "n > 1", "prompt logprobs"} <= run.replays.keys()
