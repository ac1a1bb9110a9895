"""KiviCache in transformers: tiny random models, against the oracle of attention (oracle.py) and DynamicCache.

On a GPU where there is one; float32 is then served by Triton's kernels.
"""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from test_models import FAMILIES, SIZES, save
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, PreTrainedModel

import vllm_kivi.transformers
from vllm_kivi import ops
from vllm_kivi.format import LAYOUT_FIELDS, KVFormat
from vllm_kivi.options import KiviOptions
from vllm_kivi.transformers import KiviCache
from vllm_kivi.transformers.attention import kivi_attention, kivi_mask
from vllm_kivi.transformers.pages import GROWTH, Pages

LENGTH = 330
TOLERANCE = 2e-4
SMALL: dict[str, Any] = {"residual_length": 32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
only_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU would be waited for, or takes workspaces")
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "LlamaConfig", {})


@pytest.fixture(scope="module")
def loaded_llama(path) -> PreTrainedModel:
    return load(path)


@pytest.fixture
def llama(loaded_llama) -> PreTrainedModel:
    loaded_llama.set_attn_implementation("kivi")
    return loaded_llama


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def ids(length: int, seed: int = 0, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=generator).to(DEVICE)


def run(model: PreTrainedModel, cache: Any, said: Tensor, steps: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Log-probabilities [rows, tokens, vocabulary] of tokens that reach the model in steps of so many."""
    assert sum(steps) == said.shape[1]
    outputs, first = [], cache.get_seq_length()
    for part in said.split(list(steps), 1):
        arguments: dict[str, Any] = {}
        if mask is not None:
            arguments["attention_mask"] = mask[:, : first + part.shape[1]]
            arguments["position_ids"] = (arguments["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, first:]
        outputs.append(model(part, past_key_values=cache, **arguments).logits)
        first += part.shape[1]
    return torch.cat(outputs, 1).log_softmax(-1)


def chunks(prompt: int, chunk: int, decoded: int) -> list[int]:
    """Steps of a prompt in chunks and of tokens one by one."""
    return [min(chunk, prompt - start) for start in range(0, prompt, chunk)] + [1] * decoded


def expected(model: PreTrainedModel, said: Tensor, prompt: int, chunk: int, make_format: Any) -> Tensor:
    attend = oracle.attention(make_format, prompt, chunk)

    def on_cpu(module: Any, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, None]:
        output, _ = attend(module, *(x if x is None else x.cpu() for x in tensors), **settings)
        return output.to(DEVICE), None

    AttentionInterface.register(oracle.NAME, on_cpu)
    model.set_attn_implementation(oracle.NAME)
    logits = model(said, use_cache=False).logits
    model.set_attn_implementation("kivi")
    return logits.log_softmax(-1)


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=0)


def assert_equal_but_for_codes(compare: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """Log-probabilities of prompts with these seeds, computed in two ways.

    The order of sums can move an element over the edge between two codes, see test_models. One prompt without that is
    enough for the tolerance, and in all of them the mean is small.
    """
    largest = []
    for seed in range(4):
        actual, wanted = compare(seed)
        error = (actual - wanted).abs()
        assert error.mean() < 50 * TOLERANCE
        largest.append(error.max().item())
        if largest[-1] < TOLERANCE:
            return
    pytest.fail(f"largest errors {largest}")


# ---------------------------------------------------------------------------------------------------------- the oracle

FULL = ("llama3", "qwen2", "qwen3", "mistral")
SLIDING = ("gemma2", "gemma3")
STREAMS = {"tokens": (0, 1), "chunks": (290, 120), "prompt": (290, 290), "small_chunks": (290, 9)}  # prompt, chunk


@pytest.fixture(scope="module", params=FULL + SLIDING)
def loaded_family(request, tmp_path_factory) -> tuple[Any, PreTrainedModel]:
    family = FAMILIES[request.param]
    path = save(tmp_path_factory.mktemp(request.param), family.config, family.settings)
    return family, load(path)


@pytest.fixture
def family(loaded_family) -> tuple[Any, PreTrainedModel]:
    loaded_family[1].set_attn_implementation("kivi")
    return loaded_family


@pytest.mark.parametrize("stream", STREAMS)
def test_logits_are_the_oracles(family, stream):
    """Teacher-forced: token by token, and a prompt in chunks and tokens after it."""
    (family, model), (prompt, chunk) = family, STREAMS[stream]

    def make_format(head_dim: int, num_kv_heads: int) -> Any:
        return KiviOptions(**family.options).format(family.cache, head_dim, num_kv_heads, "float32")

    def compare(seed: int) -> tuple[Tensor, Tensor]:
        said = ids(LENGTH, seed)
        cache = KiviCache(model.config, family.cache, **family.options)
        assert cache.is_sliding == [i in family.sliding for i in range(len(cache))]
        actual = run(model, cache, said, chunks(prompt, chunk, LENGTH - prompt))
        unquantized = (actual - expected(model, said, prompt, chunk, None)).abs()
        assert unquantized[:, 290:].mean() > 100 * TOLERANCE
        return actual, expected(model, said, prompt, chunk, make_format)

    assert_equal_but_for_codes(compare)


@pytest.mark.parametrize("bits", [{"k_bits": 16}, {"v_bits": 16}, {"k_bits": 8}, {"k_bits": 4, "v_bits": 8}], ids=str)
def test_any_bits(llama, bits):
    """In chunks and token by token, with what the preset says of the other one."""

    def make_format(head_dim: int, num_kv_heads: int) -> KVFormat:
        return KiviOptions().format("kivi2", head_dim, num_kv_heads, "float32", **bits)

    def compare(seed: int) -> tuple[Tensor, Tensor]:
        said, cache = ids(LENGTH, seed), KiviCache(llama.config, **bits)
        actual = run(llama, cache, said, chunks(290, 120, LENGTH - 290))
        assert all(f"{name}={value}" in str(cache.info()) for name, value in bits.items())
        return actual, expected(llama, said, 290, 120, make_format)

    assert_equal_but_for_codes(compare)


def test_info_names_what_was_said(llama):
    """What is 0 or False too: published settings are not the defaults."""
    assert KiviCache(llama.config, "kivi4").info().name == "kivi4"
    published = {"sink_tokens": 0, "scale_search": False, "rotate_values": False}
    assert KiviCache(llama.config, **published).info().name == (
        "kivi2 sink_tokens=0 scale_search=False rotate_values=False"
    )
    assert KiviCache(llama.config, max_cache_len=400).info().name == "kivi2 max_cache_len=400"


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.15.3"])
def test_an_older_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"transformers 5.16 or newer, not {version}"):
        importlib.reload(vllm_kivi.transformers)


@pytest.mark.parametrize("version", ["5.16.0.dev0", "5.100.0", "6.0.0"])
def test_a_newer_transformers_is_not(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    importlib.reload(vllm_kivi.transformers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_tokens_of_short_sequences_are_dynamic_caches(path, dtype):
    """Up to residual_length tokens nothing is quantized."""
    model = load(path, dtype)
    wanted = model.generate(ids(100, rows=2), max_new_tokens=28, **GREEDY)
    for attention in ("kivi", "sdpa", "eager") if dtype == torch.float32 else ("sdpa",):
        model.set_attn_implementation(attention)
        cache = KiviCache(model.config)
        actual = model.generate(ids(100, rows=2), past_key_values=cache, max_new_tokens=28, **GREEDY)
        assert actual.tolist() == wanted.tolist()


@pytest.mark.parametrize("attention", ["kivi", "sdpa"])
def test_autocast(llama, attention):
    """Keys and queries come in float32 then, values in the dtype that all are cached in."""
    said, steps, results = ids(60), [30, 10] + [1] * 20, []
    wanted = run(llama, DynamicCache(), said, steps)
    with torch.autocast(DEVICE, torch.bfloat16):
        for implementation, cache in (("sdpa", DynamicCache()), (attention, KiviCache(llama.config))):
            llama.set_attn_implementation(implementation)
            results.append((run(llama, cache, said, steps) - wanted).abs().mean())
    assert {layer.pages.fmt.dtype for layer in cache.layers} == {"bfloat16"}
    assert 0 < results[1] < 1.2 * results[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stream", ["chunks", "small_chunks"])
def test_other_attention_reads_the_same(llama, attention, stream):
    prompt, chunk = STREAMS[stream]
    steps = chunks(prompt, chunk, LENGTH - prompt)

    def compare(seed: int) -> tuple[Tensor, Tensor]:
        results = []
        for implementation in (attention, "kivi"):
            llama.set_attn_implementation(implementation)
            results.append(run(llama, KiviCache(llama.config), ids(LENGTH, seed, 2), steps))
        return results[0], results[1]

    assert_equal_but_for_codes(compare)


def test_kivi_attention_without_a_kivi_cache(family):
    """No cache, other caches, padding: ordinary attention, of sliding layers and with soft caps too."""
    _, model = family
    said, mask = ids(150, 14, 2), torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    mask[0, :40] = 0
    results = []
    for attention in ("eager", "kivi"):
        model.set_attn_implementation(attention)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        plain = model(said, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cached = run(model, DynamicCache(config=model.config), said, [100, 30] + [1] * 20, mask)
        results.append((plain[0, 40:], plain[1], cached[0, 40:], cached[1]))
    for wanted, actual in zip(*results, strict=True):
        assert_close(actual, wanted)


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=96, d_model=128, **sizes))
    for weight in model.eval().to(DEVICE).parameters():
        if weight.dim() == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("cached", [False, True])
def test_attention_that_is_not_causal(cached):
    """Encoders and what reads them, with a KiviCache in the decoder or without: vision towers are such encoders."""
    model = bart()
    said, answer, mask = ids(50, 1, 2) % 96, ids(50, 2, 2) % 96, torch.ones(2, 50, dtype=torch.long, device=DEVICE)
    mask[0, 40:] = 0
    results = []
    for attention in ("eager", "kivi"):
        model.set_attn_implementation(attention)
        outputs = []
        for seen in (mask, torch.ones_like(mask)):
            own = KiviCache(model.config) if attention == "kivi" and cached else DynamicCache()
            cache = EncoderDecoderCache(own, DynamicCache())
            for part in answer.split([30] + [1] * 20, 1):
                settings = {"attention_mask": seen, "decoder_input_ids": part, "past_key_values": cache}
                outputs.append(model(said, **settings).logits)
        results.append(torch.cat(outputs, 1))
    assert_close(*results)


@pytest.mark.parametrize("attention", ["kivi", "sdpa"])
@pytest.mark.parametrize("tokens", [1, 30, 50])
def test_cross_attention_is_refused(attention, tokens):
    """Without EncoderDecoderCache it would read, and write, what the decoder said."""
    model = bart()
    model.set_attn_implementation(attention)
    own, crossed = KiviCache(model.config), KiviCache(model.config)
    settings = {"input_ids": ids(50, 1) % 96, "decoder_input_ids": ids(tokens, 2) % 96}
    with pytest.raises(ValueError, match=r"pass past_key_values=EncoderDecoderCache\(KiviCache\(model.config\), Dyn"):
        model(past_key_values=own, **settings)
    own.reset()
    cache = EncoderDecoderCache(own, DynamicCache())
    for _ in range(2):
        model(past_key_values=cache, **settings)
    assert own.get_seq_length() == 2 * tokens
    cache = EncoderDecoderCache(DynamicCache(), crossed)
    message = (
        "a KiviCache has packed pages and no .keys; use DynamicCache|cross-attention whose cache is a KiviCache and"
    )
    with pytest.raises((AttributeError, ValueError), match=message):
        for _ in range(2):
            model(past_key_values=cache, **settings)


# --------------------------------------------------------------------------------------------------------------- pages

FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kivi2", {}),
    ("kivi2", {"residual_length": 0, "sink_tokens": 0}),
    ("kivi2", {"residual_length": 50, "sink_tokens": 40}),
    ("kivi2_boost", {"group_size": 128, "residual_length": 10}),
    ("kivi_k4v2", {"group_size": 64, "residual_length": 64}),
    ("kivi8", {"residual_length": 3}),
)


def attended(query: Tensor, own: Tensor, lossy: Tensor, quantized: Tensor) -> Tensor:
    """What the last rows [heads, q, D] of a sequence read of keys and values [2, T, H, D]: [q, heads, D]."""
    read = torch.where(quantized[:, None, None], lossy, own).transpose(1, 2).repeat_interleave(2, 1).double()
    positions = torch.arange(own.shape[1])
    scores = query.double() @ read[0].transpose(1, 2) * 0.2
    hidden = positions > positions[-query.shape[1] :, None]
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ read[1]).transpose(0, 1)


def new_pages(fmt: KVFormat, batch_size: int, **settings: Any) -> Pages:
    device = torch.device(DEVICE)
    workspace = None if DEVICE == "cpu" else ops.decode_workspace(fmt.layout(), device)
    return Pages(fmt, batch_size, device, workspace=workspace, **settings)


@pytest.fixture
def _tokens_keep_apart(monkeypatch):
    """No two tokens that one call of the store writes or reads have the same place: their order is not defined."""
    store = ops.store

    def checked(key, value, quantized, full, quantized_table, full_table, starts, seq_lens, layout):
        fields = dict(zip(LAYOUT_FIELDS, layout, strict=True))
        group_size, n = fields["group_size"], fields["full_page_tokens"]
        for blocks, count, length in zip(full_table.cpu(), starts.diff().tolist(), seq_lens.tolist(), strict=True):
            if count:
                positions = torch.arange((length - count) // group_size * group_size, length)
                block = blocks[positions // n]
                places = (block * n + positions % n)[block != 0]
                assert len(places.unique()) == len(places)
        store(key, value, quantized, full, quantized_table, full_table, starts, seq_lens, layout)

    monkeypatch.setattr(ops, "store", checked)


@pytest.mark.usefixtures("_tokens_keep_apart")
@pytest.mark.parametrize("dequantizes", [False, True], ids=["prefill", "dequantizes"])
@pytest.mark.parametrize("dtype", ["float32"] if DEVICE == "cpu" else ["float32", "bfloat16"])
@pytest.mark.parametrize(("preset", "options"), FORMATS)
def test_random_steps(preset, options, dtype, dequantizes):
    """Ragged rows in steps of any length, padding anywhere around them: with the same keys there are the same codes."""
    generator = torch.Generator().manual_seed(1)
    fmt = KiviOptions(**options).format(preset, 64, 2, dtype)
    pages = new_pages(fmt, 3, max_crop=5)
    if dequantizes:
        pages.has_prefill = False
    said: list[list[Tensor]] = [[], [], []]  # of each row: keys and values [2, q, H, D] of every step
    results: list[list[tuple[int, int, Tensor, Tensor]]] = [[], [], []]  # start, boundary, query and output
    for num_new in (1, 90, 1, 400, 33, 1, 1, 1, 70, 5, 5, 5, 170, *[1] * 35):
        new = (torch.randn(2, 3, 2, num_new, 64, generator=generator) + 0.5).to(getattr(torch, dtype))
        query = torch.randn(3, 4, num_new, 64, generator=generator).to(new.dtype)
        lengths = [int(torch.randint(num_new + 1, (), generator=generator)) for _ in said]
        firsts = [int(torch.randint(num_new - length + 1, (), generator=generator)) for length in lengths]
        real = torch.zeros(3, num_new, dtype=torch.bool)
        for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            real[row, first : first + length] = True
        new.transpose(2, 3)[:, ~real] = 1e6  # what padding holds reaches nobody
        starts = pages.seq_lens.tolist()
        output = pages.attend(*(x.to(DEVICE) for x in (query, *new, real)), 0.2, 0.0).cpu()
        assert output.shape == (3, num_new, 4, 64)
        for row, start in enumerate(starts):
            said[row].append(new[:, row, :, real[row]].transpose(1, 2))
            boundary = fmt.boundary(start + 1) if num_new == 1 else min(fmt.boundary(start + 1), start)
            results[row].append((start, boundary, query[row, :, real[row]], output[row, real[row]]))
    for steps, row_results in zip(said, results, strict=True):
        own = torch.cat(steps, 1)
        lossy, positions = torch.stack(oracle.dequantized(fmt, own[0], own[1])), torch.arange(own.shape[1])
        quantized = positions >= fmt.sink_tokens
        for start, boundary, query, output in row_results:
            length = start + query.shape[1]
            if length == start:
                continue
            below = (quantized & (positions < boundary))[:length]
            wanted = attended(query, own[:, :length], lossy[:, :length], below)
            tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 2e-2}
            torch.testing.assert_close(output.double(), wanted, **tolerance)
    assert pages.seq_lens.tolist() == [sum(x.shape[1] for x in steps) for steps in said]


# -------------------------------------------------------------------------------------------------------------- memory


def storage_bytes(root: Any) -> int:
    """Memory of all tensors that can be reached from an object, whatever it says of itself."""
    seen: dict[int, Any] = {}
    storages: dict[int, int] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type) or (callable(one) and not isinstance(one, Tensor)):
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(one)
    return sum(storages.values())


def fill(cache: KiviCache, heads: int, head_dim: int, steps: Sequence[int]) -> None:
    """Random tokens in every layer, as attention "kivi" stores them."""
    for layer in cache.layers:
        for step in steps:
            key, value = torch.randn(2, 1, heads, step, head_dim, dtype=torch.bfloat16, device=DEVICE).unbind()
            key, value = layer.update(key, value)
            layer.attend(torch.zeros_like(key), key, value, None, 0.1, 0.0)


@only_cpu
@pytest.mark.parametrize("steps", [[4096], [4000] + [1] * 96], ids=["prompt", "grown"])
@pytest.mark.parametrize(("preset", "least"), [("kivi2", 4.0), ("kivi2_boost", 4.0), ("kivi4", 2.6)])
def test_memory_is_the_formats(llama, preset, least, steps):
    tokens, heads, head_dim = 4096, 8, 128
    cache = KiviCache(llama.config, preset)
    fill(cache, heads, head_dim, steps)
    fmt = KiviOptions().format(preset, head_dim, heads, "bfloat16")
    arithmetic = tokens // fmt.page_tokens * fmt.page_bytes + fmt.window_pages(tokens) * fmt.full_page_bytes
    measured, elements = storage_bytes(cache.layers), len(cache) * tokens * heads * head_dim * 2
    assert measured == pytest.approx(len(cache) * arithmetic, rel=0.02)
    assert 2 * elements / measured > least
    total = cache.info().total
    assert (total.num_bytes, total.elements, total.compression) == (measured, elements, 2 * elements / measured)
    assert total.bits_per_element == pytest.approx(16 / total.compression)


def test_growth_is_amortized():
    """Appending costs O(new tokens), and room that waits for tokens stays below 1 %."""
    pages = new_pages(KiviOptions().format("kivi2", 64, 1, "bfloat16"), 1)
    moved = 0
    for needed in range(1, 3000):
        before, room = pages.memory, pages.row_pages
        pages._reserve(needed * pages.fmt.page_tokens)
        moved += room if pages.memory is not before else 0
        assert needed <= pages.row_pages <= needed + max(1, 0.01 * needed)
    assert moved <= 2 * GROWTH * needed


def test_steps_move_no_pages_and_read_no_tensor(llama, monkeypatch):
    """With max_cache_len every buffer stays where it is, and Python never looks into a tensor."""
    cache = KiviCache(llama.config, max_cache_len=256, **SMALL)
    run(llama, cache, ids(150), [150])

    def places() -> list[int]:
        pages = [layer.pages for layer in cache.layers]
        return [x.data_ptr() for p in pages for x in (p.memory, p.quantized_table, p.full_table)]

    def refuse(*args: Any) -> None:
        raise AssertionError("a tensor is read")

    before = places()
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__int__", "__index__"):
            patched.setattr(Tensor, name, refuse)
        for step in range(80):
            llama(ids(1, step), past_key_values=cache)
    assert places() == before


@only_cpu
def test_max_cache_len(llama):
    said, steps = ids(200), chunks(150, 70, 50)
    grown, fixed = KiviCache(llama.config), KiviCache(llama.config, max_cache_len=200)
    assert torch.equal(run(llama, grown, said, steps), run(llama, fixed, said, steps))
    assert (grown.get_max_length(), fixed.get_max_length()) == (-1, 200)
    too_many = "tokens do not fit a cache of max_cache_len=200; make it larger"
    with pytest.raises(RuntimeError, match=too_many):  # only the device knows
        run(llama, fixed, ids(1), [1])
    for attention in ("kivi", "sdpa"):
        llama.set_attn_implementation(attention)
        with pytest.raises(ValueError, match="201 " + too_many):
            run(llama, KiviCache(llama.config, max_cache_len=200), ids(201), [201])
    with pytest.raises(ValueError, match="201 " + too_many):  # the other attention asks
        run(llama, fixed, ids(1), [1])


def test_info(llama, caplog):
    cache = KiviCache(llama.config, residual_length=32, sink_tokens=4)
    run(llama, cache, ids(40, rows=2), [40])
    assert cache.info().total.quantized_tokens == 0
    assert "nothing in this cache is quantized (160 tokens in 2 layers)" in caplog.text
    caplog.clear()
    run(llama, cache, ids(60, rows=2), [60])
    info = cache.info()
    assert not caplog.text
    # 100 tokens: those below 64 are read quantized, but for the sinks.
    assert [(layer.quantized_tokens, layer.full_tokens) for layer in info.layers] == [(2 * 60, 2 * 40)] * 2
    assert str(info).splitlines()[1].split()[:3] == ["0", "120", "80"]


@pytest.mark.parametrize(
    ("kinds", "level", "message"),
    [
        (["full_attention"] * 3, 0, ""),
        (["sliding_attention", "conv", "full_attention"], logging.INFO, "1 (sliding window), 1 (no attention)"),
        (["hybrid_sliding", "full_attention", "hybrid_sliding"], logging.INFO, "2 (sliding window)"),
        (["hybrid", "conv", "full_attention"], logging.WARNING, "1 (attention beside a recurrent state), 1 (no atten"),
        (["indexed_attention"] * 2 + ["full_attention"], logging.WARNING, "2 (a cache of type DynamicIndexedLayer)"),
    ],
    ids=str,
)
def test_layers_that_are_not_quantized_are_named(caplog, kinds, level, message):
    """Those that grow with every token with a warning."""
    caplog.set_level(logging.INFO, "vllm_kivi.transformers")
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 3})
    config.layer_types, config.sliding_window = kinds, 32
    try:
        DynamicCache(config=config)
    except KeyError as unknown:
        pytest.skip(f"this version of transformers has no {unknown}")
    info = KiviCache(config).info()
    assert [bool(layer.kept) for layer in info.layers] == [kind != "full_attention" for kind in kinds]
    said = [record for record in caplog.records if "layers are not quantized" in record.message]
    assert [record.levelno for record in said] == ([level] if level else [])
    for record in said:
        assert f"{3 - kinds.count('full_attention')} of 3 layers are not quantized: {message}" in record.message
    for layer, line in zip(info.layers, str(info).splitlines()[1:], strict=False):
        assert line.endswith(f"  not quantized: {layer.kept}" if layer.kept else "x")


@pytest.mark.parametrize("options", [{"full_precision": True}, {"k_bits": 16, "v_bits": 16}], ids=str)
def test_bypass_warns(llama, caplog, options):
    """It says what DynamicCache says."""
    caplog.set_level(logging.WARNING)
    cache = KiviCache(llama.config, **options)
    assert "this cache will quantize nothing: it keeps keys and values in full precision" in caplog.text
    actual = run(llama, cache, ids(300), [150] + [1] * 150)
    assert_close(actual, run(llama, DynamicCache(config=llama.config), ids(300), [150] + [1] * 150))
    assert cache.info().total.quantized_tokens == 0
    assert "nothing in this cache is quantized (600 tokens in 2 layers)" in caplog.text


def test_a_cache_too_short_warns(llama, caplog):
    KiviCache(llama.config, max_cache_len=150)
    assert "will quantize nothing: max_cache_len=150 is hardly more than residual_length=128" in caplog.text


# ------------------------------------------------------------------------------------------------------------- batches

LENGTHS = (230, 1, 97, 64, 163)
DECODED = 40


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", [[230], [100, 100, 30], [7] * 32 + [6]], ids=["prompt", "chunks", "small_chunks"])
def test_padding_is_not_stored(llama, side, steps):
    """Rows of a ragged batch say what each says alone in the same chunks."""
    longest, rows = max(LENGTHS), len(LENGTHS)
    mask = torch.zeros(rows, longest + DECODED, dtype=torch.long, device=DEVICE)
    mask[:, longest:] = 1
    for row, length in enumerate(LENGTHS):
        mask[row, longest - length : longest] = 1
    if side == "right":
        mask[:, :longest] = mask[:, :longest].flip(1)

    def compare(seed: int) -> tuple[Tensor, Tensor]:
        said = ids(longest + DECODED, seed, rows)
        cache = KiviCache(llama.config, **SMALL)
        actual = run(llama, cache, said, steps + [1] * DECODED, mask)
        assert torch.isfinite(actual).all()
        assert [layer.pages.seq_lens.tolist() for layer in cache.layers] == [[n + DECODED for n in LENGTHS]] * 2
        alone = []
        for row in range(rows):
            own_steps = [n for n in (int(part.sum()) for part in mask[row, :longest].split(steps)) if n]
            own, cache = said[row : row + 1, mask[row].bool()], KiviCache(llama.config, **SMALL)
            alone.append(run(llama, cache, own, own_steps + [1] * DECODED)[0])
        return actual[mask.bool()], torch.cat(alone)

    assert_equal_but_for_codes(compare)


def test_padded_generation(llama):
    """transformers' own masks and positions."""
    said, lengths = ids(200, 2, 3), (200, 60, 141)
    mask = torch.zeros_like(said)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    settings = {"max_new_tokens": 40} | GREEDY
    together = llama.generate(said, attention_mask=mask, past_key_values=KiviCache(llama.config, **SMALL), **settings)
    for row, length in enumerate(lengths):
        own, cache = said[row : row + 1, -length:], KiviCache(llama.config, **SMALL)
        assert (
            together[row, 200:].tolist() == llama.generate(own, past_key_values=cache, **settings)[0, length:].tolist()
        )


def test_padded_generation_with_other_attention(llama):
    """Padding is stored then, and the model's own mask hides it: with the bypass, as in DynamicCache."""
    said, mask = ids(200, 2, 2), torch.ones(2, 200, dtype=torch.long, device=DEVICE)
    mask[1, :77] = 0
    llama.set_attn_implementation("sdpa")
    settings = {"attention_mask": mask, "max_new_tokens": 40} | GREEDY
    wanted = llama.generate(said, **settings)
    cache = KiviCache(llama.config, full_precision=True, **SMALL)
    assert llama.generate(said, past_key_values=cache, **settings).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("how", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move(llama, how, argument, rows):
    steps = [20] + [1] * 40

    def compare(seed: int) -> tuple[Tensor, Tensor]:
        said, more = ids(170, seed, 3), ids(60, seed + 10, len(rows))
        cache, other = KiviCache(llama.config, **SMALL), KiviCache(llama.config, **SMALL)
        run(llama, cache, said, [100, 70])
        getattr(cache, how)(argument)
        assert cache.batch_size == len(rows)
        run(llama, other, said[rows], [100, 70])
        return run(llama, cache, more, steps), run(llama, other, more, steps)

    assert_equal_but_for_codes(compare)


def test_ragged_rows_move(llama):
    """Each with its own length."""
    mask = torch.ones(3, 200, dtype=torch.long, device=DEVICE)
    mask[0, :90], mask[2, :31] = 0, 0
    rows, settings = [2, 0, 1], {"full_precision": True, "residual_length": 32}
    said = ids(200, 3, 3)
    cache, other = KiviCache(llama.config, **settings), KiviCache(llama.config, **settings)
    run(llama, cache, said[:, :150], [150], mask[:, :150])
    cache.reorder_cache(torch.tensor(rows, device=DEVICE))
    run(llama, other, said[rows, :150], [150], mask[rows, :150])
    assert [x.pages.seq_lens.tolist() for x in cache.layers] == [[119, 60, 150]] * 2
    steps = [20] + [1] * 30
    assert_close(*(run(llama, one, said[rows, 150:], steps, mask[rows]) for one in (cache, other)))


def test_beam_search(llama):
    """With the bypass nothing is quantized, so beams are DynamicCache's: only the order of rows can break them."""
    settings = {"num_beams": 3, "max_new_tokens": 40} | GREEDY
    wanted = llama.generate(ids(120, 5, 2), **settings)
    cache = KiviCache(llama.config, full_precision=True, **SMALL)
    assert llama.generate(ids(120, 5, 2), past_key_values=cache, **settings).tolist() == wanted.tolist()


@pytest.mark.parametrize("count", [1, 12, 20])
def test_crop_within_max_crop_is_exact(llama, count):
    """As if the tokens had never been there, though groups were quantized and the ring was written."""
    said, wrong, more = ids(158, 6), ids(count, 7), ids(60, 8)  # the next step reads a longest window
    cache, other = (KiviCache(llama.config, max_crop=20, **SMALL) for _ in range(2))
    for one in (cache, other):
        run(llama, one, said, [158])
    for _ in range(3):
        run(llama, cache, wrong, [count])
        cache.crop(-count)
    assert cache.get_seq_length() == 158
    steps = [30] + [1] * 30
    assert torch.equal(run(llama, cache, more, steps), run(llama, other, more, steps))


@pytest.mark.usefixtures("_tokens_keep_apart")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"sink_tokens": 0}, {"sink_tokens": 6, "residual_length": 0}])
def test_random_crops(options, seed):
    """Exact with the bypass, whose quantized pages lose nothing: every token that the ring forgot comes back."""
    generator = torch.Generator().manual_seed(seed)

    def number(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    fmt = KiviOptions(full_precision=True, **{"residual_length": 32} | options).format("kivi2", 64, 1, "float32")
    pages = new_pages(fmt, 1, max_crop=15 * (seed % 2))
    said = torch.zeros(2, 0, 1, 64)
    for _ in range(80):
        pages.memory[: fmt.full_page_bytes] = 255  # the null block
        num_new = (1, 1 + number(9), 1 + number(120))[number(3)]
        new, query = torch.randn(2, 1, 1, num_new, 64, generator=generator), torch.randn(1, 2, num_new, 64)
        said = torch.cat((said, new[:, 0].transpose(1, 2)), 1)
        output = pages.attend(*(x.to(DEVICE) for x in (query, *new)), None, 0.2, 0.0).cpu()
        wanted = attended(query[0], said, said, torch.ones(said.shape[1], dtype=torch.bool))
        torch.testing.assert_close(output[0].double(), wanted, atol=2e-5, rtol=1e-5)
        for _ in range(number(3)):
            count = (number(4), number(20), number(said.shape[1] + 1))[min(number(5), 2)]
            pages.crop(count)
            said = said[:, : max(said.shape[1] - count, 0)]
        assert pages.num_positions == said.shape[1] == pages.seq_lens.item()


def test_crop_reads_again_what_was_quantized(llama):
    cache = KiviCache(llama.config, **SMALL)
    run(llama, cache, ids(300, 6), [300])
    pages = cache.layers[0].pages
    whole = pages._dequantized(pages._boundary(pages.seq_lens))
    cache.crop(160)  # a positive number is the length to keep
    assert cache.get_seq_length() == 160
    assert pages._boundary(pages.seq_lens).tolist() == [128]
    for now, before in zip(pages._dequantized(pages._boundary(pages.seq_lens)), whole, strict=True):
        assert torch.equal(now, before[:, :, :160])


def test_crop_after_decoding(llama):
    """What the ring forgot since the last crop comes back: with the bypass it is what DynamicCache says."""
    caches = KiviCache(llama.config, full_precision=True, **SMALL), DynamicCache(config=llama.config)
    results = []
    for cache in caches:
        run(llama, cache, ids(150, 1), [150])
        cache.crop(-1)
        run(llama, cache, ids(120, 2), [1] * 120)
        cache.crop(-110)
        results.append(run(llama, cache, ids(30, 3), [1] * 30))
    assert_close(*results)


def test_assisted_decoding(llama):
    """Guesses from the prompt, most of them wrong and cropped."""
    said, settings = ids(30, 9).repeat(1, 5), {"max_new_tokens": 60} | GREEDY
    wanted = llama.generate(said, **settings)
    cache = KiviCache(llama.config, full_precision=True, max_crop=4, **SMALL)
    actual = llama.generate(said, past_key_values=cache, prompt_lookup_num_tokens=4, **settings)
    assert actual.tolist() == wanted.tolist()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("max_cache_len", [None, 240])
def test_layers_on_two_gpus(llama, path, max_cache_len):
    """Every layer's pages are where its weights are."""
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.norm": 1, "lm_head": 1}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=places)
    model.set_attn_implementation("kivi")
    said, mask = ids(200, 2, 3), torch.ones(3, 200, dtype=torch.long, device=DEVICE)
    mask[1, :77] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 40, "disable_compile": True} | GREEDY
    caches = [KiviCache(model.config, max_cache_len=max_cache_len, **SMALL) for _ in range(2)]
    answers = [
        one.generate(said, past_key_values=cache, **settings) for one, cache in zip((model, llama), caches, strict=True)
    ]
    assert [layer.pages.memory.device.index for layer in caches[0].layers] == [0, 1]
    assert answers[0].tolist() == answers[1].tolist()


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("max_cache_len", [None, 300])
@pytest.mark.parametrize("how", ["copy", "file"])
def test_a_prompt_is_used_again(family, tmp_path, how, max_cache_len):
    """A copy goes on as the original does, and changes nothing in it."""
    family, model = family
    cache = KiviCache(model.config, family.cache, max_crop=3, max_cache_len=max_cache_len, **family.options)
    run(model, cache, ids(200, 10), [200])

    def again() -> KiviCache:
        if how == "copy":
            return copy.deepcopy(cache)
        cache.save(tmp_path / "prompt.pt")
        return KiviCache.load(tmp_path / "prompt.pt", model.config)

    steps = [10] + [1] * 40
    copies = again(), again()
    # With another attention, which a copy must notice: it sees the model's own configuration.
    model.set_attn_implementation("sdpa")
    run(model, copies[0], ids(50, 11), steps)
    model.set_attn_implementation("kivi")
    wanted = run(model, copies[1], ids(50, 12), steps)
    assert torch.equal(run(model, cache, ids(50, 12), steps), wanted)
    assert copies[1].info() == cache.info()


