"""The same prompt in DynamicCache and in KiviCache: bytes and tokens per second, side by side, as the prompt grows.

    python examples/transformers_memory.py MODEL TEXT [--context 1024 8192] [--preset kivi2_boost]

TEXT is a file that is as long as the longest prompt. benchmarks/bench_transformers.py measures this with care.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_kivi.transformers import KiviCache


@torch.inference_mode()
def tokens_per_second(model: Any, cache: Any, prompt: torch.Tensor, steps: int) -> float:
    """Decode after a prompt [1, tokens], whose time does not count."""
    token = prompt
    for step in range(steps + 1):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        token.tolist()  # waits for a GPU
        if step == 0:
            start = time.perf_counter()
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--preset", default="kivi2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=16, help="decoded tokens, default: %(default)s")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(args.text.read_text(), return_tensors="pt").input_ids.to(device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    print(f"{'tokens':>8} {'DynamicCache':>24} {args.preset:>24}")
    for context in args.context:
        if tokens.shape[1] < context:
            parser.error(f"{args.text} has {tokens.shape[1]:,} tokens; --context {context} needs a longer text")
        prompt = tokens[:, :context]
        model.set_attn_implementation("sdpa")
        plain = DynamicCache(config=model.config)
        plain_speed = tokens_per_second(model, plain, prompt, args.steps)
        plain_mib = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers) / 2**20
        model.set_attn_implementation("kivi")
        packed = KiviCache(model.config, preset=args.preset)
        speed = tokens_per_second(model, packed, prompt, args.steps)
        mib = packed.info().total.num_bytes / 2**20
        print(
            f"{context:>8,} {plain_mib:>8.1f} MiB {plain_speed:>7.1f} /s {mib:>8.1f} MiB {speed:>7.1f} /s"
            f"   {plain_mib / mib:.1f} times smaller, {speed / plain_speed:.1f} times as fast"
        )


if __name__ == "__main__":
    main()
