"""Families of models through the engine, against an oracle that shares nothing with it: tests/oracle.py.

Each is a tiny random model. Its prompts are prefilled in chunks, and greedy tokens follow; the log-probabilities of all
tokens must be those of the oracle, which the oracle without quantization must miss by far.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import VOCAB, engine, generate, prompt, tokens
from oracle import logprobs

from vllm_kivi.options import PUBLISHED, KiviOptions

CHUNK = 160  # not a multiple of the window, nor of vLLM's pages
LENGTHS = (600, 457, 390, 350)
DECODED = 40  # more than a group
TOLERANCE = 2e-4  # ten times the differences seen, which are those of float32

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,  # transformers takes the short factors below it, vLLM by max_model_len
    "short_factor": [1.0] * 32,
    "long_factor": [1.0 + 0.1 * i for i in range(32)],
}
ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}


@dataclass
class Family:
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    cache: str = "kivi2"
    options: dict[str, Any] = field(default_factory=lambda: PUBLISHED)
    sliding: tuple[int, ...] = ()  # layers that keep their full-precision cache


# Where options are {} the defaults of the cache dtype are tested as well: sinks, scale search, rotated values.
FAMILIES = {
    "llama3": Family("LlamaConfig", {"rope_scaling": LLAMA3_ROPE}, "kivi2_boost", {}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 128}, options={}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, "kivi_k4v2"
    ),
    "mistral": Family("MistralConfig", {"sliding_window": None}, "kivi4"),
    "phi3": Family("Phi3Config", {"partial_rotary_factor": 0.75}),
    "phi3_longrope": Family("Phi3Config", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 256}),
    "gemma2": Family(
        "Gemma2Config",
        ALTERNATING
        | {
            "sliding_window": 96,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 8.0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
        sliding=(0, 2),
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        ALTERNATING
        | {"head_dim": 256, "sliding_window": 96, "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
        sliding=(0, 2),
    ),
    "gpt2": Family("GPT2Config", {"n_positions": 2048, "tie_word_embeddings": True}),
    "opt": Family("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 256}),
    "granite": Family(
        "GraniteConfig",
        {"attention_multiplier": 0.1, "residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig",
        MAMBA
        | {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 128,
            "attention_multiplier": 0.1,
        },
    ),
    "falcon_h1": Family("FalconH1Config", MAMBA | {"mamba_d_ssm": 512}),
}


def save(path: Path, config: str, settings: dict[str, Any]) -> Path:
    """Write a random model in which attention, biases and norms matter, as they do not with initial weights."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(SIZES | settings)))
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.add_(0.2 * torch.randn_like(weight))
            elif weight is model.get_input_embeddings().weight:
                weight.normal_(0, 0.05 if tied else 1)
            else:
                transposed = type(model).__name__ == "GPT2LMHeadModel" and ".c_" in name  # [inputs, outputs]
                weight.normal_(0, 1.8 / weight.shape[0 if transposed else -1] ** 0.5)
    model.save_pretrained(path)
    return path


def engine_logprobs(llm: Any, length: int) -> tuple[list[int], torch.Tensor]:
    """A prompt and what follows it greedily, and the log-probability of each token after the first."""
    (output,) = generate(llm, [prompt(length, length)], max_tokens=DECODED, prompt_logprobs=0)
    said = [*output.prompt_token_ids, *tokens(output)]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return said, torch.tensor([entry[token].logprob for entry, token in zip(entries, said[1:], strict=True)])


@pytest.fixture
def logged(monkeypatch):
    """The lines that the plugin logs in this test; vLLM's loggers do not reach pytest's."""
    from vllm_kivi.backend import backend

    lines: list[str] = []
    for method in ("info", "info_once"):
        monkeypatch.setattr(backend.logger, method, lambda message, *values, **_: lines.append(message % values))
    return lines


@pytest.mark.parametrize("name", FAMILIES)
def test_family(tmp_path, logged, name):
    family = FAMILIES[name]
    path = save(tmp_path, family.config, family.settings)
    options = {"additional_config": {"kivi": family.options}, "max_num_batched_tokens": CHUNK, "max_num_seqs": 1}
    with engine(path, family.cache, **options) as llm:
        results = [engine_logprobs(llm, length) for length in LENGTHS]
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups for _ in group.layer_names]
    assert kinds.count("FullAttentionSpec") == kinds.count("FullPrecisionSpec") == 2
    assert kinds.count("SlidingWindowSpec") == len(family.sliding)
    if family.sliding:
        names = ", ".join(f"model.layers.{i}.self_attn.attn" for i in family.sliding)
        assert any("sliding-window layers keep their full-precision cache" in line for line in logged)
        assert any(f"2 layers quantized, {len(family.sliding)} skipped: {names}" in line for line in logged)

    def make_format(head_dim: int, num_kv_heads: int) -> Any:
        return KiviOptions(**family.options).format(family.cache, head_dim, num_kv_heads, "float32")

    largest = []
    for length, (said, actual) in zip(LENGTHS, results, strict=True):
        error = (actual - logprobs(path, said, length, CHUNK, make_format)).abs()
        unquantized = (actual - logprobs(path, said, length, CHUNK, None)).abs()
        # The first chunk reads itself in full precision; what follows reads it quantized.
        assert unquantized[: CHUNK - 1].max() < TOLERANCE
        assert unquantized[2 * CHUNK : length].mean() > 50 * TOLERANCE
        assert unquantized[length:].mean() > 50 * TOLERANCE
        # Both sides compute alike but for the order of sums, which can move an element over the edge between two codes:
        # one of 200,000, in every sixth prompt. That is seen as 0.0005 to 0.04 in a few rows. So one prompt without it
        # is enough for the tolerance, and in all of them the mean is small.
        assert error.mean() < 0.05 * unquantized.mean()
        largest.append(error.max().item())
    assert min(largest) < TOLERANCE, largest


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}, "learned attention sinks"),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}, "ALiBi"),
        ("Llama4TextConfig", {"attention_chunk_size": 128, "num_local_experts": 2}, "ChunkedLocalAttention"),
        ("MistralConfig", {"sliding_window": 200}, "sliding window"),
    ],
)
def test_refused(tmp_path, config, settings, reason):
    """At start, in one line, with what to use instead."""
    import transformers

    model_config = getattr(transformers, config)(**(SIZES | settings))
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
    (tmp_path / "config.json").write_text(
        json.dumps(model_config.to_dict() | {"architectures": [model_class.__name__]}, default=str)
    )
    message = f"kivi: --kv-cache-dtype kivi2 .*{reason}.*; .*use .*auto or fp8"
    with pytest.raises(ValueError, match=message), engine(tmp_path, load_format="dummy"):
        pass


def test_no_layer_quantized(tmp_path):
    """All layers skipped: a cache that stays unquantized is refused."""
    path = save(tmp_path, "LlamaConfig", {})
    with pytest.raises(ValueError, match="quantizes no layer"), engine(path, kv_cache_dtype_skip_layers=["0", "1"]):
        pass


def test_layers_that_get_no_cache_dtype(tmp_path):
    """vLLM makes Falcon's attention layers without one."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    falcon = sizes | {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False}
    (tmp_path / "config.json").write_text(json.dumps(falcon))
    with pytest.raises(ValueError, match="get no cache dtype"), engine(tmp_path, load_format="dummy"):
        pass