def test_pickle(llama, tmp_path):
    """What comes back writes to one memory: a file of it holds its last steps."""
    cache = KiviCache(llama.config, max_cache_len=300, **SMALL)
    run(llama, cache, ids(200, 10), [200])
    cache = pickle.loads(pickle.dumps(cache))
    run(llama, cache, ids(20, 11), [10] + [1] * 10)
    cache.save(tmp_path / "prompt.pt")
    other = KiviCache.load(tmp_path / "prompt.pt", llama.config)
    assert torch.equal(*(run(llama, one, ids(20, 12), [1] * 20) for one in (cache, other)))


def test_load_refuses(llama, tmp_path):
    path = tmp_path / "prompt.pt"
    cache = KiviCache(llama.config)
    run(llama, cache, ids(50), [50])
    cache.save(path)
    with pytest.raises(ValueError, match="has 2 layers, the model 3; use the model that it was made with"):
        KiviCache.load(path, transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 3}))
    windows = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
    with pytest.raises(ValueError, match="has sliding windows in other layers; use the model that it was made with"):
        KiviCache.load(path, transformers.Qwen2Config(**SIZES | windows))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no KiviCache; load what KiviCache.save wrote"):
        KiviCache.load(tmp_path / "other.pt", llama.config)
    data = torch.load(path)
    data["layers"][0]["pages"]["layout"][-1] += 16
    torch.save(data, path)
    with pytest.raises(ValueError, match="another version, whose pages lie otherwise; make the cache again"):
        KiviCache.load(path, llama.config)


