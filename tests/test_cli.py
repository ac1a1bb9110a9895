"""The command line, the perplexity that it measures, and the model that the demo and these tests run."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import engines
import pytest
import torch

from vllm_kivi import __version__, cli
from vllm_kivi.evaluate import cache, ppl, report, session
from vllm_kivi.format import KVFormat
from vllm_kivi.options import PUBLISHED

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2"
TEXT = ROOT / "tests" / "data" / "persuasion.txt"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"{MODEL} is missing: run `make model`, or `make test`, which does")
    return MODEL


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Engines run in the tests' process, and what the command does to silence vLLM there is undone."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    level = logging.getLogger("vllm").level
    yield
    logging.getLogger("vllm").setLevel(level)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NoBar:
    """Counts what a progress bar would show."""

    total = 0

    def update(self, count):
        self.total += count


# -- the numbers behind the report --------------------------------------------------------------------------------


def test_windows_are_whole_and_begin_with_the_prefix():
    assert ppl.cut_windows(range(10), [], 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ppl.cut_windows(range(10), [99], 4, None) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert ppl.cut_windows(range(10), [], 5, 9) == [[0, 1, 2, 3, 4]]
    assert ppl.cut_windows(range(10), [], 11, None) == []


@pytest.mark.parametrize("parallel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_windows", range(1, 20))
def test_batches_are_as_equal_as_can_be(num_windows, parallel):
    sizes = session.batch_sizes(num_windows, parallel)
    assert sum(sizes) == num_windows
    assert max(sizes) <= parallel and max(sizes) - min(sizes) <= 1
    assert len(sizes) == math.ceil(num_windows / parallel)


@pytest.mark.parametrize(
    ("residual", "sinks", "chunk"), [(128, 0, 64), (128, 4, 64), (0, 0, 32), (40, 8, 100), (512, 0, 7)]
)
def test_quantized_context_counts_what_each_row_reads(residual, sinks, chunk):
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", residual_length=residual, sink_tokens=sinks)
    window, first = 500, 125
    reads = []
    for target in range(first, window):  # scored by the row before it
        row = target - 1
        start = max(position for position in range(0, window, chunk) if position <= row)
        groups = [g for g in range(0, window, 32) if g + 32 <= start + 1 - residual and g + 32 <= start]
        reads.append((sum(sinks <= token < (groups[-1] + 32 if groups else 0) for token in range(window)), row + 1))
    expected = sum(q > 0 for q, _ in reads) / len(reads), sum(q / length for q, length in reads) / len(reads)
    reads = cache.Reads()
    chunks = [(start, min(chunk, window - start)) for start in range(0, window, chunk)]
    reads.add(fmt, chunks, window, first - 1, window - 2)
    assert (reads.rows, *reads.result().values()) == (window - first, *map(pytest.approx, expected))


def test_rows_past_the_prompt_read_as_decode_does():
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", residual_length=0)
    # Rows 90 to 99 of a prompt of 95: those of the prompt read no token of their own chunk.
    assert cache.row_boundaries(fmt, 90, 10, 95) == [64] * 5 + [96] * 5
    bypass = KVFormat("kivi2", 64, 2, "bfloat16", residual_length=0, full_precision=True)
    assert cache.row_boundaries(bypass, 90, 10, 95) == [0] * 10


def test_a_candidate_has_options_of_its_own():
    settings = ppl.Settings("m", TEXT, ("kivi2:group_size=64,full_precision=true", "auto", "kivi2"))
    auto, own, plain = session.candidates(settings)
    assert (auto.label, own.label, own.dtype) == ("auto", "kivi2:group_size=64,full_precision=true", "kivi2")
    common = {"kivi": {"group_size": 32, "residual_length": 64}, "other": 1}
    options = {"group_size": 64, "residual_length": 64, "full_precision": True}
    assert own.additional_config(common) == {"kivi": options, "other": 1}
    assert plain.additional_config(common) == auto.additional_config(common) == common


def test_paired_difference_is_per_token_and_its_error_per_block():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(3, 50, generator=generator).double() + 0.5
    # Tokens of a block err together: their number must not make the error look smaller.
    ours, theirs = blocks.repeat_interleave(64, 1), torch.zeros(3, 50 * 64)
    mean, error = report.paired_difference(ours.tolist(), theirs.tolist(), 64)
    assert mean == pytest.approx(blocks.mean().item())
    assert error == pytest.approx(blocks.std().item() / math.sqrt(150))
    mean, _ = report.paired_difference([[1.0] * 64 + [3.0]], [[0.0] * 65], 64)
    assert mean == pytest.approx(67 / 65)


# -- scoring through an engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return engines.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def chunked(model, kv_cache_dtype, windows, chunk, **overrides):
    settings = {
        "max_num_seqs": len(windows),
        "max_num_batched_tokens": len(windows) * chunk,
        "long_prefill_token_threshold": chunk,
    }
    bar = NoBar()
    with engines.engine(model, kv_cache_dtype, **(settings | overrides)) as llm:
        nll = ppl.score(llm, windows, chunk, bar)
    assert bar.total == sum(map(len, windows))
    return torch.tensor(nll)


def test_scores_are_those_of_transformers(tiny):
    from transformers import LlamaForCausalLM

    windows = [engines.prompt(300, seed) for seed in range(3)]
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor(windows)).logits[:, :-1]
    targets = torch.tensor(windows)[:, 1:, None]
    expected = -logits.log_softmax(-1).gather(-1, targets)[..., 0]
    torch.testing.assert_close(chunked(tiny, "auto", windows, 64), expected, atol=1e-3, rtol=1e-3)


def test_scores_come_from_quantized_pages(tiny):
    windows = [engines.prompt(300, seed) for seed in range(2)]
    settings = {"additional_config": {"kivi": PUBLISHED}}
    exact, two, eight = (chunked(tiny, dtype, windows, 64, **settings) for dtype in ("auto", "kivi2", "kivi8"))
    # The chunk of tokens 128 to 191 is the last whose boundary, with R = 128, is 0: row 191 scores token 192.
    torch.testing.assert_close(two[:, :191], exact[:, :191], atol=1e-3, rtol=1e-3)
    loss_two, loss_eight = ((scores - exact)[:, 192:].abs().mean() for scores in (two, eight))
    assert loss_two > 0.05
    assert loss_eight < loss_two / 10


@pytest.mark.parametrize(("number", "budget"), [(1, 4096), (2, 4096), (2, 100)])
def test_chunks_are_those_asked_for_or_an_error(tiny, number, budget):
    """Of engines that would take larger ones, a request alone the whole budget, and of one that takes smaller ones."""
    windows = [engines.prompt(300, seed) for seed in range(number)]
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": 4, "long_prefill_token_threshold": 0}
    with engines.engine(tiny, "kivi2", **settings) as llm, cache.observe(llm) as seen:
        if budget < number * 64:
            with pytest.raises(RuntimeError, match="not in chunks of 64"):
                ppl.score(llm, windows, 64, NoBar())
            return
        ppl.score(llm, windows, 64, NoBar())
        assert list(seen.chunks.values()) == [[(0, 64), (64, 64), (128, 64), (192, 64), (256, 44)]] * number


def test_a_batched_prefill_reads_nothing_quantized(tiny):
    windows = [engines.prompt(300, seed) for seed in range(2)]
    exact, streamed, batched = (
        chunked(tiny, dtype, windows, chunk, max_num_batched_tokens=600)
        for dtype, chunk in (("auto", 300), ("kivi2", 64), ("kivi2", 300))
    )
    torch.testing.assert_close(batched, exact, atol=1e-3, rtol=1e-3)
    assert (streamed - exact).abs().mean() > 0.02


def test_the_report_says_which_layers_are_quantized(tiny):
    """And how: 2 KV heads of 64 channels in two layers, one of which is left in float32."""
    with engines.engine(tiny, "kivi2", kv_cache_dtype_skip_layers=["0"]) as llm:
        described, fmt = cache.describe(llm), cache.kivi_format(llm)
    full, quantized = 2 * 2 * 64 * 4, 2 * fmt.token_bytes
    assert described["layers"] == {"float32": 1, "kivi2": 1}
    assert described["kv_bytes_per_token"] == full + quantized
    assert not cache.unquantized(described)
    with engines.engine(tiny, "auto") as llm:
        assert cache.unquantized(cache.describe(llm)) and cache.kivi_format(llm) is None


def test_peak_bytes_are_those_of_the_blocks_held(tiny):
    windows = [engines.prompt(300, seed) for seed in range(2)]
    with engines.engine(tiny, "auto", block_size=32) as llm, cache.observe(llm) as seen:
        ppl.score(llm, windows, 300, NoBar())
        assert seen.peak_blocks * cache.block_bytes(llm) == 2 * 320 * (2 * 2 * 2 * 64 * 4)


# -- the command --------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vllm-kivi {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--window", "64"], "--chunk 64 must be smaller than --window 64"),
        (["--window", "80", "--skip", "0.999"], "--skip 0.999 leaves no token"),
        (["--additional-config", '{"kivi": {"groups": 32}}'], "unknown option 'groups'; accepted: group_size"),
        (["--additional-config", '{"kivi": {"group_size": 48}}'], "accepted: 32, 64, 128"),
        (["--kv-cache-dtype", "kivi3"], "--kv-cache-dtype kivi3: Input should be"),
        (["--kv-cache-dtype", "kivi4:group_size"], "'group_size' is not option=value"),
        (["--kv-cache-dtype", "kivi4:groups=32"], "unknown option 'groups'; accepted: group_size"),
        (["--kv-cache-dtype", "fp8:group_size=32"], "--kv-cache-dtype fp8:group_size=32: only kivi2, "),
        (["--baseline", "kivi4:group_size=48"], "accepted: 32, 64, 128"),
        (["--window", "4096"], "--window 4096 must be less than the model's 4096 positions"),
        (["/nowhere"], "/nowhere: no such folder"),
        (["--output", str(TEXT)], "persuasion.txt: File exists; name a folder that can be written"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: No such file or directory; name a folder"),
    ],
)
def test_bad_requests_name_the_option(tiny, capsys, arguments, named):
    model = [] if arguments[0].startswith("/") else [str(tiny)]
    status = cli.main(["eval", "ppl", "--text", str(TEXT), "--kv-cache-dtype", "kivi2", *model, *arguments])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith("vllm-kivi: error: ")
    assert named in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["eval", "ppl", "m", "--text", "t"], "--kv-cache-dtype"),
        (["eval", "ppl", "m", "--text", "t", "--kv-cache-dtype", "kivi2", "--chunk", "0"], "0 is not 1 or more"),
        (["eval", "ppl", "m", "--text", "t", "--kv-cache-dtype", "kivi2", "--skip", "1"], "1 is not in [0, 1)"),
        (["eval", "ppl", "m", "--text", "t", "--kv-cache-dtype", "kivi2", "--additional-config", "{"], "not JSON"),
        (["eval", "ppl", "m", "--text", "t", "--kv-cache-dtype", "kivi2", "--additional-config", "[]"], "JSON object"),
    ],
)
def test_bad_usage_names_the_option(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("vllm", ["eval", "ppl", "--text", str(TEXT), "--kv-cache-dtype", "kivi2"]),
        ("vllm", ["inspect", "--text", str(TEXT)]),
        ("transformers", ["plan"]),
    ],
)
def test_a_missing_package_is_named(tiny, capsys, monkeypatch, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([*arguments, str(tiny)]) == 1
    assert capsys.readouterr().err.startswith(f"vllm-kivi: error: this needs {package}: pip install {package}")


def test_text_that_fills_no_window(smollm2, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    assert cli.main(["eval", "ppl", str(smollm2), "--text", str(text), "--kv-cache-dtype", "kivi2"]) == 1
    assert "do not fill one --window of 2048" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe")
    assert cli.main(["eval", "ppl", str(smollm2), "--text", str(text), "--kv-cache-dtype", "kivi2"]) == 1
    assert "is not UTF-8" in capsys.readouterr().err


def test_eval_ppl_prints_json_alone_and_what_the_cache_holds(smollm2, tmp_path):
    command = [sys.executable, "-m", "vllm_kivi.cli", "eval", "ppl", str(smollm2), "--text", str(TEXT), "--json"]
    command += ["--kv-cache-dtype", "kivi2", "--window", "512", "--tokens", "1024", "--output", str(tmp_path)]
    command += ["--additional-config", json.dumps({"kivi": PUBLISHED})]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    rows = {(row["kv_cache_dtype"], row["prefill"]): row for row in measured["results"]}
    assert list(rows) == [(name, prefill) for name in ("auto", "kivi2") for prefill in ("streaming", "batched")]
    auto, two, batched = rows["auto", "streaming"], rows["kivi2", "streaming"], rows["kivi2", "batched"]
    assert (measured["model"], measured["text"], measured["windows"], measured["scored_tokens"]) == (
        "smollm2",
        "persuasion.txt",
        2,
        2 * 384,
    )
    # 30 layers, 3 KV heads, head_dim 64: 16 bits an element, or 2 with a scale and a zero of 16 bits for 32 elements.
    assert (auto["layers"], auto["kv_bytes_per_token"], auto["bits"]) == ({"bfloat16": 30}, 30 * 3 * 2 * 64 * 2, 16)
    assert (two["layers"], two["kv_bytes_per_token"], two["bits"]) == ({"kivi2": 30}, 30 * 3 * 48, 3)
    assert auto["kv_bytes_per_window"] >= 512 * auto["kv_bytes_per_token"] > 1.5 * two["kv_bytes_per_window"]
    assert two["kv_bytes_per_window"] > 512 * two["kv_bytes_per_token"]
    assert auto["nll_difference"] == 0 and auto["quantized_tokens"] == 0
    # Rows 127 to 191 belong to chunks that start below token 192, which read nothing quantized.
    assert two["quantized_tokens"] == pytest.approx((384 - 65) / 384)
    assert batched["quantized_tokens"] == 0
    assert 10 < auto["perplexity"] < 100
    assert two["nll_difference"] > 0.02 > 0.01 > abs(batched["nll_difference"])
    assert 0 < two["nll_standard_error"] < 0.1
    assert [line.count("|") for line in ppl.table(measured).splitlines()[2:8]] == [12] * 6
    assert (tmp_path / "ppl-smollm2.md").read_text() == ppl.table(measured) + "\n"
    assert json.loads((tmp_path / "ppl-smollm2.json").read_text()) == measured


# -- the model ----------------------------------------------------------------------------------------------------


def test_gguf_names_become_hugging_face_names():
    name = load_script("make_model").hugging_face_name
    assert name("blk.12.attn_k.weight", "llama") == "model.layers.12.self_attn.k_proj.weight"
    assert name("blk.0.ffn_norm.weight", "llama") == "model.layers.0.post_attention_layernorm.weight"
    assert name("blk.0.ffn_norm.weight", "gemma3") == "model.layers.0.pre_feedforward_layernorm.weight"
    assert name("blk.3.attn_k_norm.weight", "gemma3") == "model.layers.3.self_attn.k_norm.weight"
    assert name("token_embd.weight", "llama") == "model.embed_tokens.weight"
    with pytest.raises(KeyError):
        name("blk.0.attn_k_norm.weight", "llama")


def test_rotary_halves_are_apart_again():
    unpermute = load_script("make_model").unpermute
    # Two heads of 8 channels; every row holds the number of the channel that GGUF put there.
    rows = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15.0])
    assert unpermute(rows[:, None].expand(-1, 3), 2).tolist() == [[channel] * 3 for channel in range(16)]


def test_smollm2_answers_on_a_two_bit_cache(smollm2):
    from vllm import SamplingParams

    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    with engines.engine(smollm2, "kivi2", dtype="bfloat16", skip_tokenizer_init=False, max_model_len=512) as llm:
        (output,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
