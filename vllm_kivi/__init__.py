"""KIVI: a 2-bit KV cache for stock vLLM."""

__version__ = "0.1.0"
