"""EAGLE heads: drafters of one layer, fed with the target's hidden states, whose pages lie beside ours in the pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, engine, generate, prompt, save_tiny_llama
from safetensors.torch import load_file, save_file

LAYERS = 4
HIDDEN = 384
INITIAL = 0.15  # of save_tiny_llama's weights
SPECULATED = 3
BLOCK = 32  # tokens of a page in the bypass, beside pages of the head
BYPASS = {"kivi": {"full_precision": True}}
LENGTHS = (1, 33, 127, 200, 301, 700)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer matters most, so that a head with a copy of it is often right."""
    path = save_tiny_llama(tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)
    weights = load_file(path / "model.safetensors")
    for layer in range(1, LAYERS):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{part}.weight"] *= 0.1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def save_config(model: Path, path: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1} | changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def eagle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target's first layer, which reads embeddings alone; embeddings and output layer are the target's own.

    EAGLE has no norm before its layer. So the embeddings are scaled to the length that it would give them, and with
    them what the layer adds.
    """
    path = tmp_path_factory.mktemp("eagle")
    save_config(model, path)
    stored = load_file(model / "model.safetensors")
    first = "model.layers.0."
    weights = {name.removeprefix("model."): weight for name, weight in stored.items() if name.startswith(first)}
    del weights["layers.0.input_layernorm.weight"]
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{part}.weight"] /= INITIAL
    weights["fc.weight"] = torch.cat([torch.eye(HIDDEN) / INITIAL, torch.zeros(HIDDEN, HIDDEN)], dim=1)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def eagle3(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, so that almost all it drafts is rejected."""
    path = tmp_path_factory.mktemp("eagle3")
    save_config(model, path, eagle_aux_hidden_state_layer_ids=[1, 2, 3], draft_vocab_size=512)
    stored = load_file(model / "model.safetensors")
    first = "model.layers.0."
    weights = {f"midlayer.{n.removeprefix(first)}": w for n, w in stored.items() if n.startswith(first)}
    generator = torch.Generator().manual_seed(5)
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"midlayer.self_attn.{part}.weight"
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    weights["fc.weight"] = INITIAL * torch.randn(HIDDEN, 3 * HIDDEN, generator=generator)
    weights |= {"norm.weight": torch.ones(HIDDEN), "midlayer.hidden_norm.weight": torch.ones(HIDDEN)}
    weights["lm_head.weight"] = stored["lm_head.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@dataclass
class Run:
    outputs: list[list[Any]]  # one list a pass
    counts: list[tuple[int, ...]]  # after each pass: tokens drafted, and accepted
    groups: list[tuple[str, int]]  # the spec's name, and how many layers


def counted(llm: Any) -> Iterator[int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    yield values["vllm:spec_decode_num_draft_tokens"]
    yield values["vllm:spec_decode_num_accepted_tokens"]


def run(model: Path, dtype: str, head: tuple[str, Path] | None, passes: int = 1, **settings: Any) -> Run:
    """The same prompts `passes` times, with hits from the second on if the prefix cache is on."""
    if head is not None:
        method, path = head
        speculative = {"method": method, "model": str(path), "num_speculative_tokens": SPECULATED}
        settings |= {"speculative_config": speculative, "disable_log_stats": False}
    outputs, counts = [], []
    with engine(model, dtype, enable_prefix_caching=passes > 1, **settings) as llm:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
        for _ in range(passes):
            outputs.append(generate(llm, [prompt(length, length) for length in LENGTHS], max_tokens=80))
            if head is not None:
                counts.append(tuple(counted(llm)))
    groups = [(type(group.kv_cache_spec).__name__, len(group.layer_names)) for group in pool.kv_cache_groups]
    return Run(outputs, counts, groups)


def check_same(actual: list[Any], expected: list[Any]) -> None:
    for own, wanted in zip(actual, expected, strict=True):
        assert_same(own, wanted)


@pytest.fixture(scope="module")
def plain(model: Path) -> Run:
    return run(model, "kivi2", None)


@pytest.fixture(scope="module")
def bypass(model: Path, eagle: Path) -> Run:
    return run(model, "kivi2", ("eagle", eagle), passes=2, additional_config=BYPASS)


def test_an_eagle_head_changes_nothing(model: Path, eagle: Path, plain: Run) -> None:
    speculated = run(model, "kivi2", ("eagle", eagle))
    check_same(speculated.outputs[0], plain.outputs[0])
    drafted, accepted = speculated.counts[0]
    assert 100 <= accepted < 0.9 * drafted
    # One layer beside four, so no group has more: what DESIGN.md says of 65 groups.
    assert speculated.groups.count(("FullAttentionSpec", 1)) == LAYERS + 1
    assert speculated.groups.count(("FullPrecisionSpec", 1)) == LAYERS


def test_an_eagle3_head_changes_nothing(model: Path, eagle3: Path, plain: Run) -> None:
    speculated = run(model, "kivi2", ("eagle3", eagle3))
    check_same(speculated.outputs[0], plain.outputs[0])
    drafted, accepted = speculated.counts[0]
    assert drafted > 1000 and accepted < 0.1 * drafted


def test_a_head_reads_its_own_pages(model: Path, eagle: Path, bypass: Run) -> None:
    """Wrong pages would not change what is said, only what is drafted: in the bypass it must be what `auto` drafts,
    after hits as well. These end as in `auto`: 0.32 computes the last block of a hit again, since a head reads one
    token past it; 0.33 need not, since that token is part of the block's hash."""
    auto = run(model, "auto", ("eagle", eagle), passes=2, block_size=BLOCK)
    for own, wanted in zip(bypass.outputs, auto.outputs, strict=True):
        check_same(own, wanted)
    hits, wanted_hits = (
        [output.num_cached_tokens for output in outputs[1]] for outputs in (bypass.outputs, auto.outputs)
    )
    assert hits == wanted_hits and sum(hits) > 1000
    assert bypass.counts == auto.counts
