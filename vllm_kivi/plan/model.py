"""What a config.json says about the KV cache of a model, and how large its weights are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kivi.evaluate.session import EvalError
from vllm_kivi.format import DTYPE_BYTES

# What configurations call layers that hold all tokens, and layers that hold none: a state, or nothing at all.
FULL = {"full_attention", "attention", "hybrid"}
SLIDING = {"sliding_attention"}
NO_TOKENS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}

# Model types that the engine refuses when it builds their layers, for what their config.json does not say.
_NOT_CAUSAL = dict.fromkeys(("bagel", "gemma3", "molmo2", "moondream3", "paligemma"), "non-causal attention of images")
_NO_DTYPE = "Falcon, whose attention layers get no cache dtype from vLLM"
REFUSED = {"gpt_oss": "learned attention sinks", "bloom": "ALiBi", "falcon": _NO_DTYPE} | _NOT_CAUSAL


@dataclass(frozen=True)
class Shapes:
    """What the cache depends on. Layers are lists of their indices; other layers hold no tokens."""

    dtype: str
    head_dim: int
    num_kv_heads: int
    num_layers: int
    full: tuple[int, ...]
    sliding: tuple[int, ...]
    window: int | None
    others: tuple[str, ...]
    mla: bool
    encoder_decoder: bool
    refused: str | None  # what the engine refuses when it builds the layers


def read_config(model: str) -> tuple[Any, Path]:
    """A model's configuration and the folder it is in; nothing is downloaded.

    Raises:
        EvalError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        try:
            found = cached_file(model, "config.json", local_files_only=True)
        except (OSError, ValueError):
            found = None
        if found is None:
            raise EvalError(
                f"model {model}: no folder with config.json, no such file, and not in the cache of transformers, which "
                "is all that plan looks at: give the path of a config.json"
            )
        path = Path(found)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True), path.parent
    except Exception as error:  # whatever a wrong value leads to: transformers has no error for it
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise EvalError(f"{path}: transformers cannot read it: {reason}") from None


def _number(config: Any, name: str) -> int:
    """A number that every language model with attention has.

    Raises:
        EvalError: this one has not.
    """
    value = getattr(config.get_text_config(), name, None)
    if not isinstance(value, int) or value < 1:
        raise EvalError(f"{config.model_type}: {name} is {value}, so there is no KV cache of a language model to plan")
    return value


def _check_decoder(config: Any, text: Any) -> None:
    """Raises EvalError for a model that generates no text, which has no KV cache in vLLM: BERT, CLIP, ViT."""
    from transformers.models.auto import modeling_auto as auto

    types = {config.model_type, text.model_type}
    generate = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    # Of models that fill in masks or generate, their config.json says which. GPT-NeoX has that entry too.
    masked = not types.isdisjoint(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    encoder = masked and not getattr(text, "is_decoder", True) and not getattr(config, "is_encoder_decoder", False)
    if encoder or not any(types & names.keys() for names in generate):
        raise EvalError(f"{config.model_type}: an encoder, so there is no KV cache of a language model to plan")


def _num_kv_heads(text: Any) -> int:
    """KV heads of a layer, under the names that vLLM knows."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1  # Falcon
    if hasattr(text, "attn_config"):
        return getattr(text.attn_config, "kv_n_heads", text.num_attention_heads)  # DBRX
    names = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
    found = (getattr(text, name, None) for name in names)
    return next((heads for heads in found if heads is not None), text.num_attention_heads)


def _refused(config: Any, text: Any) -> str | None:
    """What of a model the engine refuses when it builds its layers."""
    if getattr(text, "num_kv_shared_layers", None):
        return "layers that share their cache"
    if any(getattr(own, "alibi", False) for own in (text, getattr(text, "attn_config", None))):
        return "ALiBi"
    return REFUSED.get(config.model_type)


def read_shapes(config: Any, dtype: str) -> Shapes:
    """What the cache depends on; of a multimodal model, the language model's.

    Raises:
        EvalError: layers differ in more than their windows, or are of a type whose cache is not known here.
    """
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        raise EvalError(f"{config.model_type}: layers differ in their shapes, which plan cannot count")
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or getattr(text, "dtype", None)).removeprefix("torch.")
        # As vLLM: models in float32, or that do not say, run in bfloat16.
        dtype = "bfloat16" if dtype in ("None", "float32") else dtype
    dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
    if dtype not in DTYPE_BYTES:
        raise EvalError(f"--dtype {dtype} is not supported; accepted: auto, {', '.join(DTYPE_BYTES)}")
    num_layers = _number(config, "num_hidden_layers")
    _check_decoder(config, text)
    window = getattr(text, "sliding_window", None) or None
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not types:
        types = ["sliding_attention" if window else "full_attention"] * num_layers
    # The last layers of some models read the cache of earlier ones.
    types = list(types)[: num_layers - (getattr(text, "num_kv_shared_layers", None) or 0)]
    unknown = sorted({kind for kind in types if kind not in FULL | SLIDING | NO_TOKENS})
    if unknown:
        raise EvalError(f"{config.model_type}: plan does not know what layers of type {', '.join(unknown)} hold")
    sliding = tuple(i for i, kind in enumerate(types) if kind in SLIDING and window)
    full = tuple(i for i, kind in enumerate(types) if kind in FULL | SLIDING and i not in sliding)
    if not full and not sliding:
        raise EvalError(f"{config.model_type}: no attention layers, so there is no KV cache to quantize")
    num_heads = _number(config, "num_attention_heads")
    head_dim = getattr(text, "attention_head_dim", None) or getattr(text, "head_dim", None)
    return Shapes(
        dtype=dtype,
        head_dim=head_dim or _number(config, "hidden_size") // num_heads,
        num_kv_heads=_num_kv_heads(text),
        num_layers=num_layers,
        full=full,
        sliding=sliding,
        window=window,
        others=tuple(kind for kind in types if kind in NO_TOKENS),
        mla=getattr(text, "kv_lora_rank", None) is not None,
        encoder_decoder=any(getattr(own, "is_encoder_decoder", False) for own in (config, text)),
        refused=_refused(config, text),
    )


def max_positions(config: Any) -> float:
    """The longest --max-model-len that vLLM takes without more ado; infinite if the configuration has no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    rope = getattr(text, "rope_parameters", None) or {}
    if "gemma3" in config.model_type:  # its positions are scaled already, as are those of the types below
        rope = {}
    own = [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]
    factors = [entry.get("factor") or 1.0 for entry in own if entry.get("rope_type") in ("linear", "dynamic")]
    return positions * (factors[-1] if factors else 1.0)


def weights_bytes(config: Any, folder: Path, dtype: str) -> tuple[int, str]:
    """Bytes of all weights, and where the number is from.

    Raises:
        EvalError: transformers cannot build the model.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text())["metadata"]["total_size"]), index.name
    # Some models are published with the same weights again under another name.
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files), f"{len(files)} safetensors files"
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
        except ValueError:
            continue
        return parameters * DTYPE_BYTES[dtype], f"{parameters:,} parameters in {dtype}"
    raise EvalError(f"{config.model_type}: transformers cannot build it to count its weights; pass --weights-gib")
