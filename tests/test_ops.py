"""The ops as torch sees them: schemas, fake implementations, errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXTURES, Pool, check_op, int32, op_arguments

from vllm_kivi import ops
from vllm_kivi.backend import heuristics
from vllm_kivi.format import (
    ACCEPTED_FRACTIONS,
    BOOSTED_FRACTIONS,
    HEAD_DIMS,
    LAYOUT_FIELDS,
    PRESETS,
    KVFormat,
)

FMT = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)


def arguments() -> tuple[Pool, dict[str, Any]]:
    return op_arguments(FMT)


def call(name: str, given: dict[str, Any]) -> None:
    op = getattr(ops.load_extension(), name).default
    op(**{argument.name: given[argument.name] for argument in op._schema.arguments})


@pytest.mark.parametrize("name", ["store", "decode", "prefill", "gather"])
def test_opcheck(name: str) -> None:
    """Schema (what is written to), fake implementation, and what torch.compile needs."""
    check_op(name, arguments()[1])


@pytest.mark.parametrize("name", ["store", "decode", "prefill", "gather"])
def test_wrappers_pass_every_argument(name: str) -> None:
    """The wrapper and the op do the same."""
    (first, given), (second, again) = arguments(), arguments()
    names = [argument.name for argument in getattr(ops.load_extension(), name).default._schema.arguments]
    again["query"] = given["query"]
    call(name, given)
    getattr(ops, name)(*(again[argument] for argument in names))
    assert all(map(torch.equal, first.memory(), second.memory()))
    assert all(torch.equal(given[rows], again[rows]) for rows in ("key", "value"))
    assert name not in ("decode", "prefill") or torch.equal(given["output"], again["output"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": FMT.layout()[:-1]}, "layout has"),
        ({"layout": KVFormat("kivi2", 128, num_kv_heads=2, dtype="bfloat16").layout()}, "must be"),
        ({"layout": KVFormat("kivi2", 64, num_kv_heads=2, dtype="float32").layout()}, "elements of 4 bytes"),
        ({"layout": KVFormat("kivi2", 64, num_kv_heads=3, dtype="bfloat16").layout()}, "num_kv_heads"),
        ({"layout": KVFormat("kivi4", 64, num_kv_heads=2, dtype="bfloat16").layout()}, "the layout needs"),
        ({"layout": [*FMT.layout()[:2], 3, *FMT.layout()[3:]]}, "3 bits are not supported; accepted: 2, 4, 8, 16"),
        ({"layout": KVFormat("kivi2", 64, 2, "float32", k_bits=16).layout()}, "elements of 4 bytes"),
        ({"query": torch.zeros(110, 5, 64).bfloat16()}, "multiple of num_kv_heads"),
        ({"query": torch.zeros(110, 6, 64).double()}, "float32, bfloat16 or float16"),
        ({"output": torch.zeros(110, 6, 64)}, "another dtype"),
        ({"output": torch.zeros(109, 6, 64).bfloat16()}, "rows"),
        ({"output": torch.zeros(110, 6, 128).bfloat16()[..., ::2]}, "contiguous"),
        ({"query_start_loc": int32([0, 70, 60])}, "must not decrease"),
        ({"query_start_loc": int32([0, 70, 111])}, "tokens"),
        ({"query_start_loc": torch.tensor([0, 70, 110])}, "int32"),
        ({"seq_lens": int32([70])}, "seq_lens"),
        ({"seq_lens": int32([60, 40])}, "70 rows but 60 tokens"),
        ({"seq_lens": int32([70, 4000])}, "quantized_block_table covers"),
        ({"full_block_table": torch.zeros(2, 3, dtype=torch.int32)}, "full_block_table covers"),
        ({"quantized_block_table": torch.zeros(1, 9, dtype=torch.int32)}, "quantized_block_table must be"),
        ({"full_pages": torch.zeros(9, 2, 8)}, "full_pages has 32 bytes"),
        ({"quantized_pages": torch.zeros(9, 2, 1536, 2, dtype=torch.uint8)[..., 0]}, "contiguous within"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    _, given = arguments()
    with pytest.raises(RuntimeError, match=message):
        call("decode", given | changes)


def test_bad_keys_are_refused() -> None:
    _, given = arguments()
    for name in ("store", "prefill"):
        with pytest.raises(RuntimeError, match=r"value"):
            call(name, given | {"value": given["value"][:, :1]})
    with pytest.raises(RuntimeError, match="num_prompt_tokens"):
        call("prefill", given | {"num_prompt_tokens": int32([70])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_loc": int32([0, 70, 60])}, "start_loc must not decrease"),
        ({"start_loc": int32([0, 70, 111])}, "start_loc ends at 111 but there are 110 rows"),
        ({"first": int32([0, -1])}, "first of request 1 is -1"),
        ({"first": int32([2**31 - 60, 0])}, "first of request 0 is 2147483588"),
        ({"first": int32([0, 4000])}, "request 1 has 4040 tokens, its row of quantized_block_table covers"),
        ({"boundary": int32([32])}, "boundary must be a contiguous int32 tensor of at least 2"),
        ({"full_block_table": torch.zeros(2, 3, dtype=torch.int32)}, "full_block_table covers"),
    ],
)
def test_what_gather_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call("gather", arguments()[1] | changes)


def test_set_isa() -> None:
    best = ops.set_isa()
    assert best in ("avx512", "avx2", "portable")
    try:
        assert ops.set_isa("portable") == "portable" == ops.set_isa()
    finally:
        ops.set_isa(best)
    with pytest.raises(RuntimeError, match=f"'sse' is not available; accepted: .*{best}.*portable"):
        ops.set_isa("sse")


def test_layout_fields_match() -> None:
    assert ops.load_extension().layout_fields() == ",".join(LAYOUT_FIELDS)


def test_what_is_compiled_for_cuda_is_what_python_says() -> None:
    """csrc/variants.inc is the list; Triton serves the head sizes that it lacks."""
    text = (Path(__file__).parent.parent / "csrc" / "variants.inc").read_text()
    lines = {name: re.findall(r"DO\((.*?)\)", rest) for name, rest in re.findall(r"KIVI_CUDA_(\w+)(.*)", text)}
    assert {int(item.split(",")[0]) for item in lines["HEAD_DIMS"]} <= set(HEAD_DIMS)
    bits = {tuple(int(number) for number in item.split(",")[:2]) for item in lines["BITS"]}
    assert bits == set(PRESETS.values())
    boosted = {tuple(int(number) for number in item.split(",")[:3]) for item in lines["BOOSTED"]}
    assert boosted == {(*PRESETS[name], fraction) for name in BOOSTED_FRACTIONS for fraction in ACCEPTED_FRACTIONS}
    dtypes = re.findall(r"DO\(k(\w+),", text)
    assert tuple(name.lower() for name in dtypes) == heuristics.CUDA_DTYPES


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ops warns of. vLLM keeps its loggers from pytest's."""
    found: list[str] = []
    monkeypatch.setattr(ops.logger, "warning", lambda text, *values: found.append(text % values))
    return found


