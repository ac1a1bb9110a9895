"""Greedy tokens under large constant key biases, as Qwen2.5 has them in its first and last layers.

The model follows a permutation by attention: its prompt holds every token once, and the answer to token i is the one
whose key matches what i asks for, which lies in quantized pages. So the right tokens are known without any cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import engine, generate, tokens
from torch import Tensor

from vllm_kivi.options import KiviOptions

SEED = 0
VOCAB = 512  # and tokens of a prompt
NUM_PROMPTS, MAX_TOKENS, CHUNK = 4, 24, 64
HEAD_DIM, NUM_KV_HEADS, QUERIES_PER_KV = 128, 2, 3
WIDTH = NUM_KV_HEADS * HEAD_DIM  # of a token's code, a third of the hidden state
ROPE_THETA = 1e6  # Qwen2.5's
FORMAT = KiviOptions().format("kivi2_boost", HEAD_DIM, NUM_KV_HEADS, "bfloat16")
# What a prompt's last chunk and all later tokens read quantized; kivi2's smaller groups reach no less far.
QUANTIZED = range(FORMAT.sink_tokens, FORMAT.boundary(VOCAB - CHUNK + 1))

# RoPE turns channels d and d + 64 together: the biased ones by 0.5 to 1.1 radians in a group of 64 tokens, so that
# their ranges are large; the ones that tokens are matched by, d of 34 or more, by at most 0.35 in a whole request.
BIASED = [d + half for d in range(19, 23) for half in (0, HEAD_DIM // 2)]
MATCHED = torch.arange(HEAD_DIM) % (HEAD_DIM // 2) >= 34
KEY_BIAS = 30.0  # where 1 is the standard deviation of keys in a channel
BIASED_SPREAD = 0.25  # the standard deviation in biased channels
MATCHED_QUERY = 3.0  # what codes are multiplied with in queries
BIASED_QUERY = 64.0  # norm of what all queries have in biased channels; the matched ones have 23


def successors_in_a_cycle() -> Tensor:
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(SEED))
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def lookup_prompt(successors: Tensor, seed: int) -> tuple[list[int], list[int]]:
    """All tokens in random order, the expected ones in quantized pages; and the expected ones."""
    generator = torch.Generator().manual_seed(seed)
    path = [int(torch.randint(VOCAB, (1,), generator=generator))]
    for _ in range(MAX_TOKENS):
        path.append(int(successors[path[-1]]))
    others = torch.tensor(sorted(set(range(VOCAB)) - set(path)))
    places = torch.randperm(len(QUANTIZED), generator=generator)[:MAX_TOKENS] + QUANTIZED.start
    prompt = torch.full((VOCAB,), -1)
    prompt[-1], prompt[places] = path[0], torch.tensor(path[1:])
    prompt[prompt < 0] = others[torch.randperm(len(others), generator=generator)]
    return prompt.tolist(), path[1:]


def level_query(bias: Tensor) -> Tensor:
    """Where queries may read biased channels [HEAD_DIM]: so that the bias adds nearly the same to the scores at all
    distances, as it must in any model that attends by content."""
    distances = torch.arange(VOCAB + MAX_TOKENS, dtype=torch.float64)
    angles = -distances[:, None] * ROPE_THETA ** -torch.arange(0, 1, 2 / HEAD_DIM, dtype=torch.float64)
    a, b = bias.double().chunk(2)
    turned = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)[:, BIASED]
    query = torch.zeros(HEAD_DIM)
    query[BIASED] = torch.linalg.eigh(torch.cov(turned.T)).eigenvectors[:, 0].float()
    return query


def save_lookup_qwen2(path: Path, successors: Tensor, key_bias: float) -> Path:
    """Write a Qwen2 of two layers, each of which looks up the successor of a token; without key biases its queries are
    the same.

    Hidden state: the token's code, its successor's, the sum of what was retrieved. Keys and values are made of the
    first, queries of the second, and the LM head compares the third with all codes.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=3 * WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=QUERIES_PER_KV * NUM_KV_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randn(VOCAB, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    for part in (MATCHED, ~MATCHED):  # every token matches itself equally well
        codes[..., part] *= (part.sum() / codes[..., part].square().sum(-1, keepdim=True)).sqrt()
    codes = codes.flatten(1)
    own, next_, retrieved = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3))
    spread = torch.ones(HEAD_DIM)
    spread[BIASED] = BIASED_SPREAD
    matched = MATCHED.repeat(QUERIES_PER_KV * NUM_KV_HEADS)[:, None]
    # From a code to the part of it that belongs to each query head: [query heads * HEAD_DIM, WIDTH]
    per_query = torch.eye(WIDTH).unflatten(0, (NUM_KV_HEADS, -1)).repeat_interleave(QUERIES_PER_KV, 0).flatten(0, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, own] = codes
        model.model.embed_tokens.weight[:, next_] = codes[successors]
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[:, retrieved] = codes
        for layer in model.model.layers:
            attention = layer.self_attn
            signs = 2.0 * torch.randint(2, (NUM_KV_HEADS, len(BIASED)), generator=generator) - 1
            biases = torch.zeros(NUM_KV_HEADS, HEAD_DIM)
            biases[:, BIASED] = signs
            queries = torch.stack([BIASED_QUERY * level_query(bias) for bias in biases])
            layer.input_layernorm.weight.fill_((2 / 3) ** 0.5)  # two thirds are codes: their channels vary by 1 again
            attention.q_proj.weight[:, next_] = MATCHED_QUERY * matched * per_query
            attention.q_proj.bias.copy_(queries.repeat_interleave(QUERIES_PER_KV, 0).flatten())
            attention.k_proj.weight[:, own] = spread.repeat(NUM_KV_HEADS).diag()
            attention.k_proj.bias.copy_(key_bias * biases.flatten())
            attention.v_proj.weight[:, own] = torch.eye(WIDTH)
            attention.o_proj.weight[retrieved] = 0.1 * per_query.T  # little, so that the next norm leaves codes alone
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("kv_cache_dtype", "key_bias", "right"),
    [
        ("auto", KEY_BIAS, True),
        ("kivi2", 0.0, True),
        ("kivi2", KEY_BIAS, False),
        ("kivi2_boost", KEY_BIAS, True),
    ],
)
def test_boosted_channels_keep_greedy_tokens_under_key_biases(
    tmp_path: Path, kv_cache_dtype: str, key_bias: float, right: bool
) -> None:
    """Every request of kivi2_boost gets all tokens right; with 2 bits everywhere none does, and only for the biases."""
    successors = successors_in_a_cycle()
    prompts, expected = zip(*(lookup_prompt(successors, seed) for seed in range(NUM_PROMPTS)), strict=True)
    model = save_lookup_qwen2(tmp_path, successors, key_bias)
    with engine(model, kv_cache_dtype, dtype="bfloat16", max_num_batched_tokens=CHUNK) as llm:
        outputs = generate(llm, list(prompts), max_tokens=MAX_TOKENS)
    kept = [tokens(output) == wanted for output, wanted in zip(outputs, expected, strict=True)]
    assert kept == [right] * NUM_PROMPTS
