"""What the kernels do, as typed functions: the compiled extension, or Triton on a GPU that it has no code for.

The extension (csrc/, built by setup.py) is loaded at the first call, so importing this module costs nothing. Which of
the two serves a layout on a GPU is decided at the first call too, by asking the extension to run there (`_serving`).

Arguments that the three ops share:
    key, value: [num_tokens, num_kv_heads, head_dim] in the model's dtype: float32, bfloat16 or float16.
    query, output: [num_tokens, num_heads, head_dim]; num_heads is any multiple of num_kv_heads. Rows from
        query_start_loc[-1] on are padding: neither read nor written.
    quantized_pages, full_pages: vLLM's views of its pool in any dtype: [num_blocks, num_kv_heads, ...], contiguous in a
        block and head. Blocks and heads may be padded or strided.
    quantized_block_table, full_block_table: int32 [num_reqs, max_blocks]; 0 is the null block.
    query_start_loc: int32 [num_reqs + 1]; row i of request r is its token seq_lens[r] - (rows of r) + i.
    seq_lens: int32 [num_reqs], tokens of each request including this step's.
    scale: what q . k is multiplied by. logits_soft_cap: 0 for none, else logits become cap * tanh(logits / cap).
    layout: KVFormat.layout().
All tensors of a call are on one device. On CUDA nothing is allocated and nothing waits for the device, so calls can be
captured in CUDA graphs, and what tensors hold is not checked.
All raise RuntimeError when a tensor does not fit the layout, and ImportError where nothing can run.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kivi.format import LAYOUT_FIELDS, head_bytes

# Under vLLM's own logger, so that its level and handlers apply.
logger = logging.getLogger("vllm.kivi")

BUILD = (
    "build the extension where torch is a CUDA build and nvcc is found, or set FORCE_CUDA=1, with "
    "`pip install -e . --no-build-isolation` (csrc/variants.inc lists what decode is compiled for)"
)


@functools.cache
def load_extension() -> Any:
    """Loads the extension once and returns torch.ops.vllm_kivi.

    Raises:
        ImportError: the extension is not built, or was built for another layout.
    """
    try:
        importlib.import_module("vllm_kivi._C")
    except ImportError as error:
        raise ImportError(
            f"kivi: the compiled extension does not load ({error}). Build it against the installed torch with "
            "`pip install --no-build-isolation vllm-kivi`, or in a checkout: `pip install -e . --no-build-isolation`"
        ) from error
    ops = torch.ops.vllm_kivi
    built_for = ops.layout_fields()
    if built_for != ",".join(LAYOUT_FIELDS):
        raise ImportError(
            f"kivi: the compiled extension was built for another layout ({built_for}); build it again with "
            "`pip install -e . --no-build-isolation`"
        )
    for name in ("store", "decode", "prefill", "gather"):
        # They only write to their arguments, so there is nothing for a fake implementation to return.
        torch.library.register_fake(f"vllm_kivi::{name}", _nothing)
    return ops


def _nothing(*args: object) -> None:
    return None


class _Serving(NamedTuple):
    """The functions that serve a layout on a device."""

    store: Callable[..., None]
    gather: Callable[..., None]
    decode: Callable[..., None]
    decode_workspace: Callable[[Sequence[int], torch.device], Tensor]


@functools.cache
def _serving(device: torch.device, layout: tuple[int, ...]) -> _Serving:
    """Compiled code where it runs, else Triton, of which the log then warns once.

    Raises:
        ImportError: neither loads; says why.
    """
    ops, store_fails, decode_fails = _try_compiled(device, layout)
    if not decode_fails:
        logger.info("kivi: compiled kernels serve %s", device)
        return _Serving(ops.store, ops.gather, ops.decode, _compiled_workspace)
    try:
        other = importlib.import_module("vllm_kivi.triton_ops")
    except ImportError as error:
        raise ImportError(
            f"{decode_fails}; Triton, which would serve instead, does not load ({error}); {BUILD}"
        ) from error
    names = "store, gather and decode" if store_fails else "decode"
    logger.warning("%s: Triton serves %s on %s. Compiled kernels are faster: %s", decode_fails, names, device, BUILD)
    serving = _Serving(other.store, other.gather, other.decode, other.decode_workspace)
    return serving if store_fails else serving._replace(store=ops.store, gather=ops.gather)


def _try_compiled(device: torch.device, layout: tuple[int, ...]) -> tuple[Any, str, str]:
    """The extension's ops, and why its store and its decode cannot serve; empty if they can.

    On a GPU both are launched with a request without rows: whether there is code for the GPU, and for this decode, is
    known to nobody else.
    """
    if device.type != "cuda":
        return load_extension(), "", ""
    try:
        ops = load_extension()
    except ImportError as error:
        return None, str(error), str(error)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vllm_kivi::decode", "CUDA"):
        reason = "kivi: the compiled extension has no CUDA kernels"
        return ops, reason, reason
    element, *page_sizes = head_bytes(layout)
    num_kv_heads, head_dim = (layout[LAYOUT_FIELDS.index(name)] for name in ("num_kv_heads", "head_dim"))
    dtype = torch.float32 if element == 4 else torch.bfloat16
    rows = torch.zeros(1, num_kv_heads, head_dim, dtype=dtype, device=device)
    pages = [torch.zeros(1, num_kv_heads, size, dtype=torch.uint8, device=device) for size in page_sizes]
    table, ints = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    batch = *pages, table, table, ints, ints
    try:
        ops.store(rows, rows, *batch, layout)
    except RuntimeError as error:
        return ops, str(error), str(error)
    try:
        ops.decode(rows, rows, *batch, 1.0, 0.0, layout, _compiled_workspace(layout, device))
    except RuntimeError as error:
        return ops, "", str(error)
    return ops, "", ""


def _compiled_workspace(layout: Sequence[int], device: torch.device) -> Tensor:
    num_bytes = load_extension().decode_workspace_bytes(layout, device.index or 0)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def store(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    layout: Sequence[int],
) -> None:
    """Writes new tokens to full-precision pages and quantizes the groups whose last token is among them.

    Tokens without a full-precision page (null block) are only quantized; groups without a quantized page are skipped.
    """
    _serving(key.device, tuple(layout)).store(
        key,
        value,
        quantized_pages,
        full_pages,
        quantized_block_table,
        full_block_table,
        query_start_loc,
        seq_lens,
        layout,
    )


def decode(
    output: Tensor,
    query: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
    workspace: Tensor | None = None,
) -> None:
    """Attends few rows a request, whose tokens are all stored, and writes `output`.

    The row at position p reads sinks and tokens from boundary(p + 1) on in full precision, the rest quantized.
    On CUDA, `workspace` comes from `decode_workspace` and serves calls that follow each other on one stream.
    """
    _serving(query.device, tuple(layout)).decode(
        output,
        query,
        quantized_pages,
        full_pages,
        quantized_block_table,
        full_block_table,
        query_start_loc,
        seq_lens,
        scale,
        logits_soft_cap,
        layout,
        workspace,
    )


def decode_workspace(layout: Sequence[int], device: torch.device) -> Tensor:
    """What `decode` needs on this CUDA device for this layout, a few MiB: uint8, zeroed.

    Raises:
        ImportError: neither the extension nor Triton can serve this device.
    """
    return _serving(device, tuple(layout)).decode_workspace(layout, device)


def prefill(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_prompt_tokens: Tensor,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> None:
    """Attends the rows of chunks, already stored, and writes `output`.

    Rows of the prompt (positions below num_prompt_tokens, int32 [num_reqs]) read the chunk's own tokens from `key` and
    `value`; rows after it, which a preempted request recomputes, read what they read when they were decoded.
    """
    load_extension().prefill(
        output,
        query,
        key,
        value,
        quantized_pages,
        full_pages,
        quantized_block_table,
        full_block_table,
        query_start_loc,
        seq_lens,
        num_prompt_tokens,
        scale,
        logits_soft_cap,
        layout,
    )


def gather(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    start_loc: Tensor,
    first: Tensor,
    boundary: Tensor,
    layout: Sequence[int],
) -> None:
    """Writes tokens of requests to `key` and `value`, dequantized where they are quantized.

    Row start_loc[r] + i is token first[r] + i of request r; it is read quantized below boundary[r], sinks apart. What
    has no page (null block) is 0 on a CPU and anything on a GPU.
    start_loc: int32 [num_reqs + 1]; first, boundary: int32 [num_reqs].
    """
    _serving(key.device, tuple(layout)).gather(
        key,
        value,
        quantized_pages,
        full_pages,
        quantized_block_table,
        full_block_table,
        start_loc,
        first,
        boundary,
        layout,
    )


def set_isa(name: str = "") -> str:
    """Chooses the CPU kernels ("avx512", "avx2" or "portable"), for tests; returns the name of those in use."""
    return load_extension().set_isa(name)
