"""vLLM calls register() in every process that it starts."""

from __future__ import annotations


def register() -> None:
    """Teach stock vLLM our cache dtypes. Idempotent; imports no kernel.

    vLLM only logs a plugin that fails, and would then refuse the cache dtype as unknown: the reason is the last line.
    """
    from vllm_kivi import compat

    compat.check_version()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_kivi.backend import backend
    from vllm_kivi.format import PRESETS

    compat.register_cache_dtypes(PRESETS, backend.PAGE_DTYPE)
    if backend.NAME not in AttentionBackendEnum.__members__:
        cls = backend.KiviAttentionBackend
        register_backend(backend.NAME, f"{cls.__module__}.{cls.__qualname__}")
    compat.extend_platform(lambda dtype: dtype in PRESETS, backend.select, backend.check_config, backend.finish_pages)