@pytest.mark.parametrize("max_cache_len", [None, 200])
@pytest.mark.parametrize("how", ["as it is", "copied", "cropped", "reordered"])
def test_a_prompt_of_inference_mode_goes_on_without(llama, max_cache_len, how):
    cache, other = (KiviCache(llama.config, max_cache_len=max_cache_len, **SMALL) for _ in range(2))
    for one in (cache, other):
        run(llama, one, ids(100), [100])
        if how == "cropped":
            one.crop(70)
    if how == "copied":
        cache = copy.deepcopy(cache)
    with torch.inference_mode(False), torch.no_grad():
        if how == "reordered":
            cache.reorder_cache(torch.tensor([0], device=DEVICE))
        actual = run(llama, cache, ids(60, 1), [20] + [1] * 40)
    assert torch.equal(actual, run(llama, other, ids(60, 1), [20] + [1] * 40))


def test_reset(llama):
    said, steps = ids(150, 13), [100] + [1] * 50
    cache = KiviCache(llama.config, **SMALL)
    wanted = run(llama, cache, said, steps)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(llama, cache, said, steps), wanted)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "kivi3"}, "preset='kivi3' is not supported; accepted: kivi2, "),
        ({"bits": 2}, "unknown option 'bits'; accepted: group_size, "),
        ({"group_size": 16}, "group_size=16 is not supported; accepted: 32, 64, 128"),
        ({"k_bits": 3}, "k_bits=3 is not supported; accepted: 2, 4, 8, 16"),
        ({"boosted_fraction": 4}, "boosted_fraction=4 is not supported with kivi2"),
        ({"max_cache_len": -1}, "max_cache_len=-1 is not supported; accepted: an integer of 0 or more"),
        ({"max_crop": 1.5}, "max_crop=1.5 is not supported"),
    ],
)
def test_refused_options(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        KiviCache(llama.config, **arguments)


def test_refused_models():
    with pytest.raises(ValueError, match="head size 48 is not supported; accepted: 64, "):
        KiviCache(transformers.LlamaConfig(**SIZES | {"head_dim": 48}))
    with pytest.raises(ValueError, match="nothing would be quantized"):
        KiviCache(transformers.MistralConfig(**SIZES | {"sliding_window": 200}))
    with pytest.raises(ValueError, match="or without a recurrent state in the same layer"):
        KiviCache(transformers.FalconH1Config(**SIZES))
    with pytest.raises(ValueError, match="head size 512 is not supported"):
        KiviCache(gemma4(global_head_dim=512))


def gemma4(**settings: Any) -> transformers.Gemma4TextConfig:
    own = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "global_head_dim": 128}
    unused = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    return transformers.Gemma4TextConfig(**SIZES | own | unused | settings)


