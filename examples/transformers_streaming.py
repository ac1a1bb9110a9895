"""A chat that streams, in which every turn goes on from the same quantized KV cache.

    python examples/transformers_streaming.py MODEL [--about FILE --cache FILE]

Reads a question a line, until the input ends. --about is a text to talk about; its cache is computed once and kept in
the file --cache, from which the next chat loads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from vllm_kivi.transformers import KiviCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--about", type=Path, help="a text file")
    parser.add_argument("--cache", type=Path, help="where the cache of that text is kept")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", attn_implementation="kivi").to(device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    about = f" about this text:\n{args.about.read_text()}" if args.about else ""
    messages = [{"role": "system", "content": f"You answer questions{about}"}]
    held = tokenizer.apply_chat_template(messages, return_dict=False)  # the tokens that the cache holds
    if args.cache and args.cache.exists():
        cache = KiviCache.load(args.cache, model.config, device)
        if cache.get_seq_length() != len(held):
            parser.error(f"{args.cache} is the cache of another text; name another file, or delete this one")
        print(f"{cache.get_seq_length():,} tokens loaded from {args.cache}")
    else:
        cache = KiviCache(model.config)
        with torch.inference_mode():
            model(torch.tensor([held], device=device), past_key_values=cache, logits_to_keep=1)
        if args.cache:
            cache.save(args.cache)
            print(f"{len(held):,} tokens saved to {args.cache}")

    for question in sys.stdin:
        messages.append({"role": "user", "content": question.strip()})
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        # A chat template may write an old turn otherwise than it was said: from there on the cache is computed anew.
        same = 0
        while same < min(len(held), len(tokens)) and held[same] == tokens[same]:
            same += 1
        cache.crop(same - len(held))
        prompt = torch.tensor([tokens], device=device)
        settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": streamer}
        output = model.generate(prompt, past_key_values=cache, **settings)[0].tolist()
        held = output[: cache.get_seq_length()]  # the last token has not been through the model
        answer = tokenizer.decode(output[len(tokens) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    print(cache.info())


if __name__ == "__main__":
    main()
