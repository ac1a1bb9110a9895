"""`vllm-kivi eval passkey` and `needle`: the prompts, what counts as right, and answers through an engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kivi import cli
from vllm_kivi.evaluate import heatmap, prompts, retrieval
from vllm_kivi.format import KVFormat

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2"
TEXT = ROOT / "tests" / "data" / "persuasion.txt"


class Letters:
    """A tokenizer with a token for each character, and one that begins every text."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def build(task=prompts.PASSKEY, lengths=(400, 700), depths=(0.0, 0.3, 0.5, 1.0), samples=3, seed=0, haystack=None):
    haystack = Letters().encode(prompts.FILLER * 12, False) if haystack is None else haystack
    return prompts.build_prompts(task, lengths, depths, samples, seed, Letters(), haystack)


# -- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [prompts.PASSKEY, prompts.NEEDLE])
def test_prompts_have_exact_lengths_and_hide_the_needle_where_they_say(task):
    built = build(task)
    assert [prompt.length for prompt in built] == [400] * 12 + [700] * 12
    for prompt in built:
        text = Letters().decode(prompt.tokens)
        assert len(prompt.tokens) == prompt.length
        assert text.startswith(chr(1) + task.intro) and text.endswith(task.question)
        assert text[prompt.start : prompt.stop] == task.needle.replace("{answer}", prompt.answer)
        assert text.count(prompt.answer) == task.needle.count("{answer}")
        begin, end = 1 + len(task.intro), prompt.length - len(task.question)
        room = end - begin - (prompt.stop - prompt.start)
        # The nearest end of a sentence is at most half the longest sentence away.
        assert abs(prompt.start - begin - prompt.depth * room) <= 13
        assert prompt.start == begin or text[prompt.start - 1] in ".\n" or prompt.stop == end
        if prompt.depth in (0, 1):
            assert (prompt.start == begin, prompt.stop == end) == (prompt.depth == 0, prompt.depth == 1)


def test_prompts_are_new_ones_and_the_same_for_the_same_seed():
    built = build()
    assert len({prompt.answer for prompt in built}) > 20
    assert len({tuple(prompt.tokens[: prompt.start]) for prompt in built if prompt.depth == 1}) == 6
    assert build() == built != build(seed=1)


@pytest.mark.parametrize(
    ("lengths", "named"), [((150,), "--lengths 150 is too short"), ((4000,), "--lengths 4000 is longer than the text")]
)
def test_lengths_that_do_not_fit(lengths, named):
    with pytest.raises(ValueError, match=named):
        build(lengths=lengths)


@pytest.mark.parametrize(
    ("task", "output", "right"),
    [
        (prompts.PASSKEY, " 12345.", True),
        (prompts.PASSKEY, "123456", False),
        (prompts.PASSKEY, " 1234", False),
        (prompts.PASSKEY, " not 12345", False),
        (prompts.NEEDLE, " called 12345 ", True),
        (prompts.NEEDLE, " 12 345", False),
    ],
)
def test_what_is_right(task, output, right):
    assert task.is_right(output, "12345") is right


def test_words_are_right_in_any_case_and_spacing():
    assert prompts.NEEDLE.is_right("the blue\nLantern, I think", "BLUE LANTERN")


def test_a_needle_counts_as_quantized_only_as_a_whole():
    """300 tokens in chunks of 64: the last chunk begins at 256, and with R = 128 reads tokens below 128 quantized."""
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", sink_tokens=4)
    chunks = [(0, 64), (64, 64), (128, 64), (192, 64), (256, 44), (300, 1)]

    def prompt(start, stop):
        return prompts.Prompt([0] * 300, "", 300, 0.0, start, stop)

    for start, stop, quantized in ((4, 128, True), (3, 20, False), (100, 129, False), (200, 220, False)):
        assert retrieval.needle_is_quantized(fmt, chunks, prompt(start, stop)) is quantized
    assert not retrieval.needle_is_quantized(fmt, [(0, 300), (300, 1)], prompt(20, 40))


# -- the report ---------------------------------------------------------------------------------------------------


def result(name, right, bits):
    cells = [
        {"length": length, "depth": depth, "right": right[length], "prompts": 2, "needles_quantized": 1}
        for length in (300, 600)
        for depth in (0.0, 1.0)
    ]
    share = sum(right.values()) / 4
    all_ = {"prompts": 8, "right": share, "difference": share - 0.75, "standard_error": 0.125}
    none = {"prompts": 0, "right": None, "difference": None, "standard_error": None}
    return {
        "kv_cache_dtype": name,
        "layers": {name: 2},
        "bits": bits,
        "kv_bytes_per_token": 100.0,
        "kv_bytes_of_longest": 2.0**20,
        "quantized_tokens": 0.5,
        "needles_quantized": None,
        "cells": cells,
        "all": all_,
        "retrieved": none,
    }


