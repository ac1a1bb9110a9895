#!/usr/bin/env python3
"""`make demo`: SmolLM2 answers on a 2-bit KV cache, and is measured against vLLM's own cache in the same run.

Both engines get the same KV cache memory and the same requests. Every figure of the table comes from the engines.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from vllm_kivi import evaluate

DOCUMENT = Path(__file__).parents[1] / "tests" / "data" / "persuasion.txt"
DOCUMENT_TOKENS = 5000
# Far from both ends of the document, so that it is read from quantized pages when the answer is written.
FACT = "The secret password of the lighthouse keeper is BLUE LANTERN."
SHORT_QUESTION = "What is the capital of France? Answer in one sentence."
LONG_QUESTION = "What is the secret password of the lighthouse keeper?"

KV_CACHE_BYTES = 512 << 20
MAX_MODEL_LEN = 8192
WINDOW, CHUNK, NUM_WINDOWS = 1536, 64, 4
DECODE_REQUESTS, DECODE_STEPS = 4, 64
STAGES = ("starting", "question", "document", "decode speed", "perplexity")


def ask(llm: Any, question: str) -> tuple[str, list[int]]:
    """The first line of the answer, and the tokens of the prompt."""
    from vllm import SamplingParams

    messages = [{"role": "user", "content": question}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32, stop="\n"), use_tqdm=False)
    return output.outputs[0].text.strip(), output.prompt_token_ids


def decode_rate(llm: Any, prompt: list[int]) -> float:
    """Tokens per second of DECODE_REQUESTS requests with this prompt, which must be in the prefix cache.

    From the fastest tenth of the steps: the first few also prefill, and other work on the machine slows some down.
    """
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=DECODE_STEPS, ignore_eos=True, detokenize=False)
    llm.enqueue([TokensPrompt(prompt_token_ids=prompt)] * DECODE_REQUESTS, params, use_tqdm=False)
    seconds = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
    return DECODE_REQUESTS / sorted(seconds)[len(seconds) // 10]


def perplexity(llm: Any, windows: list[list[int]]) -> float:
    """Of the second to fourth quarter of each window, streamed through the cache as `vllm-kivi eval ppl` does."""
    with tqdm(total=NUM_WINDOWS * WINDOW, unit="tok", leave=False, disable=None) as bar:
        nll = evaluate.score(llm, windows, CHUNK, bar)
    return math.exp(fmean(loss for window in nll for loss in window[WINDOW // 4 - 1 :]))


def measure(model: str, kv_cache_dtype: str, document: str, bar: tqdm) -> dict[str, Any]:
    """Everything the demo shows of one cache dtype."""

    def stage(number: int) -> None:
        bar.set_description(f"{kv_cache_dtype}: {STAGES[number]}", refresh=False)
        bar.update(number > 0)
        bar.refresh()

    stage(0)
    arguments = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 4,
        # A request that is alone takes the whole budget; windows side by side are prefilled in chunks.
        "max_num_batched_tokens": 2048,
        "long_prefill_token_threshold": CHUNK,
        "enforce_eager": True,
    }
    with evaluate.engine(**arguments) as llm:
        tokenizer = llm.get_tokenizer()
        tokens = tokenizer.encode(document)
        half = DOCUMENT_TOKENS // 2
        excerpt = "\n\n".join((tokenizer.decode(tokens[:half]), FACT, tokenizer.decode(tokens[half : 2 * half])))
        result: dict[str, Any] = {}

        stage(1)
        result["short"], _ = ask(llm, SHORT_QUESTION)
        stage(2)
        result["long"], prompt = ask(llm, f"{excerpt}\n\n{LONG_QUESTION}")
        stage(3)
        result["decode"] = decode_rate(llm, prompt)
        stage(4)
        result["perplexity"] = perplexity(llm, evaluate.cut_windows(tokens, [], WINDOW, NUM_WINDOWS * WINDOW))
        result["bytes"], result["bits"] = evaluate.kv_bytes_and_bits(llm)
        result["capacity"] = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    bar.update()
    return result


def comparison(auto: dict[str, Any], kivi: dict[str, Any]) -> str:
    """The table: one row per figure, the last column is kivi2 against auto."""
    rows = [("", "auto", "kivi2", "")]
    for title, key, form, better in (
        ("KV capacity, tokens", "capacity", ",.0f", kivi["capacity"] / auto["capacity"]),
        ("KV bytes per token", "bytes", ",.0f", auto["bytes"] / kivi["bytes"]),
        ("decode, tokens/s", "decode", ",.1f", kivi["decode"] / auto["decode"]),
    ):
        rows.append((title, format(auto[key], form), format(kivi[key], form), f"{better:.2f}x"))
    change = kivi["perplexity"] / auto["perplexity"] - 1
    rows.append(("perplexity", f"{auto['perplexity']:.2f}", f"{kivi['perplexity']:.2f}", f"{100 * change:+.1f} %"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder; `make model` writes models/smollm2")
    args = parser.parse_args()
    document = DOCUMENT.read_text(encoding="utf-8")
    evaluate.quiet_vllm()
    start = time.monotonic()
    print(f'vLLM with LLM("{args.model}", kv_cache_dtype="kivi2"), then with "auto"; both get the same memory.\n')
    with tqdm(
        total=2 * len(STAGES), bar_format="{desc:24} {bar} {n_fmt}/{total_fmt} [{elapsed}]", file=sys.stderr
    ) as bar:
        kivi = measure(args.model, "kivi2", document, bar)
        auto = measure(args.model, "auto", document, bar)
    for title, key in ((SHORT_QUESTION, "short"), (f"[{DOCUMENT_TOKENS:,} tokens of a novel] {LONG_QUESTION}", "long")):
        print(f"\n{title}\n  kivi2: {kivi[key]}\n  auto:  {auto[key]}")
    bits = f"{kivi['bits']:.2f} instead of {auto['bits']:.0f} bits per element"
    print(f"\nThe same {KV_CACHE_BYTES >> 20} MiB of KV cache, {bits}:\n")
    print(comparison(auto, kivi))
    print(
        f"\ndecode: {DECODE_REQUESTS} requests at {DOCUMENT_TOKENS:,} tokens of context. perplexity: "
        f"{NUM_WINDOWS * WINDOW * 3 // 4:,} tokens of {DOCUMENT.name},\nread through the cache. A model of 135M "
        f"parameters feels 2 bits more than a large one. ({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
