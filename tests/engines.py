"""Tiny engines for the tests: a random Llama whose attention matters, stock vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VOCAB = 512
PROCESS_SETTINGS: dict[str, Any] = {
    "kv_cache_dtype": "kivi2",
    "dtype": "float32",
    "max_model_len": 2048,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def save_tiny_llama(path: Path, **overrides: Any) -> Path:
    """Write a random Llama (2 layers, 6 query heads, 2 KV heads, head_dim 64) with weights so large that its outputs
    depend on what is far back in the context."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 384,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | overrides
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(path)
    return path


@contextmanager
def engine(model: Path, kv_cache_dtype: str = "kivi2", **overrides: Any) -> Iterator[Any]:
    """An in-process vLLM engine, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    in_process = {"enforce_eager": True, "distributed_executor_backend": "uni", "kv_cache_dtype": kv_cache_dtype}
    llm = None
    try:
        llm = LLM(str(model), **(PROCESS_SETTINGS | in_process | overrides))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def generate(llm: Any, prompts: list[list[int]], max_tokens: int = 32, lora: Any = None, **sampling: Any) -> list[Any]:
    """Greedy by default, with the logprob of every chosen token."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        **(
            {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
            | sampling
        )
    )
    return llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False, lora_request=lora)


def tokens(output: Any, index: int = 0) -> list[int]:
    return list(output.outputs[index].token_ids)


def logprobs(output: Any, index: int = 0) -> torch.Tensor:
    completion = output.outputs[index]
    return torch.tensor(
        [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    )


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-3) -> None:
    """Identical tokens, and logprobs within the tolerance."""
    assert tokens(actual) == tokens(expected)
    torch.testing.assert_close(logprobs(actual), logprobs(expected), atol=tolerance, rtol=0)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert tokens(actual) == tokens(expected)
    changed = (logprobs(actual) != logprobs(expected)).nonzero().flatten().tolist()
    assert not changed, f"logprobs differ at output tokens {changed}"
