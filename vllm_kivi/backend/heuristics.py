"""Sizes chosen by hand, what a GPU can run, and memory that layers share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.platforms import current_platform

# What prefill on a GPU needs: FlashAttention's.
CUDA_DTYPES = ("bfloat16", "float16")
CUDA_CAPABILITY = (8, 0)

# Context tokens that a prefill dequantizes at a time: 64 MiB at 8 KV heads of 128 channels. To attend an 8,192-token
# chunk to that many takes 2e12 operations at 32 heads, some milliseconds: gathering and merging are small beside it.
CONTEXT_TOKENS = 16_384


def on_gpu() -> bool:
    """Whether the kernels for GPUs run, or those of the CPU."""
    return current_platform.is_cuda()


def check_device(flag: str, dtype: str) -> None:
    """Refuse a device or a model dtype without kernels.

    Raises:
        ValueError: begins with `flag` and lists what is accepted.
    """
    if not on_gpu():
        if not current_platform.is_cpu():
            raise ValueError(f"{flag} runs on NVIDIA GPUs and on CPUs, not on {current_platform.device_name}")
        return
    capability = current_platform.get_device_capability()
    if capability is not None and tuple(capability) < CUDA_CAPABILITY:
        found, needed = ".".join(map(str, capability)), ".".join(map(str, CUDA_CAPABILITY))
        raise ValueError(f"{flag} needs a GPU of compute capability {needed} or more, and this one has {found}")
    if dtype not in CUDA_DTYPES:
        raise ValueError(
            f"{flag} does not support {dtype} models on a GPU; accepted: {', '.join(CUDA_DTYPES)}; "
            f"pass --dtype {CUDA_DTYPES[0]}"
        )


class Shared:
    """Tensors that every layer of the same kind uses in its turn; freed with the last layer."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors


_shared: WeakValueDictionary[Hashable, Shared] = WeakValueDictionary()


def shared(key: Hashable, make: Callable[[], Any]) -> Shared:
    """What `make` returned for this key, as long as somebody holds it."""
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = Shared(make())
    return found


def device() -> torch.device:
    """This process's device, with its index, so that it can be a key."""
    name = current_platform.device_type
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
