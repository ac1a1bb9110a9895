"""Answers a question with a quantized KV cache, and prints what the cache holds.

    python examples/transformers_basic.py MODEL [--prompt TEXT] [--preset kivi2_boost]

MODEL is a folder or a name on the hub: Llama, Qwen, or any other model that KiviCache supports.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kivi.transformers import KiviCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="Tell the history of Paris, the capital of France, century by century.")
    parser.add_argument("--preset", default="kivi2", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # This attention reads packed pages. With any other the cache works too, but dequantizes them in every step.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", attn_implementation="kivi").to(device)

    messages = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(device)
    cache = KiviCache(model.config, preset=args.preset)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)

    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print()
    # The last 128 tokens and the first 4 stay in full precision: the longer the text, the smaller the cache.
    print(cache.info())


if __name__ == "__main__":
    main()