@pytest.fixture
def measured(monkeypatch):
    report = {
        "measure": "passkey",
        "model": "Some/Model-1.5B",
        "text": None,
        "prompts": 8,
        "chunk": 64,
        "dtype": "bfloat16",
        "vllm": "0",
        "device": "cpu",
        "baseline": "auto",
        "lengths": [300, 600],
        "depths": [0.0, 1.0],
        "retrieved_lengths": [],
        "results": [result("auto", {300: 2, 600: 1}, 16.0), result("kivi2", {300: 1, 600: 0}, 3.0)],
    }
    monkeypatch.setattr(retrieval, "run", lambda settings: report)
    return report


def command(folder):
    return ["eval", "passkey", "Some/Model-1.5B", "--kv-cache-dtype", "kivi2", "--output", str(folder)]


def test_the_table_has_every_cell(measured):
    lines = retrieval.table(measured).splitlines()
    assert any("kivi2 x 2" in line and "25.0 %" in line and "-50.0 ± 12.5" in line for line in lines)
    grid = lines[lines.index("kivi2: right answers") + 4 :]
    assert [line.replace(" ", "") for line in grid] == ["|0%|1/2|0/2|", "|100%|1/2|0/2|"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_heat_map_is_written(measured, tmp_path, capsys):
    assert cli.main(command(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"passkey-some-model-1.5b.{suffix}" for suffix in ("json", "md", "png")
    ]
    picture = (tmp_path / "passkey-some-model-1.5b.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert capsys.readouterr().err == ""


def test_without_matplotlib_table_and_json_are_written_anyway(measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert cli.main(command(tmp_path)) == 0
    captured = capsys.readouterr()
    assert "needs matplotlib: pip install 'vllm-kivi[bench]'" in captured.err
    assert captured.out == retrieval.table(measured) + "\n"
    assert (tmp_path / "passkey-some-model-1.5b.md").read_text() == captured.out
    assert json.loads((tmp_path / "passkey-some-model-1.5b.json").read_text()) == measured
    with pytest.raises(ValueError, match="matplotlib"):
        heatmap.draw(measured, tmp_path / "x.png")


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["passkey", "m", "--text", "missing.txt"], "--text missing.txt: no such file"),
        (["passkey", "/nowhere"], "/nowhere: no such folder"),
        (["needle", "m", "--text", str(TEXT), "--needle", "x"], "--needle, --question and --answer belong together"),
        (
            ["needle", "m", "--text", str(TEXT), "--needle", "x", "--question", "y", "--answer", "z"],
            "does not contain the --answer 'z'",
        ),
    ],
)
def test_bad_requests_name_the_option(capsys, arguments, named):
    assert cli.main(["eval", *arguments, "--kv-cache-dtype", "kivi2"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vllm-kivi: error: ") and named in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["needle", "m"], "--text"), (["passkey", "m", "--depths", "101"], "101 is not in [0, 100]")],
)
def test_bad_usage_names_the_option(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", *arguments, "--kv-cache-dtype", "kivi2"])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_smollm2_finds_pass_keys_in_quantized_pages():
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"{MODEL} is missing: run `make model`, or `make test`, which does")
    arguments = ["--kv-cache-dtype", "kivi4", "--lengths", "256", "--depths", "0", "100", "--samples", "2", "--json"]
    full = [sys.executable, "-m", "vllm_kivi.cli", "eval", "passkey", str(MODEL), *arguments]
    finished = subprocess.run(full, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    auto, four = report["results"]
    # A small model may miss one; a cache that returned other tokens' keys or values would lose all digits.
    assert report["prompts"] == 4 and min(auto["all"]["right"], four["all"]["right"]) >= 3 / 4
    assert (auto["all"]["difference"], auto["quantized_tokens"], auto["bits"]) == (0, 0, 16)
    # The last chunk begins at 192 and reads tokens below 64 from quantized pages: needles at the beginning only.
    assert [cell["needles_quantized"] for cell in four["cells"]] == [2, 0]
    assert (four["needles_quantized"], four["quantized_tokens"], four["bits"]) == (0.5, 1, 5)
    assert four["layers"] == {"kivi4": 30}
    assert auto["kv_bytes_of_longest"] >= 256 * auto["kv_bytes_per_token"]
    assert four["kv_bytes_of_longest"] > 256 * four["kv_bytes_per_token"]
