"""KiviCache under torch.compile: one graph for all steps of one token, and no tensor that moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_models import FAMILIES, save
from test_transformers import DEVICE, GREEDY, SMALL, ids, load, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, PreTrainedModel

from vllm_kivi.transformers import KiviCache

PROMPT, LENGTH = 150, 240
STEPS = [PROMPT] + [1] * (LENGTH - PROMPT)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module", params=["llama3", "gemma3"])
def loaded(request, tmp_path_factory) -> PreTrainedModel:
    family = FAMILIES[request.param]
    path = save(tmp_path_factory.mktemp(request.param), family.config, family.settings)
    return load(path)


@pytest.fixture
def model(loaded) -> PreTrainedModel:
    loaded.set_attn_implementation("kivi")
    return loaded


class Compiled:
    """A model whose steps of one token are compiled, as generate() does it."""

    def __init__(self, model: PreTrainedModel, backend: str, fullgraph: bool = True) -> None:
        self.model, self.counter = model, CompileCounterWithBackend(backend)
        self.step = torch.compile(model.forward, backend=self.counter, fullgraph=fullgraph)

    def __call__(self, said: Tensor, **arguments: Any) -> Any:
        return (self.step if said.shape[1] == 1 else self.model)(said, **arguments)


def padded(rows: int) -> Tensor:
    mask = torch.ones(rows, LENGTH, dtype=torch.long, device=DEVICE)
    mask[0, :60] = 0
    mask[1, -60:-30] = 0  # this row rests for a while
    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_one_graph_serves_all_steps(model, masked):
    """Also of a second cache; what comes out is equal to the bit to what is not compiled, and to a cache that grows.

    But on a GPU Triton divides the work by the width of block tables, so that a cache that grows adds up otherwise.
    """
    said, mask = ids(LENGTH, 1, 2), padded(2) if masked else None
    eager = KiviCache(model.config, max_cache_len=LENGTH if DEVICE == "cuda" else 0, **SMALL)
    wanted = run(model, eager, said, STEPS, mask)
    compiled = Compiled(model, "aot_eager")
    graphs = []
    for _ in range(2):
        cache = KiviCache(model.config, max_cache_len=LENGTH, **SMALL)
        real = ... if mask is None else mask.bool()
        assert torch.equal(run(compiled, cache, said, STEPS, mask)[real], wanted[real])
        graphs.append(compiled.counter.frame_count)
        assert cache.info().total.quantized_tokens > 0
    # A mask that grows and windows that fill up take another graph.
    assert graphs[0] == graphs[1] <= 4


def test_a_cache_that_was_reset_begins_in_a_graph(path_of_llama):
    """Without a prompt before it."""
    model = load(path_of_llama)
    model.set_attn_implementation("kivi")
    said = ids(40, 6, 2)
    cache = KiviCache(model.config, max_cache_len=LENGTH, **SMALL)
    wanted = run(model, cache, said, [1] * 40)
    cache.reset()
    assert torch.equal(run(Compiled(model, "aot_eager"), cache, said, [1] * 40), wanted)


def test_inductor_keeps_pages_in_place(path_of_llama):
    """The op writes to the cache's own memory: a copy of it would cost more than the step."""
    from torch._inductor.utils import run_and_get_code

    model = load(path_of_llama)
    model.set_attn_implementation("kivi")
    said = ids(LENGTH, 2, 2)
    wanted = run(model, KiviCache(model.config, max_cache_len=LENGTH, **SMALL), said, STEPS, padded(2))
    compiled = Compiled(model, "inductor")
    cache = KiviCache(model.config, max_cache_len=LENGTH, **SMALL)
    actual, codes = run_and_get_code(run, compiled, cache, said, STEPS, padded(2))
    real = padded(2).bool()
    torch.testing.assert_close(actual[real], wanted[real], atol=2e-3, rtol=0)
    for code in codes:
        calls = [line for line in code.splitlines() if "cached_decode.default(" in line and " = " in line]
        assert len(calls) == len(cache)
        for line in calls:
            # Query, key, value and mask are computed; memory comes as it was given.
            assert re.search(r"default\(.*buf\d+, arg\d+_1, \d+, arg\d+_1", line)


@pytest.fixture(scope="module")
def path_of_llama(tmp_path_factory):
    family = FAMILIES["llama3"]
    return save(tmp_path_factory.mktemp("llama"), family.config, family.settings)


def test_a_cache_that_grows_compiles_a_bounded_number_of_times(model):
    said = ids(LENGTH, 3)
    wanted = run(model, KiviCache(model.config, **SMALL), said, STEPS)
    compiled = Compiled(model, "eager", fullgraph=False)
    graphs = []
    for _ in range(2):
        assert torch.equal(run(compiled, KiviCache(model.config, **SMALL), said, STEPS), wanted)
        graphs.append(compiled.counter.frame_count)
    assert graphs[0] == graphs[1] <= 8 * len(model.model.layers)


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_generate_compiles(model, masked):
    """generate() compiles by itself on GPUs; here it has to be told to."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    said, settings = ids(PROMPT, 4, 2), {"max_new_tokens": LENGTH - PROMPT} | GREEDY
    settings["attention_mask"] = padded(2)[:, :PROMPT] if masked else None
    wanted = model.generate(said, past_key_values=KiviCache(model.config, **SMALL), **settings)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    cache = KiviCache(model.config, max_cache_len=LENGTH, **SMALL)
    actual = model.generate(said, past_key_values=cache, compile_config=config, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert actual.tolist() == wanted.tolist()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graphs(path_of_llama, dtype):
    """What generate() does by itself; replayed graphs are equal to the bit to eager steps."""
    model = load(path_of_llama, dtype)
    model.set_attn_implementation("kivi")
    said, settings = ids(PROMPT, 5, 2), {"max_new_tokens": LENGTH - PROMPT} | GREEDY
    wanted = model.generate(said, past_key_values=KiviCache(model.config, **SMALL), **settings)
    for config in (CompileConfig(backend="cudagraphs", mode=None, fullgraph=True), None):
        for _ in range(2):
            cache = KiviCache(model.config, max_cache_len=LENGTH, **SMALL)
            actual = model.generate(said, past_key_values=cache, compile_config=config, **settings)
            assert cache.info().total.quantized_tokens > 0
            # With inductor, which rounds otherwise, greedy answers part at near ties.
            assert actual.tolist() == wanted.tolist() or config is None
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
