"""lm-eval's model on a KiviCache: scores and answers are those of chunks that go through a cache by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from processes import environment
from test_tasks import jsonl, needs_lm_eval, save_tokenizer, words
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from vllm_kivi.evaluate import harness
from vllm_kivi.transformers import KiviCache

pytestmark = needs_lm_eval
# kivi8, so that an element that falls to another code, for another order of sums, is hardly seen.
CACHE: dict[str, Any] = {"preset": "kivi8", "residual_length": 32}
TOLERANCE = 2e-3
LENGTHS = (300, 1, 170, 64, 97)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = engines.save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    save_tokenizer(path)
    return path


def load(path: Any, **arguments: Any) -> Any:
    from vllm_kivi.transformers.lm_eval import KiviLM

    return KiviLM(str(path) if isinstance(path, Path) else path, device="cpu", dtype="float32", **arguments)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def scored(model: Any, texts: Sequence[tuple[str, str]]) -> list[float]:
    found = model.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    return [likelihood for likelihood, _ in found]


def answers(model: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    settings = {"until": ["</s>"], "max_gen_toks": tokens}
    return model.generate_until(requests("generate_until", [(one, settings) for one in prompts]), disable_tqdm=True)


@torch.inference_mode()
def by_hand(model: Any, tokens: list[int], steps: Sequence[int], **options: Any) -> Tensor:
    """Log-probabilities [T, vocabulary] after each token of a text that reaches a cache in steps of so many."""
    cache = KiviCache(model.model.config, **CACHE | options)
    parts = torch.tensor([tokens]).split(list(steps), 1)
    return torch.cat([model.model(part, past_key_values=cache).logits for part in parts], 1)[0].log_softmax(-1)


def chunks(length: int, chunk: int) -> list[int]:
    return [min(chunk, length - start) for start in range(0, length, chunk)]


TEXTS = [(words(length, seed), " " + words(1 + 9 * seed, seed + 10)) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("chunk", [1, 48])
def test_likelihoods_are_those_of_a_cache_by_hand(path, chunk):
    model = load(path, chunk_tokens=chunk, batch_size=3, **CACHE)
    actual = scored(model, TEXTS)
    assert model.model.config._attn_implementation == "kivi"
    for (context, continuation), likelihood in zip(TEXTS, actual, strict=True):
        before, after = (
            model.tok_encode(text, add_special_tokens=first) for text, first in ((context, None), (continuation, False))
        )
        tokens = before + after
        for options in ({}, {"preset": "kivi2"}):
            found = by_hand(model, tokens[:-1], chunks(len(tokens) - 1, chunk), **options)
            wanted = found[len(before) - 1 :].gather(1, torch.tensor(after)[:, None]).sum().item()
            if options and len(before) > 160:
                assert abs(likelihood - wanted) > 5 * TOLERANCE
            if not options:
                assert abs(likelihood - wanted) < TOLERANCE


def test_scored_tokens_read_quantized_pages(path):
    """With the bypass scores are lm-eval's own; quantized they differ, and the model says how much was."""
    from lm_eval.models.huggingface import HFLM

    plain = scored(HFLM(str(path), device="cpu", dtype="float32"), TEXTS)
    bypass = load(path, preset="kivi2", full_precision=True)
    assert scored(bypass, TEXTS) == pytest.approx(plain, abs=TOLERANCE)
    assert bypass.get_model_info()["kivi_quantized_share"] == 0
    quantized = load(path, preset="kivi2", residual_length=32)
    for likelihood, wanted, length in zip(scored(quantized, TEXTS), plain, LENGTHS, strict=True):
        if length > 160:
            assert abs(likelihood - wanted) > 5 * TOLERANCE
        if length < 64:
            assert abs(likelihood - wanted) < TOLERANCE
    info = quantized.get_model_info()
    # All but the last 32 tokens, those of an incomplete group and the sinks.
    assert 0.5 < info["kivi_quantized_share"] < 0.9
    assert (info["kivi_preset"], info["kivi_options"], info["kivi_chunk_tokens"]) == (
        "kivi2",
        {"residual_length": 32},
        64,
    )
    # In one chunk nothing is read quantized, though all is stored.
    assert scored(load(path, preset="kivi2", chunk_tokens=4096), TEXTS) == pytest.approx(plain, abs=TOLERANCE)


def test_nothing_quantized_is_said(path, caplog):
    model = load(path)
    scored(model, [("the whale", " said")])
    model.get_model_info()
    assert "nothing was quantized" in caplog.text
    caplog.clear()
    scored(model, TEXTS)
    model.get_model_info()
    assert not caplog.text


@pytest.mark.parametrize("attention", ["kivi", "sdpa"])
def test_batch_sizes_agree(path, attention):
    settings = {"chunk_tokens": 40, "attn_implementation": attention} | CACHE
    one, three = (load(path, batch_size=size, **settings) for size in (1, 3))
    assert scored(one, TEXTS) == pytest.approx(scored(three, TEXTS), abs=TOLERANCE)
    prompts = [context for context, _ in TEXTS]
    assert answers(one, prompts, 40) == answers(three, prompts, 40)


