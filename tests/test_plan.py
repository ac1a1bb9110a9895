"""`vllm-kivi plan`: its figures by hand, against vLLM's own code, and against engines that have so much memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import torch

from vllm_kivi import cli, plan
from vllm_kivi.evaluate.session import Candidate
from vllm_kivi.format import DTYPE_BYTES, HEAD_DIMS, PRESETS, KVFormat
from vllm_kivi.options import PUBLISHED, KiviOptions
from vllm_kivi.plan import pages
from vllm_kivi.plan.model import read_config, read_shapes

GIB = 1 << 30
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
# Two layers of 2 KV heads of 64; hybrids of it say which layers do what.
TINY = LLAMA_8B | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
GEMMA = TINY | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 64, "sliding_window": 512}


@pytest.fixture
def model(tmp_path):
    """Writes a folder with this config.json and nothing else."""

    def write(config, name="model"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def settings(model, *kv_cache_dtypes, **overrides):
    """32 GiB for the cache of each GPU."""
    round_numbers = {"gpu_memory": 32.0, "gpu_memory_utilization": 1.0, "weights_gib": 0.0, "reserve_gib": 0.0}
    return plan.Settings(model, kv_cache_dtypes, **(round_numbers | overrides))


def run(*args, **overrides):
    return plan.run(settings(*args, **overrides))


def results(report):
    return {result["kv_cache_dtype"]: result for result in report["results"]}


# -- by hand --------------------------------------------------------------------------------------------------------


def test_llama_8b_by_hand(model):
    """128 channels, 8 KV heads, 32 layers; 32,768 tokens.

    auto: 2 * 2 * 128 * 8 * 32 = 131,072 bytes a token; 16 tokens a block, 2,048 blocks a request.
    kivi2: of 32 tokens and a head 2 * 1,024 bytes of codes, 2 * 256 of key and 2 * 256 of value scales and zeros are
    3,072: a page has 24,576. 6 tokens of 4,096 bytes fit into it: the window of 160 has at most 27 + 1 pages, sinks 1.
    A request has 1,024 + 29 pages.
    kivi2_boost: of 64 tokens and a head 2,048 + 512 + 512 + 2,048 + 512 = 5,632 bytes: a page has 45,056. Of the 11
    tokens that fit, 10 keep hits at 320 tokens: the window of 192 has at most 20 + 1 pages, sinks 1.
    A request has 512 + 22 pages.
    """
    own = results(run(model(LLAMA_8B)))
    assert list(own) == ["auto", "fp8", *PRESETS]
    keys = ("bits", "bytes_per_token", "request_bytes", "requests", "capacity_tokens")
    figures = {name: tuple(result[key] for key in keys) for name, result in own.items()}
    # 32 GiB are 16,384 blocks of 16 tokens of auto, 43,690 of kivi2, 23,831 of kivi2_boost; one of them is no page.
    assert figures["auto"] == (16, 131_072, 4_294_967_296, 7, 262_144)
    assert figures["fp8"] == (8, 65_536, 2_147_483_648, 15, 524_288)
    assert figures["kivi2"] == (3, 24_576, 1053 * 24_576 * 32, 41, 43_690 * 32_768 // 1053)
    assert figures["kivi2_boost"] == (2.75, 22_528, 534 * 45_056 * 32, 44, 23_831 * 32_768 // 534)
    assert {name: result["bits"] for name, result in own.items()} == {
        "auto": 16, "fp8": 8, "kivi2": 3, "kivi2_boost": 2.75, "kivi_k4v2": 4, "kivi4": 5, "kivi8": 9,
    }  # fmt: skip
    assert own["kivi2"]["compression"] == 4_294_967_296 / (1053 * 24_576 * 32)


def test_compression_by_length_by_hand(model):
    """Of kivi2: a page of 24,576 bytes holds 32 tokens, or 6 of the window; the same tokens are 5.33 pages of auto."""
    report = run(model(LLAMA_8B), "kivi2", "kivi2:sink_tokens=0")
    assert report["lengths"] == [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
    sinks, none = (results(report)[name]["compression_by_length"] for name in ("kivi2", "kivi2:sink_tokens=0"))
    assert sinks == pytest.approx([n * 4096 / 24_576 / (n / 32 + 29) for n in report["lengths"]])
    assert none == pytest.approx([n * 4096 / 24_576 / (n / 32 + 28) for n in report["lengths"]])
    assert results(report)["auto"]["compression_by_length"] == [1] * 8


def test_a_short_request_has_no_more_pages_than_tokens(model):
    """Of 40 tokens kivi2 has 2 quantized pages and 7 of the window."""
    assert results(run(model(LLAMA_8B), "kivi2", context=40))["kivi2"]["request_blocks"] == 2 + 7


def test_the_default_reserve_is_about_what_vllm_measured(model):
    """benchmarks/results/nvidia-h100-80gb-hbm3.md: 0.85 of the memory, max_model_len 8,448, 16,384 tokens a step."""
    published = {"kivi": {name: PUBLISHED[name] for name in ("sink_tokens", "scale_search", "rotate_values")}}
    own = plan.Settings(
        model(LLAMA_8B), ("kivi2",), additional_config=published, context=8448, gpu_memory_utilization=0.85
    )
    report = plan.run(own)
    assert report["memory"]["weights_bytes"] == 2 * 8_030_261_248
    for name, measured in (("auto", 404_672), ("kivi2", 1_962_048)):
        assert 0.98 * measured < results(report)[name]["capacity_tokens"] < measured


# -- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_kv_heads_are_divided_and_at_least_one(model, size, heads):
    report = run(model(LLAMA_8B), "kivi2", tensor_parallel_size=size, weights_gib=16.0)
    assert results(report)["auto"]["bytes_per_token"] == heads * 2 * 2 * 128 * 32
    assert results(report)["kivi2"]["bytes_per_token"] == heads * 96 * 32
    assert report["memory"]["available_bytes"] == 32 * GIB - 16 * GIB // size


@pytest.mark.parametrize("num_layers", [8, 30, 31, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_pipeline_stages_are_vllms(num_layers, size):
    from vllm.distributed.utils import get_pp_indices

    expected = tuple(range(*get_pp_indices(num_layers, rank, size)) for rank in range(size))
    assert pages._stages(num_layers, size) == expected


def test_a_stage_holds_its_own_layers(model):
    own = results(run(model(LLAMA_8B), "kivi2", pipeline_parallel_size=5))
    assert own["kivi2"]["bytes_per_token"] == 8 * 96 * 7  # 6, 6, 7, 7, 6 layers


def test_head_dim_may_be_absent_or_stated(model):
    assert run(model(LLAMA_8B))["shapes"]["head_dim"] == 4096 // 32
    assert run(model(LLAMA_8B | {"head_dim": 64}))["shapes"]["head_dim"] == 64


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "multi_query": True}, 1),
        (
            {
                "model_type": "falcon",
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
            },
            8,
        ),
        ({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12}, 12),
        ({"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 4, "attn_config": {"kv_n_heads": 8}}, 8),
    ],
)
def test_kv_heads_under_other_names(model, config, heads):
    assert run(model(config), "fp8")["shapes"]["num_kv_heads"] == heads


@pytest.mark.parametrize(
    ("config", "option", "dtype"),
    [
        ({"torch_dtype": "float16"}, "auto", "float16"),
        ({"torch_dtype": "float32"}, "auto", "bfloat16"),
        ({"torch_dtype": None}, "auto", "bfloat16"),
        ({"torch_dtype": "float16"}, "float32", "float32"),
        ({"torch_dtype": "bfloat16"}, "half", "float16"),
    ],
)
def test_dtype(model, config, option, dtype):
    report = run(model(TINY | config), "kivi2", dtype=option)
    assert report["shapes"]["dtype"] == dtype
    assert results(report)["auto"]["bytes_per_token"] == 2 * 64 * 2 * 2 * DTYPE_BYTES[dtype]


def test_the_language_model_of_a_multimodal_one(model):
    text = TINY | {"model_type": "mistral", "sliding_window": None, "head_dim": 64}
    config = {"model_type": "llava", "torch_dtype": "float16", "text_config": text, "vision_config": {}}
    report = run(model(config), "kivi2")
    shapes = report["shapes"]
    assert (shapes["dtype"], shapes["full"], shapes["head_dim"]) == ("float16", (0, 1), 64)


def test_sliding_windows_by_hand(model):
    """12 layers, every second one with a window of 512, 2 KV heads of 64 in bfloat16: 512 bytes a token and layer.

    auto: two groups of 6 layers, a block of 16 tokens is 49,152 bytes. 32,768 tokens are 2,048 blocks, 511 of a window
    and 2 * 512 in flight 96 + 1.
    kivi2: a page of 32 tokens in full precision has 16,384 bytes; of the 2 * 48 bytes that a quantized token takes it
    holds 160 (170, in whole groups), or n of 512 bytes: 32. Three groups of 6 layers: 205 blocks, at most 5 + 1 of the
    window of 160 and 1 of sinks, and 48 + 1 of the sliding window.
    """
    report = run(model(GEMMA | {"num_hidden_layers": 12}), "kivi2", max_num_batched_tokens=512)
    assert report["shapes"]["sliding"] == (0, 2, 4, 6, 8, 10)
    auto, kivi2 = (results(report)[name] for name in ("auto", "kivi2"))
    assert (auto["block_bytes"], auto["request_blocks"]) == (49_152, 2048 + 97)
    assert (kivi2["block_bytes"], kivi2["request_blocks"]) == (6 * 16_384, 205 + 7 + 49)
    assert (auto["bytes_per_token"], kivi2["bytes_per_token"]) == (6 * 512, 6 * 16_384 / 160)
    assert kivi2["bits"] == pytest.approx(16_384 * 8 / (160 * 2 * 128))
    assert any("6 layers have a sliding window of 512 tokens" in note for note in report["notes"])


def test_layers_are_dealt_out_to_groups_as_vllm_does(model):
    """18 layers, every sixth one with all tokens: groups of 3. With 7 of 16 instead: one group of 9 for each kind."""
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    own = results(run(model(GEMMA | {"num_hidden_layers": 18, "layer_types": types}), max_num_batched_tokens=512))
    assert (own["auto"]["block_bytes"], own["auto"]["request_blocks"]) == (3 * 8192, 2048 + 5 * 97)
    types = ["full_attention"] * 7 + ["sliding_attention"] * 9
    own = results(run(model(GEMMA | {"num_hidden_layers": 16, "layer_types": types}), max_num_batched_tokens=512))
    assert (own["auto"]["block_bytes"], own["auto"]["request_blocks"]) == (9 * 8192, 2048 + 97)
    assert own["auto"]["bytes_per_token"] == 9 * 512  # with two layers of padding


def test_where_all_layers_slide_only_the_models_own_cache_is_planned(model):
    path = model(TINY | {"model_type": "mistral", "sliding_window": 4096, "head_dim": 64})
    with pytest.raises(ValueError, match="kivi2 would quantize nothing: every attention layer"):
        run(path, "kivi2")
    auto, fp8 = results(run(path, "fp8", block_size=32)).values()
    assert auto["bits"] == 16 and auto["request_bytes"] == 2 * fp8["request_bytes"]
    assert auto["bytes_per_token"] == 0


@pytest.mark.parametrize(
    ("config", "context", "positions"),
    [
        (TINY | {"max_position_embeddings": 4096}, 4096, None),
        (TINY | {"max_position_embeddings": 4096}, 4097, "4,096"),
        (TINY | {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 8192, None),
        (
            TINY | {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            8193,
            "8,192",
        ),
        (
            TINY
            | {
                "max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048},
            },
            4097,
            "4,096",
        ),
        ({"model_type": "gpt2", "n_positions": 1024}, 1025, "1,024"),
        ({"model_type": "bloom", "n_head": 1}, 1 << 20, None),
    ],
)
def test_a_context_beyond_the_models_positions_is_said(model, config, context, positions):
    """With vLLM's own arithmetic."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    folder = model(config)
    text = read_config(folder)[0].get_text_config()
    own = ModelArchConfigConvertorBase(text, text).derive_max_model_len_and_key()
    arch = SimpleNamespace(derived_max_model_len_and_key=own)
    notes = " ".join(run(folder, "auto", context=context)["notes"])
    assert ("positions" in notes) == (positions is not None)
    if positions is None:
        assert _get_and_verify_max_len(text, arch, None, context, False, None) == context
    else:
        assert f"The model has {positions} positions" in notes
        with pytest.raises(ValueError, match="greater than the derived max_model_len"):
            _get_and_verify_max_len(text, arch, None, context, False, None)


