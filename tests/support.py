"""What is supported, and what proves it: the support matrix in the README is written from this table.

    python tests/support.py --write

A row names tests that run without a GPU, or what was measured on an H100. tests/test_support.py fails where a test is
missing or never runs, where a refusal's words are not in its test, and where the README says something else;
conftest.py turns a skip of a test that is named here into a failure.
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
README, MAKEFILE = TESTS.parent / "README.md", TESTS.parent / "Makefile"
BEGIN, END = "<!-- support matrix: python tests/support.py --write -->", "<!-- end of the support matrix -->"


@dataclass(frozen=True)
class Gpu:
    """Seen on an H100: with these versions of vLLM, or of what is named, by these files, or by hand where nothing here
    repeats it."""

    versions: tuple[str, ...]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line. Without tests and Gpu it says that nothing is proved, and the note says why."""

    feature: str
    tests: tuple[str, ...] = ()  # file::test, or file::test[case]
    gpu: Gpu | None = None
    refused: str = ""  # words of the error at start, which must be in each test
    note: str = ""


def cases(test: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{test}[{name}]" for name in names)


FAMILY = "test_models.py::test_family"
REFUSED = "test_models.py::test_refused"
OTHERS_REFUSED = "test_kv_movement.py::test_other_connectors_are_refused"
ENGINE_CHECK, SOAK = "tests/gpu/engine_check.py", "tests/soak/soak.py"
PARALLEL_CHECK = "tests/gpu/parallel_check.py"
BOTH = ("0.32", "0.33")
IN_TRANSFORMERS = Gpu(("transformers 5.17",), ("tests/test_transformers.py",))

ROWS = {
    "Models": (
        Row("Llama 3.1", cases(FAMILY, "llama3"), Gpu(BOTH, (ENGINE_CHECK,)), note="its attention, random weights"),
        Row("Qwen2, Qwen3, Qwen3-MoE, Mistral", cases(FAMILY, "qwen2", "qwen3", "qwen3_moe", "mistral")),
        Row("Phi-3, also with long rope", cases(FAMILY, "phi3", "phi3_longrope")),
        Row("GPT-2, OPT: learned positions", cases(FAMILY, "gpt2", "opt")),
        Row("Granite: attention multiplier", cases(FAMILY, "granite"), Gpu(("0.33",))),
        Row("Gemma 2, Gemma 3", cases(FAMILY, "gemma2", "gemma3"), Gpu(("0.33",)), note="global layers are quantized"),
        Row(
            "Granite 4, Falcon-H1: Mamba beside attention",
            cases(FAMILY, "granite_hybrid", "falcon_h1"),
            Gpu(("0.33",)),
            note="attention layers are quantized; on an H100 Granite 4, with prefix caching",
        ),
        Row(
            "SmolLM2-135M, real weights",
            (
                "test_smollm2.py::test_capacity_is_4_5_times_that_of_auto",
                "test_smollm2.py::test_perplexity_of_kivi4_is_that_of_auto",
            ),
            Gpu(("0.32",), ("tests/gpu/smollm2_check.py",)),
        ),
        Row(
            "Gemma 3 270M, real weights",
            ("test_gemma3.py::test_only_global_layers_are_quantized", "test_gemma3.py::test_perplexity"),
        ),
        Row(
            "Layers left out by `--kv-cache-dtype-skip-layers`",
            ("test_engine.py::test_skipped_layers_stay_in_full_precision",),
        ),
        Row(
            "Learned attention sinks (GPT-OSS)",
            cases(REFUSED, "GptOssConfig-settings0-learned attention sinks"),
            refused="learned attention sinks",
        ),
        Row("ALiBi (BLOOM)", cases(REFUSED, "BloomConfig-settings1-ALiBi"), refused="ALiBi"),
        Row(
            "Chunked attention (Llama 4)",
            cases(REFUSED, "Llama4TextConfig-settings2-ChunkedLocalAttention"),
            refused="ChunkedLocalAttention",
        ),
        Row(
            "Sliding windows in all layers",
            cases(REFUSED, "MistralConfig-settings3-sliding window"),
            refused="sliding window",
        ),
        Row("MLA (DeepSeek)", ("test_errors.py::test_mla_model",), refused="MLA"),
        Row("Encoder-decoder models", ("test_errors.py::test_encoder_decoder_model",), refused="encoder-decoder"),
        Row(
            "Layers that share another's cache",
            ("test_errors.py::test_errors_name_the_layer_feature",),
            refused="share",
        ),
        Row(
            "Head sizes but 64, 80, 96, 128, 256",
            ("test_errors.py::test_bad_head_size",),
            refused="accepted: 64, 80, 96, 128, 256",
        ),
    ),
    "Cache": (
        Row(
            "All cache dtypes: store, decode, prefill",
            (
                "test_store.py::test_equals_the_reference",
                "test_decode.py::test_presets_and_shapes",
                "test_prefill.py::test_presets_and_shapes",
            ),
            Gpu(("0.32",), ("tests/test_cuda.py", "tests/test_cuda_decode.py", "tests/test_triton.py")),
            note="Triton in CUDA graphs and with very many rows: not since those tests were mended",
        ),
        Row(
            "`full_precision` bypass equals `auto`",
            ("test_engine.py::test_the_bypass_equals_auto",),
            Gpu(BOTH, (ENGINE_CHECK,)),
        ),
        Row(
            "Prefix caching",
            (
                "test_engine.py::test_prefix_hit_equals_cold_at_the_same_boundary",
                "test_engine.py::test_a_shared_prefix_is_reused",
            ),
            Gpu(BOTH, (ENGINE_CHECK,)),
        ),
        Row(
            "Prefix-cache reset",
            ("test_decoding.py::test_a_reset_prefix_cache_is_empty",),
        ),
        Row(
            "Chunked prefill",
            ("test_engine.py::test_chunk_sizes", FAMILY),
            Gpu(BOTH, (ENGINE_CHECK,)),
            note="outputs depend on the chunk size",
        ),
        Row("Preemption", ("test_engine.py::test_preemption_changes_nothing",), Gpu(("0.32",), (ENGINE_CHECK, SOAK))),
        Row(
            "`torch.compile`",
            ("test_engine_processes.py::test_pipeline_parallelism_and_torch_compile",),
            Gpu(BOTH, (ENGINE_CHECK,)),
        ),
        Row("CUDA graphs", gpu=Gpu(BOTH, (ENGINE_CHECK,)), note="decode in full graphs"),
        Row("Sleep mode, levels 1 and 2", gpu=Gpu(("0.32",)), note="vLLM has it on GPUs only"),
        Row(
            "`--kv-offloading-size`, native",
            ("test_kv_movement.py::test_offloaded_to_the_cpu_and_back",),
            Gpu(BOTH),
            note="on a CPU the copies are simulated",
        ),
        Row(
            "KV connectors that say `supports_kivi`",
            (
                "test_kv_movement.py::test_a_fresh_engine_goes_on_from_pages_of_another",
                "test_kv_movement.py::test_connectors_that_are_fit",
            ),
        ),
        Row(
            "Other KV connectors (NIXL, Offloading, ...)",
            cases(OTHERS_REFUSED, "example", "one-group", "offloading", "nixl", "multi"),
            refused="use SimpleCPUOffloadConnector",
        ),
        Row(
            "`--kv-offloading-backend lmcache`", ("test_kv_movement.py::test_lmcache_is_refused",), refused="use native"
        ),
        Row(
            "`--disable-hybrid-kv-cache-manager`",
            ("test_errors.py::test_the_hybrid_cache_manager_is_needed",),
            refused="disable-hybrid-kv-cache-manager",
        ),
    ),
    "Parallelism": (
        Row(
            "Tensor parallel 2",
            ("test_engine_processes.py::test_tensor_parallelism_and_a_worker_that_dies",),
            Gpu(("0.32",), (PARALLEL_CHECK,)),
            note="two H200: [speed](benchmarks/results/nvidia-h200.md)",
        ),
        Row(
            "Pipeline parallel 2",
            ("test_engine_processes.py::test_pipeline_parallelism_and_torch_compile",),
            note="two GPUs: not tried",
        ),
        Row(
            "Data parallel 2",
            ("test_server.py::test_data_parallel_engines_answer_as_one_does",),
            note="two GPUs: not tried",
        ),
        Row(
            "Ray: tensor parallel 2 on one node, on two",
            cases("test_ray.py::test_ray_equals_multiprocessing", "one node", "two nodes"),
            Gpu(("0.32",), (PARALLEL_CHECK,)),
            note="two H200; vLLM has Ray on GPUs only, the tests add it to its CPU platform",
        ),
        Row(
            "Context parallelism",
            ("test_compat.py::test_context_parallelism_is_refused",),
            refused="does not support context parallelism",
        ),
    ),
    "Decoding": (
        Row(
            "Speculation: n-grams",
            ("test_engine_processes.py::test_ngram_speculation_changes_nothing",),
            Gpu(BOTH),
            note="on a GPU near ties may differ",
        ),
        Row(
            "Speculation: a draft model",
            ("test_decoding.py::test_a_draft_model_changes_nothing",),
            Gpu(BOTH),
            note="on a GPU near ties may differ",
        ),
        Row(
            "Speculation: EAGLE, EAGLE3",
            (
                "test_drafters.py::test_an_eagle_head_changes_nothing",
                "test_drafters.py::test_an_eagle3_head_changes_nothing",
            ),
        ),
        Row("Speculation: MTP", note="not tried"),
        Row(
            "A quantized drafter", ("test_decoding.py::test_a_quantized_drafter_is_refused",), refused="kv_cache_dtype"
        ),
        Row("Beam search", ("test_decoding.py::test_beam_search_equals_auto_in_the_bypass",)),
        Row(
            "`n` > 1, `prompt_logprobs`",
            (
                "test_engine.py::test_sampling_features",
                "test_decoding.py::test_prompt_logprobs_equal_auto_in_the_bypass",
            ),
            Gpu(("0.32",), (SOAK,)),
        ),
        Row("Structured output", ("test_decoding.py::test_a_grammar_is_kept_to",)),
        Row("LoRA", ("test_engine_processes.py::test_lora_is_untouched",)),
    ),
    "Operation": (
        Row(
            "Clients that leave",
            (
                "test_server.py::test_a_client_that_leaves_in_the_middle_of_its_prompt",
                "test_server.py::test_a_client_that_leaves_in_the_middle_of_its_answer",
                "test_server.py::test_a_crowd_that_leaves_at_once",
            ),
        ),
        Row("Malformed requests", ("test_server.py::test_requests_that_make_no_sense",)),
        Row(
            "A killed worker or engine: an error, no hang",
            (
                "test_engine_processes.py::test_tensor_parallelism_and_a_worker_that_dies",
                "test_server.py::test_a_killed_engine_ends_its_server",
            ),
        ),
        Row(
            "Soak: random requests, replayed alone",
            ("test_soak.py::test_a_hundred_and_fifty_requests",),
            Gpu(("0.32",), (SOAK,)),
            note="on an H100 [300 s](benchmarks/results/soak.md); `make soak`: 20,000 requests",
        ),
        Row("Gauges in `/metrics`", ("test_metrics.py::test_an_engine_reports_its_requests",)),
        Row("`vllm-kivi eval`", ("test_cli.py::test_scores_are_those_of_transformers",), Gpu(BOTH)),
        Row("Another vLLM than 0.32 and 0.33", ("test_errors.py::test_versions",), refused="supports vLLM 0.32, 0.33"),
    ),
    "`KiviCache` in transformers": (
        Row(
            'Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, attention `"kivi"`',
            ("test_transformers.py::test_logits_are_the_oracles",),
            IN_TRANSFORMERS,
        ),
        Row("Any other attention", ("test_transformers.py::test_other_attention_reads_the_same",), IN_TRANSFORMERS),
        Row(
            "Padded batches, beams, rows that move",
            (
                "test_transformers.py::test_padding_is_not_stored",
                "test_transformers.py::test_beam_search",
                "test_transformers.py::test_rows_move",
            ),
            IN_TRANSFORMERS,
        ),
        Row(
            "Encoder-decoder models, vision towers",
            ("test_transformers.py::test_attention_that_is_not_causal",),
            note="`EncoderDecoderCache(KiviCache(model.config), DynamicCache())`",
        ),
        Row("`torch.autocast`", ("test_transformers.py::test_autocast",)),
        Row(
            "Assisted decoding",
            (
                "test_transformers.py::test_crop_within_max_crop_is_exact",
                "test_transformers.py::test_assisted_decoding",
            ),
            IN_TRANSFORMERS,
        ),
        Row(
            "A prompt kept in a file",
            ("test_transformers.py::test_a_prompt_is_used_again",),
            IN_TRANSFORMERS,
        ),
        Row(
            "`torch.compile`, CUDA graphs",
            (
                "test_transformers_compile.py::test_one_graph_serves_all_steps",
                "test_transformers_compile.py::test_generate_compiles",
            ),
            Gpu(("transformers 5.17",), ("tests/test_transformers_compile.py",)),
            note="with `max_cache_len`",
        ),
        Row("Layers on several GPUs", gpu=IN_TRANSFORMERS, note="two H200"),
        Row(
            "lm-eval",
            (
                "test_lm_eval.py::test_likelihoods_are_those_of_a_cache_by_hand",
                "test_lm_eval.py::test_scored_tokens_read_quantized_pages",
            ),
        ),
    ),
}


def rows() -> list[Row]:
    return [row for group in ROWS.values() for row in group]


def claimed() -> set[str]:
    """Tests that a row names, as file::test or file::test[case]."""
    return {test for row in rows() for test in row.tests}


@dataclass(frozen=True)
class Test:
    """A test as its file says, found without importing it: a whole collection takes most of a minute."""

    __test__ = False

    source: str
    marks: tuple[str, ...]
    cases: tuple[str, ...]


@cache
def read_tests(file: str) -> dict[str, Test]:
    """Tests of tests/`file` by name. Cases have pytest's ids, where one decorator lists them all."""
    source = (TESTS / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    marks = [ast.unparse(values["pytestmark"])] if "pytestmark" in values else []
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            own = list(node.decorator_list)
            listed = [x for x in own if isinstance(x, ast.Call) and ast.unparse(x.func).endswith(".parametrize")]
            names = _ids(listed[0], values) if len(listed) == 1 else ()
            text = "\n".join(ast.get_source_segment(source, x) or "" for x in (*own, node))
            found[node.name] = Test(text, (*marks, *map(ast.unparse, own)), names)
    return found


def _ids(decorator: ast.Call, values: dict[str, ast.expr]) -> tuple[str, ...]:
    """pytest's names for the cases; none where they are computed."""
    keywords = {keyword.arg: keyword.value for keyword in decorator.keywords}
    listed = decorator.args[1]
    if isinstance(listed, ast.Name):
        listed = values.get(listed.id, listed)
    try:
        if "ids" in keywords:
            return tuple(ast.literal_eval(keywords["ids"]))
        arguments = ast.literal_eval(decorator.args[0])
    except ValueError:
        return ()
    names = arguments if isinstance(arguments, tuple) else (arguments,)
    elements = listed.keys if isinstance(listed, ast.Dict) else getattr(listed, "elts", [])
    return tuple("-".join(_id_parts(names, element, i)) for i, element in enumerate(elements))


def _id_parts(names: tuple[str, ...], element: ast.expr | None, index: int) -> list[str]:
    parts = element.elts if len(names) > 1 and isinstance(element, ast.Tuple) else [element]
    return [
        str(part.value) if isinstance(part, ast.Constant) else f"{name}{index}"
        for name, part in zip(names, parts, strict=True)
    ]


def split(test: str) -> tuple[str, str, str]:
    """file, name and case."""
    file, _, name = test.partition("::")
    name, _, case = name.partition("[")
    return file, name, case.removesuffix("]")


def _cpu(row: Row) -> str:
    links = []
    for file, name in dict.fromkeys(split(test)[:2] for test in row.tests):
        slow = " (`make soak`)" if any("mark.slow" in mark for mark in read_tests(file)[name].marks) else ""
        links.append(f"[{name.removeprefix('test_')}](tests/{file}){slow}")
    return ("refused: " if row.refused else "") + ", ".join(links)


def _h100(gpu: Gpu | None) -> str:
    if gpu is None:
        return ""
    links = ", ".join(f"[{Path(file).stem}]({file})" for file in gpu.files)
    return f"{', '.join(gpu.versions)}: {links or 'by hand'}"


def table() -> str:
    """The matrix in Markdown, between its markers."""
    version = re.findall(r"^VLLM_VERSION := (\d+\.\d+)", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)[0]
    lines = [BEGIN, "", f"| feature | on a CPU, vLLM {version}: test | on an H100: vLLM, by | note |"]
    lines.append("|---|---|---|---|")
    for group, members in ROWS.items():
        lines.append(f"| **{group}** | | | |")
        for row in members:
            note = "; ".join(filter(None, [row.refused and f'"{row.refused}"', row.note]))
            lines.append(f"| {row.feature} | {_cpu(row)} | {_h100(row.gpu)} | {note} |")
    return "\n".join([*lines, "", END])


def written(readme: str) -> str:
    """The README with the matrix as it must be."""
    before, rest = readme.split(BEGIN)
    return before + table() + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the support matrix.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args().write:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