@pytest.mark.parametrize("window_head_dim", [64, 48])
def test_head_sizes_of_layers(window_head_dim):
    """Of those that are quantized."""
    config = gemma4(head_dim=window_head_dim)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kivi").to(DEVICE).eval()
    caches = KiviCache(model.config), DynamicCache(config=model.config)
    assert_close(*(run(model, cache, ids(100), [70] + [1] * 30) for cache in caches))
    assert caches[0].layers[1].pages.fmt.head_dim == 128


SHARED = {
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "DiffLlamaConfig": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("config", SHARED)
def test_keys_that_are_read_twice_are_refused(config):
    """By layers that share them, or by one layer: they would be stored again. Other attention serves these models."""
    settings = getattr(transformers, config)(**SIZES | {"vocab_size": 96} | SHARED[config])
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="kivi").to(DEVICE).eval()
    with pytest.raises(ValueError, match="does not support attention that reads the keys of another layer, or twice"):
        model(ids(20) % 96, past_key_values=KiviCache(model.config))
    model.set_attn_implementation("sdpa")
    results = [
        run(model, cache, ids(60) % 96, [50] + [1] * 10)
        for cache in (KiviCache(model.config), DynamicCache(config=model.config))
    ]
    assert_close(*results)


def test_a_position_bias_is_refused():
    query = torch.zeros(1, 2, 3, 64)
    with pytest.raises(ValueError, match="does not support a position bias"):
        kivi_attention(torch.nn.Module(), query, query, query, None, position_bias=torch.zeros(1, 2, 3, 3))


