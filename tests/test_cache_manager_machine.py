"""The full-precision group's manager inside vLLM's KVCacheManager, against a model of memory: any order of operations.

The model knows what each page holds, token by token: a token is the number of its prefix, so that equal content means
equal requests up to there. A step writes and reads pages the way the kernels do (docs/DESIGN.md, 'What attends to
what'), through block tables that are kept as a worker keeps them: new block ids are appended, nothing is taken back.
What the manager releases too early, hands out twice, leaves out or caches unwritten is read as something else.

Steps are processed one at a time, or with one more in flight, as vLLM's asynchronous scheduler does: it takes draft
tokens as accepted until it learns better.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_cache_manager import MAX_MODEL_LEN, held, make_manager, new_request
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id

NOTHING, REJECTED = -1, -2  # what a page holds instead of a token
LONGEST = 800  # tokens of a request; it is finished then
CHUNKS = (1, 2, 7, 31, 32, 33, 100, 200, 400, LONGEST)

OPTIONS = (
    {},
    {"sink_tokens": 4},
    {"residual_length": 0},
    {"residual_length": 1, "sink_tokens": 1},
    {"residual_length": 40, "sink_tokens": 13},
    {"group_size": 64, "sink_tokens": 30, "residual_length": 50},
    {"page_tokens": 96, "sink_tokens": 4},
)


@dataclass
class Run:
    """A request from when it gets pages until it loses them, as the worker sees it."""

    tables: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    position: int = 0  # tokens computed
    live: bool = True


@dataclass
class Tracked:
    request: Any
    prefixes: list[int]  # of each token: the number of the prefix that ends there
    run: Run | None = None
    placeholders: int = 0  # sampled tokens, and accepted draft tokens, that are still to come
    num_hashed: int = 0


@dataclass
class Step:
    """What the worker is told about one request."""

    tracked: Tracked
    run: Run
    new_blocks: tuple[list[int], list[int]]
    fresh: set[int]
    num_tokens: int
    accepted: int
    start: int | None = None  # of a run's first step
    loaded: range = range(0)  # tokens that a connector brings


class Machine(RuleBasedStateMachine):
    @initialize(
        options=st.sampled_from(OPTIONS),
        caching=st.sampled_from((True, True, True, False)),
        spare=st.sampled_from((0, 5, 40, 150)),
        drafts=st.sampled_from((0, 0, 1, 3, 7)),
        depth=st.sampled_from((1, 2)),
        eagle=st.booleans(),
        interval=st.sampled_from((0, 0, 1, 3, None)),
    )
    def build(self, options, caching, spare, drafts, depth, eagle, interval):
        self.fmt, spec, manager, self.hasher, step = make_manager(caching=caching, **options)
        spec = replace(spec, num_speculative_tokens=drafts)
        quantized, full = manager.kv_cache_config.kv_cache_groups
        smallest = -(-MAX_MODEL_LEN // self.fmt.page_tokens) + spec.peak_blocks(MAX_MODEL_LEN) + 1
        self.eagle = eagle and drafts > 0
        self.manager = KVCacheManager(
            replace(
                manager.kv_cache_config,
                num_blocks=smallest + spare,
                kv_cache_groups=[quantized, replace(full, kv_cache_spec=spec)],
                prefix_cache_retention_interval=None if interval is None else interval * step,
            ),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=step,
            hash_block_size=manager.block_pool.hash_block_size,
            max_in_flight_tokens=512,
            enable_caching=caching,
            use_eagle=self.eagle,
        )
        self.spec, self.step, self.drafts, self.depth = spec, step, drafts, depth
        self.pool = self.manager.block_pool
        self.total = self.pool.get_num_free_blocks()
        sizes = self.fmt.page_tokens, self.fmt.full_page_tokens
        self.pages = tuple(np.full((smallest + spare, size), NOTHING) for size in sizes)
        self.requests: dict[str, Tracked] = {}
        self.running: list[Tracked] = []
        self.waiting: list[Tracked] = []
        self.flights: deque[list[Step]] = deque()
        self.prefix_of: dict[tuple[int, int], int] = {}  # (prefix, next token) -> prefix
        self.parent: list[int] = []
        self.prefix_of_hash: dict[bytes, int] = {}
        self.texts: list[list[int]] = []
        self.num_tokens = 0

    # -- the model --------------------------------------------------------------------------------------------------

    def extend(self, prefixes: list[int], token_ids: list[int]) -> None:
        for token in token_ids:
            key = (prefixes[-1] if prefixes else NOTHING, token)
            if key not in self.prefix_of:
                self.prefix_of[key] = len(self.parent)
                self.parent.append(key[0])
            prefixes.append(self.prefix_of[key])

    def learn_hashes(self, tracked: Tracked) -> None:
        hashes, size = tracked.request.block_hashes, self.pool.hash_block_size
        for i in range(tracked.num_hashed, len(hashes)):
            self.prefix_of_hash[hashes[i]] = tracked.prefixes[(i + 1) * size - 1]
        tracked.num_hashed = len(hashes)

    def boundary(self, num_tokens: int) -> int:
        group, window = self.fmt.group_size, self.fmt.residual_length
        return (num_tokens - window) // group * group if num_tokens > window else 0

    def content(self, group: int, table: list[int], start: int, stop: int) -> np.ndarray:
        size = self.pages[group].shape[1]
        first = start // size
        rows = self.pages[group][table[first : -(-stop // size)]].reshape(-1)
        return rows[start - first * size : stop - first * size]

    def check_content(self, group: int, table: list[int], expected: np.ndarray, start: int, stop: int) -> None:
        found = self.content(group, table, start, stop)
        assert np.array_equal(found, expected[start:stop]), (
            f"{('quantized', 'full-precision')[group]} tokens {start} to {stop}: {found}, not {expected[start:stop]}"
        )

    def write(self, group: int, table: list[int], position: int, value: int, written: set) -> None:
        size = self.pages[group].shape[1]
        block = table[position // size] if position // size < len(table) else 0
        if block == 0:
            assert group == 1, "a quantized page is missing"
            return
        assert (block, position % size) not in written, "two requests write to one place"
        written.add((block, position % size))
        self.pages[1 - group][block] = NOTHING  # the same bytes
        self.pages[group][block, position % size] = value

    def store(self, run: Run, values: np.ndarray, start: int, stop: int, written: set) -> None:
        """As reference.store: full-precision tokens, and the groups that they complete."""
        quantized, full = run.tables
        size = self.fmt.group_size
        for position in range(start, stop):
            self.write(1, full, position, values[position], written)
            if (position + 1) % size:
                continue
            first = position + 1 - size
            if first < start:  # the group's earlier tokens come from pages
                self.check_content(1, full, values, first, start)
            for member in range(first, position + 1):
                self.write(0, quantized, member, values[member], written)

    def read(self, step: Step, values: np.ndarray, start: int, stop: int) -> None:
        """As prefill and decode."""
        quantized, full = step.run.tables
        first = min(self.boundary(start + 1), start)
        in_prompt = stop <= step.tracked.request.num_prompt_tokens
        self.check_content(0, quantized, values, 0, first if in_prompt else max(first, self.boundary(stop)))
        # A few rows may run as a decode, which reads its own tokens from pages too.
        own = stop - start <= 1 + self.drafts
        self.check_content(1, full, values, self.boundary(start + 1) if own else first, stop if own else start)
        self.check_content(1, full, values, 0, min(self.fmt.sink_tokens, stop if own else start))

    def execute(self, batch: list[Step]) -> None:
        """A step on the worker, and the scheduler's update from what it returns."""
        fresh = [block for step in batch for block in step.fresh]
        for pages in self.pages:
            pages[fresh] = NOTHING
        written: set[tuple[int, int]] = set()
        computed = []
        for step in batch:
            run, tracked = step.run, step.tracked
            for table, new in zip(run.tables, step.new_blocks, strict=True):
                table.extend(new)
            if step.start is not None:
                for position in step.loaded:
                    for group, table in enumerate(run.tables):
                        self.write(group, table, position, tracked.prefixes[position], written)
                run.position = step.start
            start, stop = run.position, run.position + step.num_tokens
            known = len(tracked.prefixes)
            sampled: list[int] = []
            if stop >= known:
                # Few different tokens, so that requests may go on alike.
                sampled = [1_000_000 + (known + i) % 3 for i in range(min(step.accepted, stop - known) + 1)]
            prefixes = [*tracked.prefixes]
            self.extend(prefixes, sampled)
            lookahead = self.drafts if self.eagle else 0
            values = np.full(max(stop + lookahead, len(prefixes)), REJECTED)
            values[: len(prefixes)] = prefixes
            values[known + len(sampled[1:]) :] = REJECTED
            end = min(stop + lookahead, MAX_MODEL_LEN, len(run.tables[0]) * self.fmt.page_tokens)
            self.store(run, values, start, end, written)
            computed.append((step, values, start, stop, sampled))
        for step, values, start, stop, _ in computed:
            self.read(step, values, start, stop)
        for step, _, start, stop, sampled in computed:
            tracked, run, request = step.tracked, step.run, step.tracked.request
            known = len(tracked.prefixes)
            run.position = known + len(sampled) - 1 if sampled else stop
            if request.request_id not in self.requests:
                continue
            request.num_in_flight_tokens -= step.num_tokens
            if run.live:
                request.num_computed_tokens -= start + step.num_tokens - run.position
            if sampled:
                if run.live:
                    tracked.placeholders -= stop - known + 1
                request.append_output_token_ids(sampled)
                self.extend(tracked.prefixes, sampled)
                self.learn_hashes(tracked)
                if run.live and self.depth > 1:
                    self.manager.cache_blocks(request, request.num_computed_tokens - tracked.placeholders)
            if run.live and not request.num_in_flight_tokens:
                assert request.num_computed_tokens == run.position

    # -- the scheduler ----------------------------------------------------------------------------------------------

    def give_up(self, tracked: Tracked) -> None:
        """Free its blocks, as preemption and the end of a request do."""
        self.manager.free(tracked.request)
        tracked.request.num_computed_tokens = tracked.placeholders = 0
        if tracked.run:
            tracked.run.live = False
        tracked.run = None

    def preempt(self, tracked: Tracked) -> None:
        self.running.remove(tracked)
        self.waiting.insert(0, tracked)
        self.give_up(tracked)

    def schedule_running(self, tracked: Tracked, size: int, accepted: int, batch: list[Step]) -> bool:
        """Returns whether it is still running; others may be preempted for it."""
        request, run = tracked.request, tracked.run
        pending = request.num_tokens + tracked.placeholders - request.num_computed_tokens
        if request.num_computed_tokens + 2 * (2 + self.drafts) > LONGEST:
            return True  # abort is what ends it
        if pending <= 0:
            return True  # what it samples is not known yet
        count = pending if pending > 1 else 1 + self.drafts
        count = min(count, size) if pending > 1 else count
        while True:
            new = self.manager.allocate_slots(request, count, num_lookahead_tokens=self.drafts if self.eagle else 0)
            if new is not None:
                break
            assert len(self.running) > 1 or self.flights, "a request that is alone does not fit"
            victim = self.running[-1]
            self.preempt(victim)
            if victim is tracked:
                return False
        ids = tuple(map(list, new.get_block_ids()))
        self.submit(Step(tracked, run, ids, {b for group in ids for b in group} - {0}, count, accepted), batch)
        return True

    def start(self, tracked: Tracked, size: int, accepted: int, loaded: int, batch: list[Step]) -> bool:
        request = tracked.request
        hits, start, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        assert start % self.step == 0 and start < request.num_tokens
        hit_ids = {block.block_id for group in hits.blocks for block in group}
        external = min(loaded * self.step, (request.num_tokens - 1 - start) // self.step * self.step)
        count = min(size, request.num_tokens - start - external)
        new = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=start,
            new_computed_blocks=hits,
            num_lookahead_tokens=self.drafts if self.eagle else 0,
            num_external_computed_tokens=external,
            full_sequence_must_fit=True,
        )
        if new is None:
            assert self.running or self.flights, "a request that is alone is not admitted"
            return False
        ids = tuple(map(list, self.manager.get_block_ids(request.request_id)))
        request.num_computed_tokens = start + external
        tracked.run = Run()
        self.waiting.remove(tracked)
        self.running.append(tracked)
        fresh = {block for group in ids for block in group} - {0} - hit_ids
        step = Step(tracked, tracked.run, ids, fresh, count, accepted, start + external, range(start, start + external))
        self.submit(step, batch)
        return True

    def submit(self, step: Step, batch: list[Step]) -> None:
        request = step.tracked.request
        known = request.num_tokens + step.tracked.placeholders
        request.num_computed_tokens += step.num_tokens
        request.num_in_flight_tokens += step.num_tokens
        if request.num_computed_tokens >= known:
            step.tracked.placeholders += request.num_computed_tokens - known + 1
        batch.append(step)

    # -- rules ------------------------------------------------------------------------------------------------------

    @rule(
        share=st.integers(0, 3),
        cut=st.integers(0, 500),
        extra=st.sampled_from((1, 2, 30, 97, 200, 330)),
    )
    def add(self, share, cut, extra):
        """A new request; its prompt begins like that of an earlier one, whose answer it may contain."""
        if len(self.requests) >= 6:
            return
        shared = self.texts[-share][:cut] if 0 < share <= len(self.texts) else []
        ids = shared + [self.num_tokens + i for i in range(extra)]
        self.num_tokens += extra
        request = new_request(f"r{self.num_tokens}", ids, self.hasher)
        tracked = Tracked(request, [])
        self.extend(tracked.prefixes, ids)
        self.learn_hashes(tracked)
        self.requests[request.request_id] = tracked
        self.waiting.append(tracked)
        self.texts.append(ids)

    @precondition(lambda self: self.requests)
    @rule(
        sizes=st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=6),
        accepted=st.integers(0, 7),
        loaded=st.sampled_from((0, 0, 0, 1, 3)),
        repeat=st.sampled_from((1, 1, 1, 4, 40)),
    )
    def steps(self, sizes, accepted, loaded, repeat):
        """One step of the engine, or several alike: requests that run in their order, then those that wait."""
        for turn in range(repeat):
            batch: list[Step] = []
            pressed = False
            for i, tracked in enumerate([*self.running]):
                if tracked in self.running:
                    size = sizes[i % len(sizes)]
                    pressed |= not self.schedule_running(tracked, size, (accepted + turn) % 8, batch)
                    pressed |= any(t not in self.running for t in [*self.running, tracked])
            scheduled = {id(step.tracked) for step in batch}
            for i, tracked in enumerate([*self.waiting]):
                if pressed or tracked.request.num_in_flight_tokens or id(tracked) in scheduled:
                    break
                if not self.start(tracked, sizes[-1 - i % len(sizes)], accepted, loaded, batch):
                    break
            if batch:
                self.flights.append(batch)
            while len(self.flights) >= self.depth:
                self.execute(self.flights.popleft())

    @precondition(lambda self: self.flights)
    @rule()
    def wait(self):
        while self.flights:
            self.execute(self.flights.popleft())

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 5))
    def preempt_one(self, which):
        self.preempt(self.running[which % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 5))
    def end(self, which):
        """Finished or aborted, also while a step of it is in flight."""
        tracked = list(self.requests.values())[which % len(self.requests)]
        self.texts.append(list(tracked.request.all_token_ids))
        (self.running if tracked in self.running else self.waiting).remove(tracked)
        del self.requests[tracked.request.request_id]
        self.give_up(tracked)

    @precondition(lambda self: not self.running and len(self.pool.cached_block_hash_to_block))
    @rule()
    def reset_prefix_cache(self):
        assert self.manager.reset_prefix_cache()

    @precondition(lambda self: len(self.pool.cached_block_hash_to_block))
    @rule(which=st.integers(0, 200))
    def evict(self, which):
        """As a connector does with pages whose load failed."""
        self.manager.evict_blocks({which % self.pool.num_gpu_blocks})

    # -- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def every_page_is_held_or_free(self):
        owners: Counter[int] = Counter()
        places: dict[int, tuple[int, int, int | None]] = {}
        for tracked in self.running:
            for group, blocks in enumerate(held(self.manager, tracked.request)):
                size = self.pages[group].shape[1]
                for i, block in enumerate(blocks):
                    if block.is_null:
                        assert group == 1, "a quantized page is missing"
                        continue
                    owners[block.block_id] += 1
                    end = (i + 1) * size - 1
                    place = (group, i, tracked.prefixes[end] if end < len(tracked.prefixes) else None)
                    other = places.setdefault(block.block_id, place)
                    assert owners[block.block_id] == 1 or (place == other and place[2] is not None), (
                        "one page for different tokens"
                    )
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == owners[block.block_id]
        assert self.pool.get_num_free_blocks() == self.total - len(owners)

    @invariant()
    def what_will_be_read_is_there(self):
        group_size = self.fmt.group_size
        for tracked in self.running:
            run = tracked.run
            position = run.position
            if not run.tables[0]:
                continue  # its first step is in flight
            values = np.array(tracked.prefixes)
            self.check_content(0, run.tables[0], values, 0, position // group_size * group_size)
            first = min(self.boundary(position + 1), position // group_size * group_size)
            sinks = min(self.fmt.sink_tokens, position)
            self.check_content(1, run.tables[1], values, first, position)
            self.check_content(1, run.tables[1], values, 0, sinks)
            blocks = [block.block_id for block in held(self.manager, tracked.request)[1]]
            for place in {p // self.fmt.full_page_tokens for p in (*range(sinks), *range(first, position))}:
                assert blocks[place] == run.tables[1][place], "a page that will be read was released"

    @invariant()
    def cached_pages_hold_what_their_hash_says(self):
        unwritten = set()
        for step in (step for batch in self.flights for step in batch):
            for pages, table, new in zip(self.pages, step.run.tables, step.new_blocks, strict=True):
                unwritten.update(new, table[step.run.position // pages.shape[1] :])
        for block in self.pool.blocks[1:]:
            if block.block_hash is None or block.block_id in unwritten:
                continue
            group = get_group_id(block.block_hash)
            if block.block_hash_num_tokens % self.pages[group].shape[1]:
                continue  # the end of a prompt inside a page, which vLLM notes and hits only where Mamba layers are
            found = self.pages[group][block.block_id]
            last = self.prefix_of_hash[get_block_hash(block.block_hash)]
            assert found[-1] == last and all(self.parent[b] == a for a, b in pairwise(found)), (
                f"a cached {('quantized', 'full-precision')[group]} page holds {found}, not the tokens up to {last}"
            )

    @invariant()
    def nothing_is_kept_of_requests_that_are_gone(self):
        full = self.manager.coordinator.single_type_managers[1]
        running = {tracked.request.request_id for tracked in self.running}
        for kept in (full.req_to_blocks, full.num_cached_block, full._step_start, full._released):
            assert kept.keys() <= running

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        self.wait()
        for tracked in [*self.running]:
            self.end(list(self.requests).index(tracked.request.request_id))
        assert self.pool.get_num_free_blocks() == self.total
        assert self.manager.reset_prefix_cache()


TestCacheManager = Machine.TestCase
TestCacheManager.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
