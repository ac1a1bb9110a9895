"""The model of the engine benchmarks where none is given: Llama-3.1-8B's shapes, for which no weights are needed."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}


def engine_flags(model: str | None, num_layers: int, folder: Path) -> tuple[str, list[str]]:
    """What the model is called in a report, and vLLM's flags for it; the default model's config goes to `folder`."""
    flags = ["--skip-tokenizer-init", "--no-enable-prefix-caching"]
    if model is not None:
        return model, [f"--model={model}", *flags]
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    return f"Llama-3.1-8B's shapes, {num_layers} layers, dummy weights", [
        f"--model={folder}",
        "--load-format=dummy",
        *flags,
    ]
