"""What decides the next token besides the model: speculation, beams, grammars, and a prefix cache that is reset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, engine, generate, logprobs, prompt, save_tiny_llama, tokens

SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2"
TEXT = Path(__file__).parent / "data" / "persuasion.txt"
BYPASS = {"kivi": {"full_precision": True}}
SPECULATED = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def drafter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with noise in its weights: often right in what it drafts, and often wrong."""
    from safetensors.torch import load_file, save_file

    path = save_tiny_llama(tmp_path_factory.mktemp("drafter"))
    generator = torch.Generator().manual_seed(3)
    weights = load_file(model / "model.safetensors")
    noisy = {name: w + 0.004 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(noisy, path / "model.safetensors", metadata={"format": "pt"})
    return path


def counted(llm: Any) -> Iterator[int]:
    """How many tokens were drafted, and how many of them accepted."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    yield values["vllm:spec_decode_num_draft_tokens"]
    yield values["vllm:spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize(
    ("options", "caching"),
    # Every way in which a rejected token could be read: groups that complete as soon as they can, sinks, hits.
    [({}, True), ({"sink_tokens": 0, "residual_length": 0}, False), ({"sink_tokens": 37}, True)],
)
def test_a_draft_model_changes_nothing(model: Path, drafter: Path, options: dict[str, Any], caching: bool) -> None:
    """Accepted and rejected drafts at every position of a group, in and beyond the window, and after a prefix hit."""
    prompts = [prompt(length, length) for length in (1, 33, 100, 127, 200, 300, 301, 700)]
    settings = {"additional_config": {"kivi": options}, "enable_prefix_caching": caching}
    # Pages of as many tokens as beside the drafter's pages, so that hits end at the same token.
    with engine(model, block_size=256, **settings) as llm:
        expected = [generate(llm, prompts, max_tokens=100) for _ in range(1 + caching)][-1]
    speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": SPECULATED}
    with engine(model, speculative_config=speculative, disable_log_stats=False, **settings) as llm:
        actual = [generate(llm, prompts, max_tokens=100) for _ in range(1 + caching)][-1]
        drafted, accepted = counted(llm)
    assert 40 <= accepted < 0.9 * drafted, (drafted, accepted)
    for own, wanted in zip(actual, expected, strict=True):
        assert own.num_cached_tokens == wanted.num_cached_tokens
        assert_same(own, wanted)


def test_a_quantized_drafter_is_refused(model: Path) -> None:
    speculative = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2, "kv_cache_dtype": "kivi2"}
    refused = pytest.raises(ValueError, match="kv_cache_dtype")
    with refused, engine(model, speculative_config=speculative):
        pass


def test_beam_search_equals_auto_in_the_bypass() -> None:
    """Beams are requests that share all but their last tokens: hits at every step."""
    from vllm import TextPrompt
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    texts = [TextPrompt(prompt=TEXT.read_text(encoding="utf-8")[9000:end]) for end in (9200, 10500)]
    settings = {"additional_config": BYPASS, "enable_prefix_caching": True, "skip_tokenizer_init": False}
    found = {}
    for dtype in ("auto", "kivi2"):
        with engine(SMOLLM2, dtype, kv_cache_memory_bytes=256 << 20, **settings) as llm:
            outputs = llm.beam_search(texts, params)
        found[dtype] = [[beam.tokens for beam in output.sequences] for output in outputs]
    assert found["kivi2"] == found["auto"]


def test_prompt_logprobs_equal_auto_in_the_bypass(model: Path) -> None:
    found = {}
    for dtype in ("auto", "kivi2"):
        with engine(model, dtype, additional_config=BYPASS, max_num_batched_tokens=160) as llm:
            (output,) = generate(llm, [prompt(500, 5)], max_tokens=1, prompt_logprobs=0)
        found[dtype] = torch.tensor([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])
    torch.testing.assert_close(found["kivi2"], found["auto"], atol=1e-3, rtol=0)


def test_a_grammar_is_kept_to() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    question = TEXT.read_text(encoding="utf-8")[5000:7000] + "\nDescribe a person as JSON with a name and an age.\n"
    params = SamplingParams(
        temperature=0.0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=schema), detokenize=True
    )
    with engine(SMOLLM2, dtype="bfloat16", skip_tokenizer_init=False) as llm:
        (output,) = llm.generate([question], params, use_tqdm=False)
    person = json.loads(output.outputs[0].text)
    assert set(person) == {"name", "age"} and isinstance(person["age"], int)


def test_a_reset_prefix_cache_is_empty(model: Path) -> None:
    long = prompt(600, 4)
    with engine(model, enable_prefix_caching=True) as llm:
        (cold,) = generate(llm, [long])
        (hit,) = generate(llm, [long])
        assert cold.num_cached_tokens == 0 < hit.num_cached_tokens
        assert llm.reset_prefix_cache()
        (again,) = generate(llm, [long])
        assert again.num_cached_tokens == 0
    assert tokens(again) == tokens(cold) and torch.equal(logprobs(again), logprobs(cold))
