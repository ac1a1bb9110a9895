"""What a cache costs in quality, read through the real engine: what `vllm-kivi eval` runs.

session.py starts engines, cache.py sees what their cache is and who reads it, report.py has statistics and tables;
ppl.py and retrieval.py each measure one thing. The names below are those of `eval ppl`, which scripts use as well.
"""

from vllm_kivi.evaluate.cache import kv_bytes_and_bits
from vllm_kivi.evaluate.ppl import Settings, cut_windows, run, score, table
from vllm_kivi.evaluate.session import EvalError, engine, quiet_vllm

__all__ = [
    "EvalError",
    "Settings",
    "cut_windows",
    "engine",
    "kv_bytes_and_bits",
    "quiet_vllm",
    "run",
    "score",
    "table",
]