GPU = torch.device("cuda", 0)
SERVED = ("store", "gather", "decode")


@pytest.mark.parametrize("is_built", [True, False])
def test_triton_serves_a_gpu_without_compiled_kernels(
    is_built: bool, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_kivi import triton_ops

    if not is_built:
        monkeypatch.setattr(ops, "load_extension", ops.load_extension.__wrapped__)
        monkeypatch.setitem(sys.modules, "vllm_kivi._C", None)
    else:
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    serving = ops._serving.__wrapped__(GPU, tuple(FMT.layout()))
    assert all(getattr(serving, name) is getattr(triton_ops, name) for name in (*SERVED, "decode_workspace"))
    [warning] = warnings
    why = "no CUDA kernels" if is_built else "does not load"
    assert re.search(rf"{why}.*Triton serves store, gather and decode on cuda:0.*faster.*FORCE_CUDA=1", warning)


def test_triton_serves_what_decode_is_not_compiled_for(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kivi import triton_ops

    extension = ops.load_extension()
    monkeypatch.setattr(ops, "_try_compiled", lambda *_: (extension, "", "kivi: head sizes: 64 128 256"))
    serving = ops._serving.__wrapped__(GPU, tuple(FMT.layout()))
    assert (serving.store, serving.gather) == (extension.store, extension.gather)
    assert (serving.decode, serving.decode_workspace) == (triton_ops.decode, triton_ops.decode_workspace)
    assert re.search(r"head sizes: 64 128 256: Triton serves decode on.*variants\.inc", warnings[0])


def test_compiled_kernels_serve_without_a_warning(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    extension = ops.load_extension()
    monkeypatch.setattr(ops, "_try_compiled", lambda *_: (extension, "", ""))
    for device in (GPU, torch.device("cpu")):
        serving = ops._serving.__wrapped__(device, tuple(FMT.layout()))
        assert all(getattr(serving, name) is getattr(extension, name) for name in SERVED)
    assert not warnings


def test_nothing_serves_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_try_compiled", lambda *_: (None, "kivi: nothing", "kivi: nothing"))
    monkeypatch.setitem(sys.modules, "vllm_kivi.triton_ops", None)
    with pytest.raises(ImportError, match=r"nothing; Triton.*does not load.*FORCE_CUDA=1"):
        ops._serving.__wrapped__(GPU, tuple(FMT.layout()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("full_precision", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "fails"),
    [
        (64, "bfloat16", ""),
        (256, "float16", ""),
        (80, "bfloat16", "head sizes: 64 128 256"),
        (64, "float32", "dtypes:"),
    ],
)
def test_the_extension_is_asked_to_run(head_dim: int, dtype: str, fails: str, full_precision: bool) -> None:
    fmt = KVFormat("kivi2", head_dim, num_kv_heads=2, dtype=dtype, full_precision=full_precision)
    _, store_fails, decode_fails = ops._try_compiled(GPU, tuple(fmt.layout()))
    assert store_fails == "" and fails in decode_fails and bool(fails) == bool(decode_fails)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("k_bits", "v_bits"), MIXTURES)
def test_the_extension_refuses_other_bits(k_bits: int, v_bits: int) -> None:
    """All but the bypass: Triton serves them."""
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", k_bits=k_bits, v_bits=v_bits)
    _, store_fails, decode_fails = ops._try_compiled(GPU, tuple(fmt.layout()))
    assert ("not compiled" in store_fails) == ("not compiled" in decode_fails) == (not fmt.full_precision)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LAYOUT_FIELDS", (*LAYOUT_FIELDS, "one_more"))
    with pytest.raises(ImportError, match="another layout"):
        ops.load_extension.__wrapped__()


def test_missing_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_kivi._C", None)
    with pytest.raises(ImportError, match=r"pip install -e \. --no-build-isolation"):
        ops.load_extension.__wrapped__()