@only_cpu
def test_compiled_masks_are_checked():
    """Without looking at them, as on a GPU."""
    compiled = torch.compile(kivi_mask, backend="eager", fullgraph=True)
    for row, accepted in (([0, 1, 1, 1], True), ([1, 1, 0, 0], True), ([0, 0, 0, 0], True), ([1, 0, 1, 1], False)):
        mask = torch.tensor([[True] * 4, [bool(x) for x in row]])
        if accepted:
            assert torch.equal(compiled(2, 4, 4, attention_mask=mask), mask[:, None, None])
        else:
            with pytest.raises(RuntimeError, match="padding between new tokens of a row"):
                compiled(2, 4, 4, attention_mask=mask)


ON_THE_DEVICE = """
import torch, transformers
from vllm_kivi.transformers import KiviCache

config = transformers.LlamaConfig(**{sizes})
with torch.device("{device}"):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kivi")
    ids = torch.randint(2, 90, (3, 8))
    mask = torch.tensor([[1] * 8, [0] + [1] * 7, [1] * 8])
cache = KiviCache(model.config, max_cache_len=8)
with torch.no_grad():
    model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    model(ids[:, 4:7], attention_mask=mask[:, :7], past_key_values=cache)
    model(ids[:, 7:], attention_mask=mask, past_key_values=cache)
    print(cache.get_seq_length().item(), flush=True)
    if "{fault}" == "padding":
        cache.reset()
        mask[0, 1] = 0
        model(ids, attention_mask=mask, past_key_values=cache)
    else:
        model(ids[:, :1], past_key_values=cache)
print(cache.get_seq_length().item())
"""


@pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("padding", "padding between new tokens of a row"),
        ("overflow", "the tokens do not fit a cache of max_cache_len=8"),
    ],
)
def test_what_only_a_gpu_knows_ends_there(fault, message):
    """In a process of its own, which loses the GPU by it."""
    code = ON_THE_DEVICE.format(device=DEVICE, fault=fault, sizes=SIZES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == "8\n"
    assert message in done.stderr


@pytest.mark.parametrize(("first", "then"), [("kivi", "sdpa"), ("sdpa", "kivi")])
def test_attention_that_changes_with_padding(llama, tmp_path, first, then):
    """One stores what the other leaves out: silently wrong answers of the padded row."""
    said, mask = ids(60, 2, 2), torch.ones(2, 60, dtype=torch.long, device=DEVICE)
    mask[0, :11] = 0
    for saved in (False, True):
        cache = KiviCache(llama.config)
        llama.set_attn_implementation(first)
        run(llama, cache, said[:, :50], [50], mask)
        if saved:
            cache.save(tmp_path / "cache")
            cache = KiviCache.load(tmp_path / "cache", llama.config)
        llama.set_attn_implementation(then)
        with pytest.raises(ValueError, match="attention has changed"):
            run(llama, cache, said[:, 50:], [10], mask)
    cache.reset()
    run(llama, cache, said, [60], mask)


def test_gradients_are_refused(llama):
    with (
        torch.inference_mode(False),
        pytest.raises(ValueError, match=r"no gradients; run the model under torch.no_grad"),
    ):
        llama(ids(10), past_key_values=KiviCache(llama.config))


@pytest.mark.parametrize("attention", ["kivi", "sdpa"])
@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        (
            {"num_key_value_heads": 4},
            torch.float32,
            "keys of 4 heads of 64 in float32 do not fit this cache of 2 heads",
        ),
        ({"head_dim": 128}, torch.float32, "keys of 2 heads of 128 in float32 do not fit this cache of 2 heads of 64"),
        ({}, torch.bfloat16, "in bfloat16 do not fit .* in float32; use the model and dtype that it was made with"),
    ],
)
def test_another_models_steps_are_refused(llama, attention, num_new, settings, dtype, message):
    cache = KiviCache(llama.config)
    run(llama, cache, ids(50), [50])
    other = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES | settings)).to(DEVICE, dtype)
    for model in (llama, other):
        model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=message):
        other(ids(num_new), past_key_values=cache)


