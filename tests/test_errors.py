"""Bad input: an error at start that names the option and what is accepted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def start(path, config, **settings):
    from vllm import LLM

    (path / "config.json").write_text(json.dumps(config))
    return LLM(
        str(path),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        **({"kv_cache_dtype": "kivi2", "dtype": "float32", "kv_cache_memory_bytes": 16 << 20} | settings),
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"group": 32}, ["'group'", "group_size", "residual_length", "full_precision"]),
        ({"group_size": 48}, ["group_size=48", "32, 64, 128"]),
        ({"group_size": "32"}, ["group_size='32'", "integer"]),
        ({"residual_length": -1}, ["residual_length=-1", "0 or more"]),
        ({"residual_length": 10**12}, ["residual_length=1000000000000", "0 to 2147483647"]),
        ({"sink_tokens": 1.5}, ["sink_tokens=1.5", "0 or more"]),
        ({"full_precision": "yes"}, ["full_precision='yes'", "true, false"]),
        ({"scale_search": 1}, ["scale_search=1", "true, false"]),
        ({"rotate_values": None}, ["rotate_values=None", "true, false"]),
        ({"boosted_fraction": 2}, ["boosted_fraction=2", "4, 8"]),
        ({"boosted_fraction": 4.0}, ["boosted_fraction=4.0", "integer"]),
        ({"boosted_fraction": 8}, ["boosted_fraction=8", "kivi2;", "kivi2_boost"]),
        (["group_size"], ["mapping"]),
    ],
)
def test_bad_options(tmp_path, options, named):
    with pytest.raises(ValueError) as error:
        start(tmp_path, LLAMA, additional_config={"kivi": options})
    for words in named:
        assert words in str(error.value)


@pytest.mark.parametrize("entry", ["group_size", "kivi2", "Kivi", "vllm-kivi"])
def test_options_elsewhere_would_have_no_effect(tmp_path, entry):
    from vllm import EngineArgs

    given = {entry: {}, "kivi": {}, "other_plugin": {}}
    with pytest.raises(ValueError, match=rf'additional_config\["{entry}"\] would have no effect'):
        start(tmp_path, LLAMA, additional_config=given)
    arguments = {"model": str(tmp_path), "additional_config": given, "skip_tokenizer_init": True}
    EngineArgs(**arguments, kv_cache_dtype="auto").create_engine_config()  # it may be another plugin's


def test_an_unknown_option_is_refused_even_with_another_cache_dtype(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'groups'"):
        start(tmp_path, LLAMA, kv_cache_dtype="auto", additional_config={"kivi": {"groups": 1}})


def configure(path, kv_cache_dtype, options):
    """The engine's configuration."""
    from vllm import EngineArgs

    (path / "config.json").write_text(json.dumps(LLAMA))
    arguments = {"kv_cache_dtype": kv_cache_dtype, "additional_config": {"kivi": options}, "dtype": "bfloat16"}
    return EngineArgs(model=str(path), skip_tokenizer_init=True, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("kv_cache_dtype", "options", "block_size"),
    [("kivi2", {}, 32), ("kivi2_boost", {}, 64), ("kivi2_boost", {"group_size": 128}, 128)],
)
def test_the_block_size_is_the_group_size_of_the_cache_dtype(tmp_path, kv_cache_dtype, options, block_size):
    assert configure(tmp_path, kv_cache_dtype, options).cache_config.block_size == block_size


@pytest.mark.parametrize("block_size", [16, 48])
def test_bad_block_size(tmp_path, block_size):
    with pytest.raises(ValueError, match=f"block size {block_size} is not a multiple of group_size=32"):
        start(tmp_path, LLAMA, block_size=block_size)


@pytest.mark.parametrize("entry", ["1", "-1", "00", "model.layers.0.self_attn.attn"])
def test_a_skipped_layer_that_is_none(tmp_path, entry):
    """vLLM leaves no layer out for it."""
    with pytest.raises(ValueError, match=rf"skip-layers {entry} names no layer .* accepted: 0 to 0, sliding_window"):
        start(tmp_path, LLAMA, kv_cache_dtype_skip_layers=["0", entry])


def test_bad_head_size(tmp_path):
    with pytest.raises(ValueError, match="head size 48; accepted: 64, 80, 96, 128, 256"):
        start(tmp_path, LLAMA | {"head_dim": 48})


def test_a_model_of_sliding_windows_alone(tmp_path):
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
    with pytest.raises(ValueError, match="would quantize nothing: every attention layer of this model has a sliding"):
        start(tmp_path, mistral)


def test_unknown_cache_dtype_lists_ours(tmp_path):
    with pytest.raises(ValueError, match="kivi2"):
        start(tmp_path, LLAMA, kv_cache_dtype="kivi3")


def test_mla_model(tmp_path):
    mla = LLAMA | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    }
    del mla["head_dim"]
    with pytest.raises(ValueError, match="MLA"):
        start(tmp_path, mla)


def test_encoder_decoder_model(tmp_path):
    from transformers import WhisperConfig, WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=80).save_pretrained(tmp_path)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    config = WhisperConfig(vocab_size=128, d_model=256, **sizes, encoder_attention_heads=4, decoder_attention_heads=4)
    config.architectures = ["WhisperForConditionalGeneration"]
    with pytest.raises(ValueError, match="encoder-decoder"):
        start(tmp_path, config.to_dict())


def test_encoder_only_layers():
    from vllm.v1.attention.backend import AttentionType

    from vllm_kivi.backend import backend

    layer = SimpleNamespace(
        kv_cache_dtype="kivi2", use_mla=False, use_sparse=False, attn_type=AttentionType.ENCODER_ONLY
    )
    with pytest.raises(ValueError, match="not encoder_only; use auto"):
        backend.select(layer)


def test_the_hybrid_cache_manager_is_needed(tmp_path):
    with pytest.raises(ValueError, match="disable-hybrid-kv-cache-manager"):
        start(tmp_path, LLAMA, disable_hybrid_kv_cache_manager=True)


def test_a_cache_too_small_for_one_request(tmp_path):
    with pytest.raises(ValueError, match=r"max_model_len|max-model-len"):
        start(tmp_path, LLAMA | {"max_position_embeddings": 400_000}, kv_cache_memory_bytes=1 << 20)


def test_errors_name_the_layer_feature(tmp_path):
    """Features that only a layer knows: the engine does not start, whatever the model's configuration said."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_kivi.backend.impl import KiviImpl

    with set_current_vllm_config(VllmConfig()):
        for settings, words in (
            ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
            ({"sliding_window": 64}, "sliding windows"),
            ({"kv_sharing_target_layer_name": "other"}, "share"),
        ):
            with pytest.raises(ValueError, match=words):
                KiviImpl(4, 64, 1.0, 2, kv_cache_dtype="kivi2", **settings)


def test_versions(monkeypatch):
    import vllm.version

    from vllm_kivi import compat

    compat.check_version()
    monkeypatch.setattr(vllm.version, "__version_tuple__", (0, 31, 0))
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.32, 0\.33, not"):
        compat.check_version()


def test_registration_is_idempotent():
    from typing import get_args

    import vllm.config.cache as cache
    from vllm.platforms import current_platform

    from vllm_kivi import plugin

    before = type(current_platform).get_attn_backend_cls
    plugin.register()
    plugin.register()
    accepted = getattr(cache, "KV_CACHE_DTYPES", get_args(cache.CacheDType))
    assert accepted.count("kivi2") == 1
    assert type(current_platform).get_attn_backend_cls == before