def test_states_are_not_counted_and_that_is_said(model):
    config = {
        "model_type": "jamba",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 3,
        "torch_dtype": "bfloat16",
    }
    report = run(model(config), "kivi2")
    assert report["shapes"]["full"] == (3, 7)
    assert results(report)["kivi2"]["bytes_per_token"] == 2 * 2 * 48
    assert any(note.startswith("6 layers hold no tokens") for note in report["notes"])


# -- one truth with the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"residual_length": 0}, {"group_size": 64, "sink_tokens": 30}])
@pytest.mark.parametrize("speculative", [0, 5])
def test_the_specs_windows_are_the_formats(options, speculative):
    from vllm_kivi.backend.backend import full_precision_spec

    fmt = KVFormat("kivi2", 128, 8, "bfloat16", **options)
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096), num_speculative_tokens=speculative)
    spec = full_precision_spec(config, fmt)
    for length in (1, 5, 6, 7, 100, 160, 165, 166, 171, 172, 4096):
        window = -(-(fmt.residual_length + fmt.group_size + speculative) // spec.block_size) + 1
        by_hand = min(window + -(-fmt.sink_tokens // spec.block_size), -(-length // spec.block_size))
        assert spec.window_blocks(length) == fmt.window_pages(length, speculative) == by_hand


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_pages_beside_full_precision_are_filled(preset, head_dim):
    """As large as those of layers that are not quantized, with as many whole groups as they hold."""
    own = KiviOptions().format(preset, head_dim, 4, "bfloat16")
    beside = own.beside_full_precision()
    assert beside.padded_page_bytes == 4 * own.page_tokens * 2 * head_dim * 2
    group_bytes = 4 * own.group_size * own.token_bytes
    assert beside.page_tokens % own.group_size == 0
    assert beside.padded_page_bytes - group_bytes < 4 * beside.page_tokens * own.token_bytes <= beside.padded_page_bytes


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_8B | {"model_type": "deepseek_v3", "kv_lora_rank": 64},
        {"model_type": "t5", "torch_dtype": "bfloat16"},
        TINY | {"head_dim": 48},
        TINY | {"model_type": "mistral", "sliding_window": 4096, "head_dim": 64},
    ],
)
@pytest.mark.parametrize("preset", ["kivi2", "kivi4"])
def test_refusals_are_the_engines(model, config, preset):
    from vllm_kivi.backend.backend import check_config

    shapes = read_shapes(read_config(model(config))[0], "auto")
    own = SimpleNamespace(
        use_mla=shapes.mla,
        is_encoder_decoder=shapes.encoder_decoder,
        dtype=torch.bfloat16,
        get_head_size=lambda: shapes.head_dim,
        get_sliding_window=lambda: shapes.window,
        hf_text_config=SimpleNamespace(),
    )
    cache_config = SimpleNamespace(cache_dtype=preset)
    with pytest.raises(ValueError) as engines_error:
        check_config(SimpleNamespace(cache_config=cache_config, model_config=own, additional_config={}))
    with pytest.raises(ValueError) as error:
        run(model(config), preset)
    assert str(error.value) == str(engines_error.value)


def most_running(llm, count, length, new_tokens):
    """How many of `count` requests that end at `length` tokens run side by side."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    for index in range(count):
        prompt = TokensPrompt(prompt_token_ids=engines.prompt(length - new_tokens, index))
        llm.llm_engine.add_request(str(index), prompt, params)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    most = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, len(scheduler.running))
    return most


def planned_pool(llm, model, kv_cache_dtype, context, dtype):
    """What is planned for an engine that runs here."""
    config = llm.llm_engine.vllm_config
    own = settings(
        str(model),
        dtype=dtype,
        context=context,
        # Other than on GPUs: there 16, and two steps in flight.
        block_size=config.cache_config.block_size if kv_cache_dtype == "auto" else None,
        max_num_batched_tokens=config.max_in_flight_tokens // 2,
    )
    shapes = read_shapes(read_config(own.model)[0], own.dtype)
    return pages.pool(shapes, Candidate.parse(kv_cache_dtype), own)


def check_capacity(llm, model, kv_cache_dtype, context, available):
    """The engine's pool, to the block and to the token. Returns how many requests are planned to fit."""
    cache = llm.llm_engine.vllm_config.cache_config
    pool = planned_pool(llm, model, kv_cache_dtype, context, "float32")
    assert available // pool.block_bytes == cache.num_gpu_blocks
    assert pool.capacity(available, context) == cache.kv_cache_size_tokens
    assert cache.num_gpu_blocks / pool.blocks(context) == cache.kv_cache_max_concurrency
    return pool.requests(available, context)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize(("kv_cache_dtype", "planned"), [("auto", 3), ("kivi2", 11), ("kivi2_boost", 10)])
def test_engines_have_the_capacity_that_is_planned(in_process, tmp_path, kv_cache_dtype, planned):
    tiny = engines.save_tiny_llama(tmp_path)
    context, available = 1024, 7_000_000
    memory = {"max_model_len": context, "kv_cache_memory_bytes": available, "max_num_batched_tokens": 16384}
    with engines.engine(tiny, kv_cache_dtype, **memory) as llm:
        fits = check_capacity(llm, tiny, kv_cache_dtype, context, available)
        running = most_running(llm, fits + 3, context, 8)
    assert fits == planned
    # Windows are counted at their longest, and a prompt needs a second one while it is computed.
    assert abs(running - fits) <= (kv_cache_dtype != "auto")


def test_an_engine_with_sliding_windows_has_the_capacity_that_is_planned(in_process, model):
    config = {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "sliding_window": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    folder = model(config)
    memory = {"max_model_len": 2048, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 512}
    with engines.engine(Path(folder), "kivi2", load_format="dummy", **memory) as llm:
        assert check_capacity(llm, folder, "kivi2", 2048, 64 << 20) > 1


# -- weights, errors and the command --------------------------------------------------------------------------------


def test_weights_are_those_of_the_files(model):
    folder = Path(model(TINY))
    parameters = run(str(folder), weights_gib=None)["memory"]
    # 2 embeddings; of 2 layers q and o, k and v, the MLP and norms; the last norm.
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 14336 + 2 * 256
    assert parameters["weights_bytes"] == 2 * (2 * 128256 * 256 + 2 * layer + 256)
    assert parameters["weights_from"].endswith("parameters in bfloat16")
    for name, size, expected in (
        ("consolidated.safetensors", 500, (500, "1 safetensors files")),
        ("model-1.safetensors", 1000, (1000, "1 safetensors files")),
        ("model-2.safetensors", 24, (1024, "2 safetensors files")),
    ):
        (folder / name).write_bytes(bytes(size))
        memory = run(str(folder), weights_gib=None)["memory"]
        assert (memory["weights_bytes"], memory["weights_from"]) == expected
    index = {"metadata": {"total_size": 5 * GIB}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    memory = run(str(folder), weights_gib=None, tensor_parallel_size=2)["memory"]
    assert (memory["weights_bytes"], memory["weights_from"]) == (5 * GIB, "model.safetensors.index.json")
    assert memory["available_bytes"] == 32 * GIB - 5 * GIB // 2
    stated = run(str(folder), weights_gib=2.0)["memory"]
    assert (stated["weights_bytes"], stated["weights_from"]) == (2 * GIB, "--weights-gib")


@pytest.mark.parametrize(
    ("config", "args", "words"),
    [
        (TINY, ["--kv-cache-dtype", "kivi3"], "accepted: auto, bfloat16, fp8, .*kivi2, kivi2_boost"),
        (TINY, ["--kv-cache-dtype", "kivi2:groups=3"], "unknown option 'groups'"),
        (TINY, ["--kv-cache-dtype", "kivi2", "--block-size", "48"], "multiple of group_size=32"),
        (TINY, ["--additional-config", '{"kivi": {"group_size": 48}}'], "accepted: 32, 64, 128"),
        (TINY, ["--dtype", "int8"], "--dtype int8"),
        (TINY, ["--weights-gib", "70"], "--tensor-parallel-size"),
        (TINY, ["--pipeline-parallel-size", "3"], "2 layers only"),
        (TINY, ["--additional-config", '{"group_size": 64}'], "would have no effect"),
        (TINY, ["--tensor-parallel-size", "3"], "does not divide 4 attention heads"),
        (
            TINY | {"num_attention_heads": 12, "hidden_size": 768, "num_key_value_heads": 6},
            ["--tensor-parallel-size", "4"],
            "neither divides 6 KV heads nor is a multiple",
        ),
        (TINY | {"layer_types": ["full_attention", "chunked_attention"], "model_type": "llama4_text"}, [], "chunked"),
        (TINY | {"model_type": "gpt_oss", "head_dim": 64}, [], "learned attention sinks"),
        ({"model_type": "falcon"}, [], "get no cache dtype"),
        (TINY | {"model_type": "unheard_of"}, [], "transformers cannot read it"),
        (TINY | {"num_attention_heads": 3, "head_dim": None}, [], "cannot read it: .*multiple of .* heads"),
        (TINY | {"num_hidden_layers": "2"}, [], "cannot read it: .*num_hidden_layers"),
        (TINY | {"dtype": "float8"}, [], "cannot read it: .*float8"),
        ({"model_type": "resnet"}, [], "resnet: num_hidden_layers is None"),
        ({"model_type": "rwkv"}, [], "rwkv: num_attention_heads is None"),
        ({"model_type": "mamba2"}, [], "no attention layers"),
        ({"model_type": "bert"}, [], "bert: an encoder, so there is no KV cache"),
        ({"model_type": "modernbert"}, [], "modernbert: an encoder"),
        ({"model_type": "clip"}, [], "clip: an encoder"),
        ({"model_type": "vit"}, [], "vit: an encoder"),
    ],
)
def test_errors_say_what_to_change(model, capsys, config, args, words):
    assert cli.main(["plan", model(config), *args]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("vllm-kivi: error: ")
    assert re.search(words, printed.err)


def test_a_model_that_is_nowhere(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "none.json"), "nobody/nothing"):
        with pytest.raises(ValueError, match=r"give the path of a config\.json"):
            run(name)


def test_what_the_engine_refuses_can_be_planned_without_it(model):
    assert list(results(run(model(TINY | {"head_dim": 48}), "fp8"))) == ["auto", "fp8"]
    with pytest.raises(ValueError, match="MLA"):
        run(model(LLAMA_8B | {"model_type": "deepseek_v3", "kv_lora_rank": 64}), "fp8")


def test_the_command_writes_table_json_and_plot(model, tmp_path, capsys):
    folder, out = model(LLAMA_8B, "Some-Model"), tmp_path / "out"
    args = ["plan", f"{folder}/config.json", "--context", "4096", "--weights-gib", "15", "--output", str(out)]
    common = ["--additional-config", '{"kivi": {"group_size": 64}}']
    assert cli.main([*args, *common, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "plan-some-model.json").read_text())
    assert printed["model"] == "Some-Model" and str(tmp_path) not in json.dumps(printed)
    assert results(printed)["kivi2"]["bits"] == 2 + 2 * 16 / 64
    text = (out / "plan-some-model.md").read_text()
    assert text == plan.table(printed) + "\n"
    assert "weights of 15.00 GiB (--weights-gib)" in text and "--reserve-gib" in text
    assert "| kivi2_boost    | 2.75" in text
    assert (out / "plan-some-model.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*args, *common]) == 0
    assert capsys.readouterr().out == text


def test_without_matplotlib_only_the_plot_is_missing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = ["plan", model(TINY), "--kv-cache-dtype", "kivi2", "--weights-gib", "1", "--output", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert "pip install 'vllm-kivi[bench]'" in capsys.readouterr().err
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md"]