@only_cpu
def test_refused_steps(llama):
    cache = KiviCache(llama.config)
    run(llama, cache, ids(20), [20])
    with pytest.raises(ValueError, match="a batch of 2 rows does not fit this cache of 1"):
        run(llama, cache, ids(1, rows=2), [1])
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, 25] = 0
    with pytest.raises(ValueError, match="padding between new tokens of a row"):
        llama(ids(10), past_key_values=cache, attention_mask=mask)
    run(llama, cache, ids(1), [1])  # nothing has happened to the cache
    cache.update(*torch.zeros(2, 1, 2, 1, 64), 0)
    with pytest.raises(ValueError, match="never got the keys of the last step"):
        run(llama, cache, ids(1), [1])
    cache.reset()
    with pytest.raises(ValueError, match=r"attention_mask has 5 columns, .* 10 tokens; pass the mask of all tokens"):
        llama(ids(10), past_key_values=cache, attention_mask=mask[:, :5])
    fixed = KiviCache(llama.config, max_cache_len=100)
    run(llama, fixed, ids(20), [19, 1])
    with pytest.raises(ValueError, match=r"attention_mask has 1 columns, .* 21 tokens; pass the mask of all tokens"):
        llama(ids(1), past_key_values=fixed, attention_mask=mask[:, :1])
    with pytest.raises(ValueError, match="does not support a mask that is not causal"):
        llama(ids(10), past_key_values=cache, attention_mask=torch.ones(1, 1, 10, 10).bool())
