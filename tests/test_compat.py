"""What we rely on in every supported vLLM, and what differs between them."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_errors import LLAMA
from test_import_rules import sources

from vllm_kivi import compat, plugin
from vllm_kivi.backend import heuristics
from vllm_kivi.backend.backend import PAGE_DTYPE
from vllm_kivi.format import PRESETS


def test_vllm_has_what_we_import():
    """Wherever the import stands: some run on a GPU only, some for type checkers alone."""
    nodes = [node for path in sources() for node in ast.walk(ast.parse(path.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = {(node.module or "", a.name) for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
    modules = {name for name in modules if name.split(".")[0] == "vllm"}
    names = {(module, name) for module, name in names if module.split(".")[0] == "vllm"}
    assert len(names) > 40
    for module in modules:
        importlib.import_module(module)

    def exists(module, name):
        package = importlib.import_module(module)
        in_file = hasattr(package, name)
        return in_file or (hasattr(package, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None)

    missing = [f"{module}.{name}" for module, name in sorted(names) if not exists(module, name)]
    assert not missing


def test_a_cache_dtype_is_bytes_of_no_known_mode():
    """0.33 would take CUSTOM for a format of its own; pinned, so that we learn when that changes."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    plugin.register()
    for name in PRESETS:
        assert STR_DTYPE_TO_TORCH_DTYPE[name] == PAGE_DTYPE
        assert get_kv_quant_mode(name) == KVQuantMode.NONE
    if hasattr(KVQuantMode, "CUSTOM"):
        assert KVQuantMode.CUSTOM is KVQuantMode.OCTAVE_K3V4
        assert KVQuantMode.CUSTOM.is_octave


def test_vllm_keeps_our_block_size(monkeypatch):
    """Layers are made for it before vLLM asks backends what they prefer; other caches get what they always got."""
    from vllm.platforms import current_platform

    stock, ours = [], []

    class Fake(type(current_platform)):
        @classmethod
        def update_block_size_for_backend(cls, config):
            stock.append(config)

    Fake._kivi = False
    monkeypatch.setattr("vllm.platforms._current_platform", Fake())
    compat.extend_platform(lambda dtype: dtype in PRESETS, lambda config: "", lambda config: None, ours.append)
    for dtype, called, other in (("kivi2", ours, stock), ("auto", stock, ours)):
        config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=dtype))
        Fake.update_block_size_for_backend(config)
        assert called.pop() is config and not other


def test_prompt_lengths_are_known_while_a_runner_builds(monkeypatch):
    """Of both runners, and only then; wrapped once, however many builders ask for it."""

    class First:
        input_batch = SimpleNamespace(num_prompt_tokens_cpu_tensor=torch.tensor([5, 6, 7]))

        def _build_attention_metadata(self, common):
            return compat.num_prompt_tokens(common)

    class Second:
        req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=torch.tensor([5, 6, 7]).numpy()))

        def execute_model(self, common):
            return compat.num_prompt_tokens(common)

    for name, runner in (("vllm.v1.worker.gpu_model_runner", First), ("vllm.v1.worker.gpu.model_runner", Second)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(GPUModelRunner=runner))
    compat.expose_prompt_lengths()
    wrapped = First._build_attention_metadata, Second.execute_model
    compat.expose_prompt_lengths()
    assert wrapped == (First._build_attention_metadata, Second.execute_model)
    common = SimpleNamespace(num_reqs=2, req_idx=torch.tensor([2, 0]).numpy())
    assert First()._build_attention_metadata(common).tolist() == [5, 6]
    assert Second().execute_model(common).tolist() == [7, 5]
    assert compat.num_prompt_tokens(common) is None
    with pytest.raises(TypeError):
        First()._build_attention_metadata()
    assert compat.num_prompt_tokens(common) is None


@pytest.mark.parametrize(
    ("platform", "dtype", "words"),
    [
        ({"is_cuda": True, "capability": (7, 5)}, "float16", ["compute capability 8.0", "7.5"]),
        ({"is_cuda": True, "capability": (9, 0)}, "float32", ["float32", "bfloat16, float16", "--dtype"]),
        ({"device_name": "rocm"}, "bfloat16", ["NVIDIA", "rocm"]),
        ({"is_cuda": True, "capability": (8, 0)}, "float16", []),
        ({"is_cpu": True}, "float32", []),
    ],
)
def test_devices_and_dtypes(monkeypatch, platform, dtype, words):
    fake = SimpleNamespace(
        is_cuda=lambda: platform.get("is_cuda", False),
        is_cpu=lambda: platform.get("is_cpu", False),
        get_device_capability=lambda: platform.get("capability"),
        device_name=platform.get("device_name", ""),
    )
    monkeypatch.setattr(heuristics, "current_platform", fake)
    if not words:
        heuristics.check_device("kivi: --kv-cache-dtype kivi2", dtype)
        return
    with pytest.raises(ValueError, match="kivi: --kv-cache-dtype kivi2") as error:
        heuristics.check_device("kivi: --kv-cache-dtype kivi2", dtype)
    assert all(word in str(error.value) for word in words)


def test_context_parallelism_is_refused(tmp_path):
    from vllm import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    parallel = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}
    with pytest.raises(ValueError, match="does not support context parallelism; set both context-parallel sizes to 1"):
        EngineArgs(
            model=str(tmp_path), kv_cache_dtype="kivi2", skip_tokenizer_init=True, **parallel
        ).create_engine_config()
