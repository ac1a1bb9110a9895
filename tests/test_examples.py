"""examples/: on a real model as users run them, and on tiny random ones in this process, which is faster."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import environment
from test_models import FAMILIES, save

EXAMPLES = Path(__file__).parent.parent / "examples"
SMOLLM2 = EXAMPLES.parent / "models" / "smollm2"
TEXT = Path(__file__).parent / "data" / "persuasion.txt"

pytestmark = pytest.mark.skipif(not SMOLLM2.exists(), reason="needs models/smollm2: make model")


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def qwen(request, tmp_path_factory) -> Path:
    """A random model that knows SmolLM2's tokens."""
    family = FAMILIES[request.param]
    path = save(tmp_path_factory.mktemp(request.param), family.config, family.settings | {"vocab_size": 49152})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMOLLM2 / name, path)
    return path


def run(name: str, *arguments: object, said: str = "") -> str:
    """What an example prints in a process of its own."""
    command = [sys.executable, *map(str, (EXAMPLES / name, *arguments))]
    env = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, input=said, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., str]:
    """What an example prints, in this process."""

    def run_here(name: str, *arguments: object, said: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def total(printed: str) -> tuple[int, int, float]:
    """Of the last line of CacheInfo: tokens quantized and in full precision in all layers, and the compression."""
    (line,) = re.findall(r"^ *all +([\d,]+) +([\d,]+) +[\d.]+ +[\d.]+ +([\d.]+)x$", printed, re.MULTILINE)
    return int(line[0].replace(",", "")), int(line[1].replace(",", "")), float(line[2])


def test_basic():
    printed = run("transformers_basic.py", SMOLLM2, "--prompt", "What is the capital of France?", "--preset", "kivi4")
    assert "Paris" in printed.splitlines()[0] and "\nkivi4: " in printed
    quantized, full, _ = total(printed)
    # A short answer stays in full precision.
    assert quantized == 0 and full % 30 == 0 and 0 < full <= 30 * 128


def test_basic_with_qwen(qwen, run_here):
    quantized, full, compression = total(run_here("transformers_basic.py", qwen, "--max-new-tokens", 200))
    assert quantized % 2 == 0 and quantized > 2 * 64 and full >= 2 * 128
    assert compression > 1


def test_a_chat_goes_on_from_its_cache_and_from_a_file(tmp_path, run_here, capsys):
    about, cache = tmp_path / "about.txt", tmp_path / "about.kivi"
    about.write_text("The lighthouse keeper is called Bartholomew. He has a dog.\n" + TEXT.read_text()[:1500])
    arguments = ["transformers_streaming.py", SMOLLM2, "--about", about, "--cache", cache, "--max-new-tokens", 20]
    said = "What is the name of the lighthouse keeper?\nWhat is the capital of France?\n"
    first, computed = run(*arguments, said=said), 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal computed
        if isinstance(module, torch.nn.Embedding):
            computed += inputs[0].numel()

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    again = run_here(*arguments, said=said)
    hook.remove()
    number = re.match(r"([\d,]+) tokens saved to ", first)[1]
    assert again.startswith(f"{number} tokens loaded from {cache}\n")
    # What was loaded is what was computed, and the same is said.
    assert first.splitlines()[1:] == again.splitlines()[1:]
    answers = first.splitlines()[1:3]
    assert "Bartholomew" in answers[0] and "Paris" in answers[1]
    quantized, full, compression = total(first)
    # All is in one cache, the text, both questions and both answers, and each of their tokens was computed once.
    assert quantized + full == 30 * (int(number) + computed)
    assert quantized > full and compression > 1.5
    about.write_text("Something else.")
    with pytest.raises(SystemExit):
        run_here(*arguments)
    assert "is the cache of another text" in capsys.readouterr().err


def test_a_chat_with_qwen(qwen, run_here):
    printed = run_here("transformers_streaming.py", qwen, "--max-new-tokens", 90, said="Who?\nWhat?\n")
    quantized, full, _ = total(printed)
    # Two answers of 90 tokens, of which the model has not seen the last one.
    assert quantized > 0 and 2 * 179 < quantized + full < 2 * 260


def test_memory():
    context, steps = 512, 4
    printed = run("transformers_memory.py", SMOLLM2, TEXT, "--context", context, "--steps", steps)
    (row,) = printed.splitlines()[1:]
    tokens, *numbers = re.match(r" *([\d,]+) +([\d.]+) MiB +([\d.]+) /s +([\d.]+) MiB +([\d.]+) /s ", row).groups()
    plain, plain_speed, packed, speed = map(float, numbers)
    assert tokens == "512" and plain_speed > 0 < speed
    assert plain == pytest.approx((context + steps) * 30 * 3 * 64 * 2 * 2 / 2**20, abs=0.1)
    assert plain / packed > 1.7


def test_memory_with_qwen(qwen, run_here, capsys):
    command = ["transformers_memory.py", qwen, TEXT, "--preset", "kivi4", "--steps", 2, "--context"]
    ratios = [
        float(re.search(r"([\d.]+) times smaller", row)[1]) for row in run_here(*command, 200, 1500).splitlines()[1:]
    ]
    assert len(ratios) == 2 and 6 > ratios[1] > max(3, ratios[0])
    with pytest.raises(SystemExit):
        run_here(*command, 10**6)
    assert "--context 1000000 needs a longer text" in capsys.readouterr().err
