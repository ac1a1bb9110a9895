"""A real model through the engine: perplexity beside the CPU's, a prefix hit and an answer; exits with 1 if one fails.

    python tests/gpu/smollm2_check.py MODEL [--cpu-perplexity AUTO KIVI2] [--dtype bfloat16]

MODEL is a folder of scripts/make_model.py. Run without --cpu-perplexity on a CPU first: it prints the two numbers to
give. Text, chunks and scored tokens are the same everywhere; so is the arithmetic but for the order of sums. That alone
makes values take other codes, which at 2 bits moves perplexity: by 0.6 % over 8,192 tokens of bfloat16 on one CPU (two
sets of kernels), so few tokens tell nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from results import Results  # noqa: E402

from vllm_kivi import evaluate  # noqa: E402
from vllm_kivi.options import KiviOptions  # noqa: E402

TEXT = TESTS / "data" / "persuasion.txt"
PRESET = "kivi2"
TOLERANCE = 0.005


def perplexity(results: Results, model: str, dtype: str, num_tokens: int, wanted: list[float] | None) -> None:
    """Of vLLM's own cache and of ours, on windows of 2,048 tokens of which 1,536 count."""
    settings = evaluate.Settings(model, TEXT, (PRESET,), chunk=64, tokens=num_tokens, parallel=8, dtype=dtype)
    report = evaluate.run(settings)
    found = [result["perplexity"] for result in report["results"]]
    print(f"{report['scored_tokens']:,} scored tokens, {dtype} on {report['device']}, vLLM {report['vllm']}")
    print(f"--cpu-perplexity {found[0]:.4f} {found[1]:.4f}", flush=True)
    for name, ours, theirs in zip(("auto", PRESET), found, wanted or found, strict=True):
        ratio = ours / theirs - 1
        passed = abs(ratio) <= TOLERANCE
        results.add(
            f"perplexity, {name}", f"{ours:.3f}, {100 * ratio:+.3f} % of the CPU's {theirs:.3f}", "0.5 %", passed
        )


def prefix_hit(results: Results, model: str, dtype: str) -> None:
    """A hit is the same computation as the last chunk of a cold prompt that was cut there: the same bits."""
    from engines import engine, generate, logprobs, tokens
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    fmt = KiviOptions().format(PRESET, config.head_dim, config.num_key_value_heads, dtype)
    chunk = -(-512 // fmt.hit_step) * fmt.hit_step
    prompt = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[5000 : 5000 + 2 * chunk + fmt.hit_step // 2]
    settings: dict[str, Any] = {"max_num_batched_tokens": chunk, "enable_prefix_caching": True}
    with engine(Path(model), PRESET, dtype=dtype, kv_cache_memory_bytes=256 << 20, **settings) as llm:
        (cold,), (hit,) = (generate(llm, [prompt]) for _ in range(2))
        question = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)
        (answer,) = generate(llm, [ids], max_tokens=7)
    cached = f"{hit.num_cached_tokens} of {len(prompt)} tokens"
    results.add("prefix hit", cached, f"{2 * chunk}", hit.num_cached_tokens == 2 * chunk and not cold.num_cached_tokens)
    same = tokens(cold) == tokens(hit)
    largest = (logprobs(cold) - logprobs(hit)).abs().max().item()
    found = f"log probabilities differ by {largest:.2g}, tokens {'are the same' if same else 'differ'}"
    results.add("hit against cold", found, "0, the same", same and largest == 0)
    text = tokenizer.decode(tokens(answer), skip_special_tokens=True).strip()
    results.add("answer", text, "Paris", "Paris" in text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cpu-perplexity", type=float, nargs=2, metavar=("AUTO", "KIVI2"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=65536, help="of the text; must be as on the CPU")
    args = parser.parse_args()
    results = Results()
    perplexity(results, args.model, args.dtype, args.tokens, args.cpu_perplexity)
    prefix_hit(results, args.model, args.dtype)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
