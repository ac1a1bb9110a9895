"""The CUDA kernels without a GPU: a choice of the tests of test_cuda.py and test_cuda_decode.py on tests/emulation.

What is chosen runs in every `make test`; `python -m pytest tests/emulation/full.py` runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cuda as cuda
import test_cuda_decode as cuda_decode
from conftest import MIXTURES, filled_pool, int32, starts
from emulation import build
from emulation.device import Device, builds
from test_decode import queries

from vllm_kivi.format import KVFormat

__all__ = ["builds"]

# Which kernels of decode are compiled: what CHOSEN needs, all bits and boosted channels, head sizes and dtypes.
DECODE = {
    "decode_bf16_64": [(2, 2, 0), (2, 2, 4), (2, 2, 8), (4, 2, 0)],
    "decode_bf16_128": [(2, 2, 0), (2, 2, 8), (4, 4, 0), (8, 8, 0)],
    "decode_bf16_256": [(2, 2, 0)],
    "decode_fp16_64": [(2, 2, 0), (8, 8, 0)],
    "decode_fp16_128": [(2, 2, 0), (2, 2, 4), (4, 2, 0), (8, 8, 0)],
    "decode_fp16_256": [(2, 2, 8)],
}

Case = tuple[Callable[..., None], dict[str, Any]]


def shape(preset: str, head_dim: int, dtype: str, group_size: int) -> Case:
    arguments = {"preset": preset, "head_dim": head_dim, "dtype": dtype, "group_size": group_size}
    return cuda_decode.test_presets_and_shapes, arguments


# Tests and their arguments. A test is worth its time here if no other one goes through the same code.
CHOSEN: list[Case] = [
    *((cuda.test_store_equals_the_reference, {"seed": seed}) for seed in range(3)),
    (cuda.test_store_every_value_of_a_16_bit_type, {"dtype": "bfloat16", "preset": "kivi_k4v2", "tuned": False}),
    (cuda.test_store_every_value_of_a_16_bit_type, {"dtype": "float16", "preset": "kivi4", "tuned": True}),
    (cuda.test_8_bit_codes_are_not_searched, {}),
    (cuda.test_store_many_rows, {"rows": [1000], "seq_lens": [1000], "preset": "kivi2"}),
    (cuda.test_store_touches_neither_null_block_nor_padding_rows, {}),
    (cuda.test_store_skips_a_group_whose_old_tokens_are_gone, {}),
    (cuda.test_store_strided_rows, {"offset": 0, "dtype": "float32"}),
    (cuda.test_store_strided_rows, {"offset": 1, "dtype": "bfloat16"}),
    (cuda.test_store_in_a_cuda_graph, {"preset": "kivi2", "option": ""}),
    (cuda.test_store_in_a_cuda_graph, {"preset": "kivi2_boost", "option": "rotate_values"}),
    *((cuda.test_gather_equals_the_reference, {"seed": seed}) for seed in (2, 5)),
    (cuda.test_gather_in_a_cuda_graph, {}),
    *((cuda.test_gather_of_codes_beyond_the_largest_number, {"dtype": dtype}) for dtype in ("float16", "bfloat16")),
    shape("kivi2", 64, "bfloat16", 64),
    shape("kivi2", 128, "float16", 32),
    shape("kivi2", 256, "bfloat16", 128),
    shape("kivi2_boost", 64, "bfloat16", 32),
    shape("kivi2_boost", 64, "bfloat16", 64),
    shape("kivi2_boost", 128, "bfloat16", 32),
    shape("kivi2_boost", 128, "float16", 64),
    shape("kivi2_boost", 256, "float16", 64),
    shape("kivi_k4v2", 64, "bfloat16", 32),
    shape("kivi_k4v2", 128, "float16", 128),
    shape("kivi4", 128, "bfloat16", 64),
    shape("kivi8", 64, "float16", 32),
    (cuda_decode.test_every_edge, {"residual_length": 32, "sink_tokens": 33}),
    *((cuda_decode.test_ratios, {"ratio": ratio}) for ratio in (3, 8, 9)),
    (cuda_decode.test_speculative_rows, {"residual_length": 0, "num_rows": 5}),
    (cuda_decode.test_speculative_rows, {"residual_length": 32, "num_rows": 3}),
    (cuda_decode.test_soft_cap, {"dtype": "float16"}),
    (cuda_decode.test_full_precision_bypass, {"preset": "kivi2"}),
    (cuda_decode.test_full_precision_bypass, {"preset": "kivi8"}),
    (cuda_decode.test_magnitudes, {"side": "key", "exponent": 12}),
    (cuda_decode.test_magnitudes, {"side": "value", "exponent": 30}),
    (cuda_decode.test_bad_neighbours_stay_local, {}),
    (cuda_decode.test_unused_bytes_are_not_read, {}),
    (cuda_decode.test_sinks_are_not_read_quantized, {}),
    (cuda_decode.test_many_requests, {"num_requests": 40, "num_kv_heads": 2, "longest": 0}),
    (cuda_decode.test_many_requests, {"num_requests": 300, "num_kv_heads": 1, "longest": 40}),
    (cuda_decode.test_padding_rows_and_idle_requests, {}),
    (cuda_decode.test_graph_replay_with_other_lengths, {}),
]

# With one kernel of decode, for what needs a build of its own.
ONE_KERNEL = {"decode_bf16_64": [(2, 2, 0)]}
OF_ONE_KERNEL: list[Case] = [
    (cuda_decode.test_speculative_rows, {"residual_length": 32, "num_rows": 2}),
    (cuda_decode.test_many_requests, {"num_requests": 40, "num_kv_heads": 2, "longest": 0}),
]

LAST_LANE_FIRST: list[Case] = [
    (cuda.test_store_equals_the_reference, {"seed": 3}),
    (cuda.test_gather_equals_the_reference, {"seed": 4}),
    *OF_ONE_KERNEL,
]

# One mistake each: file, what is there, what is there instead.
MISTAKES = {
    "operands": ("attend.cuh", "even.x, odd.x, weights", "odd.x, even.x, weights"),
    "race": ("decode.cuh", "} while (!is_last);", "} while (place.to != place.end);"),
    "barrier": ("decode.cuh", "    } while (!is_last);\n  }\n  __syncthreads();", "    } while (!is_last);\n  }\n"),
}


def name_of(case: Any) -> str:
    return "-".join(str(x) for x in case.values()) if isinstance(case, dict) else case.__name__.removeprefix("test_")


@pytest.fixture(scope="module")
def library(builds: Path) -> Path:
    return build.compile_for_cpu(build.Build(DECODE), builds)


@pytest.mark.parametrize(("test", "arguments"), CHOSEN, ids=name_of)
def test_kernels(test: Callable[..., None], arguments: dict[str, Any], library: Path) -> None:
    with Device(library).serve([cuda, cuda_decode]):
        test(**arguments)


@pytest.mark.parametrize(("k_bits", "v_bits"), MIXTURES)
def test_bits_that_are_not_compiled_are_refused(k_bits: int, v_bits: int, library: Path) -> None:
    """By every op, so that Triton serves them; the last mixture is the bypass, which is."""
    fmt = KVFormat("kivi2", 128, num_kv_heads=2, dtype="bfloat16", residual_length=32, k_bits=k_bits, v_bits=v_bits)
    pool, keys, values = filled_pool(fmt, [100])
    rows, lengths, layout = starts([1]), int32([100]), fmt.layout()
    query, device = queries(fmt, 1, 3), Device(library)
    calls = (
        lambda: device.store(keys[0][-1:], values[0][-1:], *pool.pages(), rows, lengths, layout),
        lambda: device.gather(keys[0], values[0], *pool.pages(), starts([100]), int32([0]), int32([64]), layout),
        lambda: device.decode(
            query.clone(), query, *pool.pages(), rows, lengths, 1.0, 0.0, layout, device.decode_workspace(layout, "cpu")
        ),
    )
    for call in calls:
        if fmt.full_precision:
            call()
        else:
            with pytest.raises(RuntimeError, match=r"not compiled.* 2[-/]2 "):
                call()


@pytest.mark.parametrize(("test", "arguments"), LAST_LANE_FIRST, ids=name_of)
def test_last_lane_first(test: Callable[..., None], arguments: dict[str, Any], library: Path) -> None:
    """Lanes and warps in the other order, where other races show."""
    with Device(library, last_first=True).serve([cuda, cuda_decode]):
        test(**arguments)


@pytest.mark.parametrize(("test", "arguments"), OF_ONE_KERNEL, ids=name_of)
def test_copies_of_sm_80(test: Callable[..., None], arguments: dict[str, Any], builds: Path) -> None:
    """Without bulk copies."""
    library = build.compile_for_cpu(build.Build(ONE_KERNEL, others=(), bulk_copies=False), builds)
    with Device(library).serve([cuda_decode]):
        test(**arguments)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, builds: Path) -> None:
    library = build.compile_for_cpu(build.Build(ONE_KERNEL, others=(), changes=[MISTAKES[mistake]]), builds)
    seen = []
    with Device(library).serve([cuda_decode]):
        for test, arguments in OF_ONE_KERNEL:
            try:
                test(**arguments)
            except AssertionError:
                seen.append("wrong results")
            except RuntimeError as error:
                assert "emulation: block" in str(error)
                seen.append(str(error))
    assert seen
