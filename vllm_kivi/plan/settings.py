"""What `vllm-kivi plan` plans for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BASELINE = "auto"


@dataclass(frozen=True)
class Settings:
    """What to plan for; the fields are the options of the command.

    `block_size` and `max_num_batched_tokens` are vLLM's, `reserve_gib` is what is left to activations, CUDA graphs and
    CUDA itself on each GPU.
    """

    model: str
    kv_cache_dtypes: tuple[str, ...] = ()
    additional_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    context: int = 32768
    gpu_memory: float = 80.0
    gpu_memory_utilization: float = 0.9
    weights_gib: float | None = None
    reserve_gib: float = 4.0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    block_size: int | None = None
    max_num_batched_tokens: int = 8192

    @property
    def in_flight_tokens(self) -> int:
        """Of a prompt, beside the window, in a sliding-window layer: vLLM schedules a step ahead."""
        return (self.pipeline_parallel_size + 1) * self.max_num_batched_tokens
