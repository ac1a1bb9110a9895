"""The quantized cache in Hugging Face transformers: `model.generate(..., past_key_values=KiviCache(model.config))`."""

import transformers

OLDEST = (5, 16)

if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    oldest = ".".join(map(str, OLDEST))
    raise ImportError(
        f"kivi: KiviCache needs transformers {oldest} or newer, not {transformers.__version__}: "
        f"pip install 'transformers>={oldest}'"
    )

from vllm_kivi.transformers.cache import CacheInfo, KiviCache, LayerInfo  # noqa: E402

__all__ = ["CacheInfo", "KiviCache", "LayerInfo"]
