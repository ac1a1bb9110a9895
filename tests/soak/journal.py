"""How each token of each request was computed, so that a request can be computed again alone in the same way.

What a row reads quantized is decided by its boundary (docs/DESIGN.md): a row of a prompt has that of its chunk's first
row, any later row its own. So the boundaries of all rows up to a token, and the tokens themselves, decide what the
token yields. They are noted here from what the scheduler hands to the worker. After a prefix hit the rows before it are
those of whoever wrote the pages. A hit may find pages of several writers; if these differ in boundaries, no single
schedule leads to the same content, and the request is not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Edge = tuple[int, int]  # first row of a chunk, or from which on rows have another boundary; its boundary


@dataclass
class Run:
    """A request from its start, or restart after a preemption, to its end or the next preemption.

    edges: None if pages of different histories were hit. first_output: output tokens that it had when it began.
    """

    edges: list[Edge] | None
    first_output: int
    hit: int
    chunks: int = 0


def changes(edges: Sequence[Edge], stop: int) -> list[Edge]:
    """The edges below `stop` at which the boundary changes: what makes a difference."""
    below = [(-1, -1)] + [edge for edge in edges if edge[0] < stop]
    return [edge for before, edge in pairwise(below) if edge[1] != before[1]]


@dataclass
class Journal:
    """Wraps a scheduler's `schedule`.

    runs: of each request that was scheduled, by its internal id. forced: if set, rows at which the chunks of the only
    request must begin.
    """

    scheduler: Any
    runs: dict[str, list[Run]] = field(default_factory=dict)
    forced: Sequence[int] = ()
    preemptions: int = 0
    hits: int = 0
    mixed: int = 0

    def __post_init__(self) -> None:
        self._stock = self.scheduler.schedule
        self._budget = self.scheduler.max_num_scheduled_tokens
        self.scheduler.schedule = self._schedule
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self._blocks = [(manager.block_size, manager.req_to_blocks) for manager in managers]
        spec = next(m.kv_cache_spec for m in managers if hasattr(m.kv_cache_spec, "residual_length"))
        self._window, self._group = spec.residual_length, spec.group_size
        self._writers: dict[int, Run] = {}  # block id -> who wrote it last

    def boundary(self, num_tokens: int) -> int:
        return max(0, num_tokens - self._window) // self._group * self._group

    def _schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.scheduler.max_num_scheduled_tokens = self._next_budget()
        output = self._stock(*args, **kwargs)
        cached = output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        begins = {*starts, *cached.resumed_req_ids}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.preemptions += len(output.preempted_req_ids or ())
        # In the order in which pages were handed out: a hit may be on pages of this very step.
        for name, count in output.num_scheduled_tokens.items():
            if name in begins:
                self._begin(name, starts[name])
            self._note(name, starts[name], count)
        return output

    def _next_budget(self) -> int:
        scheduler = self.scheduler
        if not self.forced or not (scheduler.running or scheduler.waiting):
            return self._budget
        request = scheduler.running[0] if scheduler.running else scheduler.waiting.peek_request()
        computed = request.num_computed_tokens
        return min([self._budget, *(edge - computed for edge in self.forced if edge > computed)])

    def _begin(self, name: str, hit: int) -> None:
        request = self.scheduler.requests[name]
        run = Run([] if hit == 0 else self._inherited(name, hit), len(request.output_token_ids), hit)
        self.hits += hit > 0
        self.mixed += run.edges is None
        self.runs.setdefault(name, []).append(run)

    def _inherited(self, name: str, hit: int) -> list[Edge] | None:
        last: Run | None = None
        reach: dict[int, tuple[int, Run]] = {}  # id of a writer -> end of what it wrote of the hit
        for size, blocks in self._blocks:
            for i, block in enumerate(blocks[name][: hit // size]):
                if block.is_null:
                    continue
                last = self._writers[block.block_id]
                reach[id(last)] = (max((i + 1) * size, reach.get(id(last), (0, last))[0]), last)
        assert last is not None
        if last.edges is None:
            return None
        for end, writer in reach.values():
            if writer.edges is None or changes(writer.edges, end) != changes(last.edges, end):
                return None
        return [edge for edge in last.edges if edge[0] < hit]

    def _note(self, name: str, start: int, count: int) -> None:
        run, stop = self.runs[name][-1], start + count
        prompt = self.scheduler.requests[name].num_prompt_tokens
        run.chunks += start < prompt
        if run.edges is not None:
            if start < prompt:
                run.edges.append((start, self.boundary(start + 1)))
            for row in range(max(start, prompt), stop):
                boundary = self.boundary(row + 1)
                if not run.edges or run.edges[-1][1] != boundary:
                    run.edges.append((row, boundary))
        for size, blocks in self._blocks:
            for block in blocks[name][start // size : -(-stop // size)]:
                if not block.is_null:
                    self._writers[block.block_id] = run
