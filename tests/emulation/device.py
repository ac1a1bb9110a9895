"""The emulated kernels as vllm_kivi.ops, for the tests that are written for a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vllm_kivi.format import LAYOUT_FIELDS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# As in csrc/params.h.
class Layout(Structure):
    _fields_ = [(name, c_int32) for name in LAYOUT_FIELDS]


class Pages(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("table", c_void_p),
        ("table_stride", c_int64),
    ]


class Batch(Structure):
    _fields_ = [("num_reqs", c_int32), ("query_start_loc", c_void_p), ("seq_lens", c_void_p)]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


class StoreParams(Structure):
    _fields_ = [
        ("layout", Layout),
        ("dtype", c_int),
        ("key", Rows),
        ("value", Rows),
        ("quantized", Pages),
        ("full", Pages),
        ("batch", Batch),
    ]


class GatherParams(Structure):
    _fields_ = [
        *StoreParams._fields_[:-1],
        ("num_reqs", c_int32),
        ("start_loc", c_void_p),
        ("first", c_void_p),
        ("boundary", c_void_p),
    ]


class AttentionParams(Structure):
    _fields_ = [
        ("layout", Layout),
        ("dtype", c_int),
        ("output", Rows),
        ("query", Rows),
        ("quantized", Pages),
        ("full", Pages),
        ("batch", Batch),
        ("num_heads", c_int32),
        ("scale", c_float),
        ("logits_soft_cap", c_float),
        ("key", Rows),
        ("value", Rows),
        ("num_prompt_tokens", c_void_p),
        ("workspace", c_void_p),
    ]


def _rows(x: Tensor) -> Rows:
    assert x.stride(2) == 1
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _pages(pages: Tensor, table: Tensor) -> Pages:
    size = pages.element_size()
    return Pages(pages.data_ptr(), pages.stride(0) * size, pages.stride(1) * size, table.data_ptr(), table.stride(0))


def _batch(query_start_loc: Tensor, seq_lens: Tensor) -> Batch:
    return Batch(len(seq_lens), query_start_loc.data_ptr(), seq_lens.data_ptr())


class Graph:
    """What torch.cuda.CUDAGraph is to the tests: calls that are recorded."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Device:
    """A library of build.py. Its methods take what the functions of vllm_kivi.ops take, on the CPU.

    Args:
        library: the file.
        last_first: lets the last lane and the last warp go first, instead of the first ones.
    """

    def __init__(self, library: Path, last_first: bool = False) -> None:
        functions = self._functions = ctypes.CDLL(str(library))
        functions.emulation_set_last_first.argtypes, functions.emulation_set_last_first.restype = [c_bool], None
        for name, params, *more in (
            ("store", StoreParams, c_int),
            ("gather", GatherParams, c_int),
            ("decode", AttentionParams),
        ):
            function = getattr(functions, f"emulation_{name}")
            function.argtypes, function.restype = [POINTER(params), *more], c_char_p
        functions.emulation_decode_workspace_bytes.argtypes = [POINTER(Layout)]
        functions.emulation_decode_workspace_bytes.restype = c_size_t
        functions.emulation_bytes_of_params.restype = c_size_t
        store, gather, attention = (ctypes.sizeof(params) for params in (StoreParams, GatherParams, AttentionParams))
        if functions.emulation_bytes_of_params() != store << 20 | gather << 10 | attention:
            raise ImportError("the structs in tests/emulation/device.py are not those of csrc/params.h")
        functions.emulation_set_last_first(last_first)
        self._graph: Graph | None = None

    @contextlib.contextmanager
    def record(self, graph: Graph) -> Iterator[None]:
        """What torch.cuda.graph is to the tests."""
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    def _launch(self, name: str, params: Structure, *rest: int) -> None:
        def call() -> None:
            error = getattr(self._functions, f"emulation_{name}")(byref(params), *rest)
            if error is not None:
                raise RuntimeError(f"kivi: {error.decode()}")

        if self._graph is None:
            call()
        else:
            self._graph.calls.append(call)

    def store(
        self,
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
        params = StoreParams(
            Layout(*layout),
            DTYPES[key.dtype],
            _rows(key),
            _rows(value),
            _pages(quantized_pages, quantized_block_table),
            _pages(full_pages, full_block_table),
            _batch(query_start_loc, seq_lens),
        )
        self._launch("store", params, key.shape[0])

    def gather(
        self,
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
        params = GatherParams(
            Layout(*layout),
            DTYPES[key.dtype],
            _rows(key),
            _rows(value),
            _pages(quantized_pages, quantized_block_table),
            _pages(full_pages, full_block_table),
            len(first),
            start_loc.data_ptr(),
            first.data_ptr(),
            boundary.data_ptr(),
        )
        self._launch("gather", params, key.shape[0])

    def decode(
        self,
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
        workspace: Tensor,
    ) -> None:
        params = AttentionParams(
            layout=Layout(*layout),
            dtype=DTYPES[query.dtype],
            output=_rows(output),
            query=_rows(query),
            quantized=_pages(quantized_pages, quantized_block_table),
            full=_pages(full_pages, full_block_table),
            batch=_batch(query_start_loc, seq_lens),
            num_heads=query.shape[1],
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            workspace=workspace.data_ptr(),
        )
        self._launch("decode", params)

    def decode_workspace(self, layout: Sequence[int], device: torch.device) -> Tensor:
        num_bytes = self._functions.emulation_decode_workspace_bytes(byref(Layout(*layout)))
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    @contextlib.contextmanager
    def serve(self, modules: Sequence[ModuleType]) -> Iterator[None]:
        """Lets the tests of these modules use this device. What fills their pools on the CPU stays what it is."""
        stand_ins = {"CUDAGraph": Graph, "graph": self.record, "synchronize": lambda: None}
        num_threads = torch.get_num_threads()
        # What the oracles compute is small: two threads wait for each other, many times as long where cores are shared.
        torch.set_num_threads(1)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for module in modules:
                    patch.setattr(module, "DEVICE", "cpu")
                    patch.setattr(module, "ops", self)
                for name, stand_in in stand_ins.items():
                    patch.setattr(torch.cuda, name, stand_in)
                yield
        finally:
            torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def builds(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries are kept from one run to the next."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("emulation") if cache is None else cache.mkdir("emulation")
