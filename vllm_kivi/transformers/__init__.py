"""The quantized cache in Hugging Face transformers: `model.generate(..., past_key_values=KiviCache(model.config))`."""

from vllm_kivi.transformers.cache import CacheInfo, KiviCache, LayerInfo

__all__ = ["CacheInfo", "KiviCache", "LayerInfo"]
