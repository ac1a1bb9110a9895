"""Other attention kernels over the same requests: vLLM's FlashAttention 3 over bfloat16 and fp8 pages, and xformers'
triton_splitk over int4 pages where xformers is installed.

Each runs in a process of its own, since a kernel that a build lacks ends the process' use of the GPU: that costs the
case it happened in and no other. Every case is compared with float64 attention over what its pages hold, then timed.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cuda_cases import DEVICE, Case, microseconds, relative_error, table_of
from torch import Tensor

FA_VERSION = 3
BLOCK_SIZE = 16  # vLLM's default
INT4_BLOCK_SIZE = 256  # triton_splitk wants a multiple of 64
# Largest relative error of a row: a few roundings of bfloat16, or of softmax weights to fp8's 3 bits.
TOLERANCE = {"bfloat16": 0.02, "fp8": 0.1, "int4": 0.02}
TIMEOUT = 240  # seconds that a process may take


@dataclass
class Measured:
    """Times in us, or why there are none."""

    attention: float | None = None
    store: float | None = None
    error: str = ""


@dataclass
class Baseline:
    """Calls that attend and that store, and what attention is of."""

    attend: Callable[[], Tensor]
    query: Tensor
    keys: Tensor  # of the last request
    values: Tensor
    store: Callable[[], object] | None = None


def flash_attention(case: Case, name: str) -> Baseline:
    """FlashAttention as vLLM calls it for its own cache dtypes."""
    from vllm import _custom_ops as vllm_ops
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    dtype = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
    key, value, query = case.inputs()
    pages = -(-case.tokens // BLOCK_SIZE)
    table = table_of(case.requests, pages)
    shape = (table.numel() + 1, BLOCK_SIZE, case.kv_heads, case.head_dim)
    caches = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in "kv"]
    positions = torch.arange(case.tokens, device=DEVICE)
    slots = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    for cache, x in zip(caches, (key, value), strict=True):
        cache.view(-1, *shape[2:])[slots.flatten()] = x.to(dtype)
    keys, values = (x[-case.tokens :].to(dtype, copy=True) for x in (key, value))
    new = slots[:, -case.rows :].flatten()
    new_key, new_value = (
        x.view(case.requests, case.tokens, *x.shape[1:])[:, -case.rows :].flatten(0, 1) for x in (key, value)
    )
    del key, value
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device=DEVICE) * case.rows
    lengths = torch.full((case.requests,), case.tokens, dtype=torch.int32, device=DEVICE)
    output = torch.empty_like(query)
    one = torch.ones((), device=DEVICE)
    descale = one.expand(case.requests, case.kv_heads) if name == "fp8" else None
    given = query.to(dtype)

    def attend() -> Tensor:
        flash_attn_varlen_func(
            q=given,
            k=caches[0],
            v=caches[1],
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=case.rows,
            seqused_k=lengths,
            max_seqlen_k=case.tokens,
            softmax_scale=case.scale,
            causal=True,
            block_table=table,
            fa_version=FA_VERSION,
            q_descale=descale,
            k_descale=descale,
            v_descale=descale,
        )
        return output

    stored = [cache.view(torch.uint8) if name == "fp8" else cache for cache in caches]

    def store() -> None:
        cache_dtype = "fp8" if name == "fp8" else "auto"
        vllm_ops.reshape_and_cache_flash(new_key, new_value, *stored, new, cache_dtype, one, one)

    return Baseline(attend, given, keys, values, store if case.rows > 1 else None)


def pack_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """A row of triton_splitk's pages, int32 [..., 1 + D / 8], and what it stands for, float64.

    The first word holds scale and shift as float16, scale lower; the others 8 codes each, the first lowest.
    """
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale, shift = ((high - low) / 15).half(), low.half()
    codes = ((x.float() - shift.float()) / scale.float()).round().clamp(0, 15)
    bits = torch.stack((scale, shift), -1).view(torch.int32).squeeze(-1)
    nibbles = codes.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4, device=x.device)
    words = nibbles.sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return torch.cat((bits, words), -1), codes.double() * scale.double() + shift.double()


def splitk_int4(case: Case, name: str) -> Baseline:
    """xformers' triton_splitk with one scale a row, which reads the fewest bytes and takes the fewest steps."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask, PagedBlockDiagonalPaddedKeysMask
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp

    key, value, query = case.inputs()
    pages = -(-case.tokens // INT4_BLOCK_SIZE)
    table = table_of(case.requests, pages)
    width = 1 + case.head_dim // 8
    caches = []
    read = []
    for x in (key, value):
        cache = torch.zeros(table.numel() + 1, INT4_BLOCK_SIZE, case.kv_heads, width, dtype=torch.int32, device=DEVICE)
        for request, tokens in enumerate(x.split(case.tokens)):
            packed, exact = pack_int4(tokens)
            whole = packed.new_zeros(pages * INT4_BLOCK_SIZE, *packed.shape[1:])
            whole[: case.tokens] = packed
            cache[table[request].long()] = whole.unflatten(0, (pages, INT4_BLOCK_SIZE))
        read.append(exact)
        repeats = case.heads // case.kv_heads
        caches.append(cache.view(1, -1, case.kv_heads, 1, width).expand(-1, -1, -1, repeats, -1))
    del key, value
    bias = BlockDiagonalPaddedKeysMask.from_seqlens(
        [case.rows] * case.requests, pages * INT4_BLOCK_SIZE, [case.tokens] * case.requests, device=DEVICE
    ).make_paged(table, INT4_BLOCK_SIZE, PagedBlockDiagonalPaddedKeysMask)
    grouped = query.view(1, len(query), case.kv_heads, -1, case.head_dim)
    inputs = Inputs(grouped, *caches, attn_bias=bias, scale=case.scale)

    def attend() -> Tensor:
        return FwOp.apply(inputs, needs_gradient=False)[0].view_as(query)

    return Baseline(attend, query, *read)


def measure_here(case: Case, name: str) -> Measured:
    torch.manual_seed(0)
    baseline = (splitk_int4 if name == "int4" else flash_attention)(case, name)
    error = relative_error(baseline.attend(), baseline.query, baseline.keys, baseline.values, case)
    if error > TOLERANCE[name]:
        raise ValueError(f"wrong: {error:.3f} from float64 attention, {TOLERANCE[name]} allowed")
    found = Measured(microseconds(baseline.attend))
    if baseline.store is not None:
        found.store = microseconds(baseline.store)
    return found


def child(name: str, out: Path, cases: list[Case]) -> None:
    """Measure cases until one fails, a line of JSON each; the first line says that all imports are there."""
    with out.open("w") as stream:
        torch.zeros(1, device=DEVICE)
        print("{}", file=stream, flush=True)
        for case in cases:
            try:
                found = measure_here(case, name)
            except Exception as error:
                found = Measured(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            print(json.dumps(asdict(found)), file=stream, flush=True)
            if found.error:
                return
            torch.cuda.empty_cache()


def measure(cases: Sequence[Case], name: str) -> list[Measured]:
    """Each case by the baseline of this name: "bfloat16", "fp8" or "int4"."""
    if name == "int4" and importlib.util.find_spec("xformers") is None:
        return [Measured(error="xformers is not installed")] * len(cases)
    results: list[Measured] = []
    while len(results) < len(cases):
        rest = cases[len(results) :]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.jsonl"
            command = [sys.executable, __file__, name, str(out), json.dumps([asdict(case) for case in rest])]
            try:
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
                ended = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
                if done.returncode < 0:
                    ended = [f"ended by {signal.Signals(-done.returncode).name}"]
            except subprocess.TimeoutExpired:
                ended = [f"took more than {TIMEOUT} s"]
            lines = out.read_text().splitlines() if out.exists() else []
        found = [Measured(**json.loads(line)) for line in lines[1:]]
        if not lines:  # nothing to try again with
            return results + [Measured(error=ended[0])] * len(rest)
        if not found or (len(found) < len(rest) and not found[-1].error):
            found.append(Measured(error=ended[0]))
        results += found
    return results


def notes(baseline: str, cases: Sequence[Case], results: Sequence[Measured]) -> list[str]:
    """Which cases were not measured and why, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for case, found in zip(cases, results, strict=True):
        if found.error:
            reasons.setdefault(found.error, []).append(f"{case} ({case.heads}/{case.kv_heads} heads)")
    return [
        f"{baseline}: not measured{'' if len(names) == len(cases) else ' at ' + ', '.join(names)}: {reason}."
        for reason, names in reasons.items()
    ]


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]), [Case(**case) for case in json.loads(sys.argv[3])])