def test_tried_batch_sizes_do_not_count(path):
    """The share that was quantized is that of the requests, with batch_size=auto too."""
    infos = []
    for size in (4, "auto"):
        model = load(path, batch_size=size, max_batch_size=4, max_length=512, **CACHE)
        scored(model, TEXTS)
        answers(model, [context for context, _ in TEXTS], 20)
        infos.append((model.cached_tokens, model.get_model_info()["kivi_quantized_share"]))
    assert infos[0] == infos[1]


@torch.inference_mode()
def answer_by_hand(model: Any, prompt: Tensor, chunk: int, count: int, **options: Any) -> list[int]:
    """Greedy tokens after a prompt [T] whose last token is the first that comes alone."""
    cache, tokens = KiviCache(model.config, **options), prompt[None]
    for start in range(0, len(prompt) - 1, chunk):
        model(tokens[:, start : min(start + chunk, len(prompt) - 1)], past_key_values=cache)
    token, said = tokens[:, -1:], []
    for _ in range(count):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        said.append(int(token))
    return said


def test_answers_are_those_of_a_cache_by_hand(path):
    """However long the padding before a prompt is, its chunks begin with it."""
    options, count = {"preset": "kivi2", "residual_length": 32}, 40
    model, longest = load(path, chunk_tokens=40, **options), max(LENGTHS)
    mask = (torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]).long()
    equal = []
    # An element can fall to another code for another order of sums, and answers part from there: not for every prompt.
    for seed in range(3):
        tokens = torch.tensor([engines.prompt(longest, 10 * seed + row) for row in range(len(LENGTHS))]) * mask
        settings = {"attention_mask": mask, "eos_token_id": None}
        actual = model._model_generate(tokens, longest + count, [], **settings)[:, longest:].tolist()
        prompts = [row[-length:] for row, length in zip(tokens, LENGTHS, strict=True)]
        equal.append(actual == [answer_by_hand(model.model, prompt, 40, count, **options) for prompt in prompts])
    assert any(equal)
    assert 0.3 < model.get_model_info()["kivi_quantized_share"] < 0.9


def test_a_task_from_local_files(path, tmp_path):
    """The documents and metrics of `vllm-kivi eval tasks`."""
    jsonl(tmp_path / "test.jsonl", [{"page": words(length, seed)} for seed, length in enumerate((350, 40, 450))])
    (task,) = harness.load({"wikitext": tmp_path / "test.jsonl"}, None, None)
    perplexities = []
    for options in ({"full_precision": True}, {}):
        model = load(path, max_length=256, **options)
        likelihoods = model.loglikelihood_rolling(
            requests("loglikelihood_rolling", task.arguments()), disable_tqdm=True
        )
        perplexities.append(task.value("word_perplexity", task.scores(likelihoods)["word_perplexity"]))
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.5)


def test_command_line(path, tmp_path):
    """lm-eval's own, on a task of its own kind."""
    jsonl(tmp_path / "test.jsonl", [{"text": words(300, 0)}, {"text": words(200, 1)}])
    lines = [
        "task: local_text",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/test.jsonl}}}}",
        "output_type: loglikelihood_rolling",
        "test_split: test",
        "doc_to_text: ''",
        "doc_to_target: '{{text}}'",
        "metric_list: [{metric: word_perplexity}]",
    ]
    (tmp_path / "local_text.yaml").write_text("\n".join(lines))
    arguments = f"pretrained={path},preset=kivi2_boost,scale_search=false,chunk_tokens=32,dtype=float32"
    command = [sys.executable, "-m", "vllm_kivi.transformers.lm_eval", "--model", "hf-kivi", "--model_args", arguments]
    command += [
        "--tasks",
        "local_text",
        "--include_path",
        tmp_path,
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "out",
    ]
    env = environment(OMP_NUM_THREADS="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text())
    assert results["results"]["local_text"]["word_perplexity,none"] > 1
    config = results["config"]
    assert (config["kivi_preset"], config["kivi_options"]) == ("kivi2_boost", {"scale_search": False})
    assert config["kivi_chunk_tokens"] == 32 and config["kivi_quantized_share"] > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens=0 is not supported; accepted: an integer of 1 or more"),
        ({"preset": "kivi3"}, "preset='kivi3' is not supported; accepted: kivi2, "),
        ({"group_size": 16}, "group_size=16 is not supported; accepted: 32, 64, 128"),
    ],
)
def test_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(path, **arguments)


def test_encoder_decoder_models_are_refused(path):
    config = T5Config(vocab_size=engines.VOCAB, d_model=64, d_kv=64, d_ff=64, num_layers=1, num_heads=1)
    with pytest.raises(ValueError, match="encoder-decoder models are not supported; use --model hf"):
        load(T5ForConditionalGeneration(config), tokenizer=str(path))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "vllm_kivi.transformers.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'vllm-kivi\[eval\]'"):
        import vllm_kivi.transformers.lm_eval  # noqa: F401
