"""`vllm-kivi eval tasks`: local data sets, lm-eval's prompts and metrics over them, and scores through an engine."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import engines
import pytest
import torch

from vllm_kivi import cli
from vllm_kivi.evaluate import harness, session, task_data, tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'vllm-kivi[eval]'"
)
WORDS = ("the", "whale", "sea", "ship", "captain", "said", "and", "went", "was", "white")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(split, number):
    """GSM8K's fields; answers are the number of the document, plus 1,000 in the train split."""
    base = 1000 * (split == "train")
    return [{"question": f"the sea {base + i} ?", "answer": f"went {i} .\n#### {base + i}"} for i in range(number)]


def longbench(answers, context="the whale", **fields):
    row = {"input": "said ?", "context": context, "answers": answers, "all_classes": None, "length": 2, "_id": "0"}
    return row | fields


# -- files --------------------------------------------------------------------------------------------------------


def test_wikitext_is_cut_into_pages_whatever_its_format(tmp_path):
    lines = [" \n", " = A title = \n", " \n", " Some text . \n", " = = A section = = \n", " More . \n", " = B = \n"]
    expected = ["".join(lines[1:6]), lines[6]]
    (tmp_path / "wiki.test.raw").write_text("".join(lines))
    assert task_data.read("wikitext", "test", tmp_path) == [{"page": page} for page in expected]
    # As on the hub: a line in each row, empty ones without their newline; or a page in each row.
    rows = jsonl(tmp_path / "lines.jsonl", [{"text": "" if line == " \n" else line} for line in lines])
    pages = task_data.read("wikitext", "test", rows)
    assert [page["page"].split() for page in pages] == [page.split() for page in expected]
    whole = jsonl(tmp_path / "pages.jsonl", [{"page": page} for page in expected])
    assert task_data.read("wikitext", "test", whole) == [{"page": page} for page in expected]


def test_published_names_are_found_and_the_first_that_is_there_wins(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train.json").write_text(json.dumps(sums("train", 1)))
    jsonl(tmp_path / "train.jsonl", sums("train", 3))
    test = jsonl(tmp_path / "test.jsonl", sums("test", 2))
    for path in (tmp_path, test):
        assert task_data.read("gsm8k", "test", path) == sums("test", 2)
        assert task_data.read("gsm8k", "train", path) == sums("train", 3)  # beside the file of the test split
    assert task_data.read("gsm8k", "test", tmp_path / "main" / "train.json") == sums("train", 1)


def test_shards_of_parquet_are_read_in_order(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="comes with lm-eval")
    from pyarrow import parquet

    (tmp_path / "main").mkdir()
    for shard in range(2):
        rows = sums("test", 4)[2 * shard : 2 * shard + 2]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "main" / f"test-0000{shard}-of-00002.parquet")
    assert task_data.read("gsm8k", "test", tmp_path) == sums("test", 4)


def test_longbench_stands_for_the_parts_that_are_there(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("lcc", "hotpotqa", "not_a_part"):
        jsonl(tmp_path / "data" / f"{name}.jsonl", [longbench(["x"])])
    assert list(task_data.parse_tasks((f"longbench={tmp_path}",))) == ["longbench_hotpotqa", "longbench_lcc"]
    (row,) = task_data.read("longbench_lcc", "test", tmp_path)
    assert row["question"] == "said ?"


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("wikitext={}", "wiki.test.raw or "),
        ("wikitext", "--task wikitext=PATH: no file or folder is given"),
        ("gsm8k={}/nothing", 'expected a file of GSM8K ("question" and "answer"), its test split as .jsonl'),
        ("gsm8k={}", "--task gsm8k=PATH: nothing to read at"),
        ("gsm8k={}/only/test.jsonl", "its train split as .jsonl, .json or .parquet, or a folder with train.jsonl"),
        ("longbench={}", "a folder with hotpotqa.jsonl or data/hotpotqa.jsonl"),
        ("longbench_lcc={}", "a folder with lcc.jsonl"),
        ("longbench_lcc={}/bad/lcc.jsonl", "document 1 of"),
        ("longbench_lcc={}/bad/lcc.jsonl", "lcc.jsonl has no 'answers'"),
        ("gsm8k={}/bad/broken.jsonl", "cannot read"),
        ("gsm8k={}/bad/empty.jsonl", "has no documents"),
        ("gsm8k={}/bad/text.txt", "has no 'question' and no 'answer'"),
        ("mmlu={}", "--task mmlu: no such task; accepted: wikitext, gsm8k, longbench"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, task, named):
    for folder in ("only", "bad"):
        (tmp_path / folder).mkdir()
    jsonl(tmp_path / "only" / "test.jsonl", sums("test", 2))
    jsonl(tmp_path / "bad" / "lcc.jsonl", [{"context": "", "all_classes": None}])
    (tmp_path / "bad" / "broken.jsonl").write_text('{"question": ')
    (tmp_path / "bad" / "empty.jsonl").write_text("\n")
    (tmp_path / "bad" / "text.txt").write_text("words\n")
    command = ["eval", "tasks", "m", "--kv-cache-dtype", "kivi2", "--task", task.format(tmp_path)]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-kivi: error: --task ") and named in error


def test_without_lm_eval_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    jsonl(tmp_path / "test.jsonl", sums("test", 2))
    command = ["eval", "tasks", "m", "--kv-cache-dtype", "kivi2", "--task", f"gsm8k={tmp_path}", "--shots", "0"]
    assert cli.main(command) == 1
    assert "pip install 'vllm-kivi[eval]'" in capsys.readouterr().err


# -- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 17, 30])
def test_rolling_windows_score_every_token_once(number):
    windows = tasks.rolling_windows(range(number), 99, 8)
    scored = [token for window, count in windows for token in window[len(window) - count :]]
    assert scored == list(range(number))
    assert all(count < len(window) <= 9 for window, count in windows)
    # The last one reaches back as far as it can.
    assert len(windows[-1][0]) == min(number + 1, 9)


@needs_lm_eval
@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 17, 30])
def test_rolling_windows_are_those_of_lm_eval(number):
    from lm_eval.utils import get_rolling_token_windows

    pairs = get_rolling_token_windows(list(range(number)), prefix_token=99, max_seq_len=8, context_len=1)
    # A pair of inputs and targets that end one apart; ours have both in one list.
    theirs = [([*inputs, targets[-1]], len(targets)) for inputs, targets in pairs]
    assert tasks.rolling_windows(range(number), 99, 8) == theirs


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11])
def test_long_prompts_lose_their_middle(length):
    kept = tasks.cut_middle(range(10), length)
    assert len(kept) == min(length, 10)
    assert kept == [*range(length // 2), *range(10 - (length - length // 2), 10)] if length < 10 else list(range(10))


@needs_lm_eval
def test_gsm8k_has_as_many_examples_as_asked_for(tmp_path):
    jsonl(tmp_path / "train.jsonl", sums("train", 20))
    jsonl(tmp_path / "test.jsonl", sums("test", 5))
    for shots, expected in ((None, 5), (2, 2), (0, 0)):
        (task,) = harness.load({"gsm8k": tmp_path}, shots, 3)
        prompts = [prompt for prompt, _ in task.arguments()]
        assert task.shots == expected and not task.rolling
        assert [prompt.count("#### 10") for prompt in prompts] == [expected] * 3
        assert [prompt.endswith(f"the sea {i} ?\nAnswer:") for i, prompt in enumerate(prompts)] == [True] * 3
        again = harness.load({"gsm8k": tmp_path}, shots, 3)[0].arguments()
        assert again == task.arguments()
    # Strict wants the published form; flexible takes the last number. Each cache's answers are scored anew.
    for _ in range(2):
        scores = task.scores(["so #### 0", "it is 1", "#### 3, not 2"])
        assert scores == {"exact_match (strict-match)": [1, 0, 0], "exact_match (flexible-extract)": [1, 1, 1]}
    assert task.value("exact_match (strict-match)", [1, 0, 0]) == pytest.approx(1 / 3)


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "document", "answer", "metric", "score"),
    [
        ("hotpotqa", longbench(["white whale", "ship"]), "The white ship", "qa_f1_score", 2 / 3),
        ("gov_report", longbench(["the white whale went"]), "the white sea went", "rouge_score", 3 / 4),
        (
            "trec",
            longbench(["Animal"], all_classes=["Animal", "Human"]),
            "Animal or Human",
            "classification_score",
            0.5,
        ),
        ("passage_retrieval_en", longbench(["Paragraph 3"]), "Paragraph 3", "retrieval_score", 1),
        ("passage_count", longbench(["7"]), "7 of 14", "count_score", 0.5),
        ("lcc", longbench(["return x"]), "# no\nreturn x\nreturn y", "code_sim_score", 1),
        ("multifieldqa_zh", longbench(["白鲸"]), "白鲸", "qa_f1_zh_score", 1),
    ],
)
def test_longbench_has_the_published_metric_of_each_part(tmp_path, name, document, answer, metric, score):
    jsonl(tmp_path / f"{name}.jsonl", [document, document])
    (task,) = harness.load(task_data.parse_tasks((f"longbench_{name}={tmp_path}",)), None, None)
    prompt, generation = task.arguments()[0]
    assert "the whale" in prompt and generation["max_gen_toks"] in (32, 64, 512)
    scores = task.scores([answer, ""])
    assert list(scores) == [metric]
    assert scores[metric] == [pytest.approx(score, abs=1e-6), 0]


# -- through an engine --------------------------------------------------------------------------------------------


def save_tokenizer(path):
    """Words of a small vocabulary and single letters; one token begins every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = {chr(code): 2 + code - 32 for code in range(32, 127)}
    vocabulary = {"<s>": 0, "</s>": 1, **characters, **{word: 100 + i for i, word in enumerate(WORDS)}, "<unk>": 110}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    return fast


def words(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())


@needs_lm_eval
def test_scores_are_those_of_transformers_and_quantized_pages_change_them(tmp_path, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = engines.save_tiny_llama(tmp_path / "tiny")
    tokenizer = save_tokenizer(model)
    pages = [words(350, 0), words(40, 1), words(450, 2)]
    jsonl(tmp_path / "test.jsonl", [{"page": page} for page in pages])
    jsonl(tmp_path / "hotpotqa.jsonl", [longbench(["x"], words(60 + 90 * i, i)) for i in range(4)])
    arguments = ["--task", f"wikitext={tmp_path}/test.jsonl", "--task", f"longbench_hotpotqa={tmp_path}"]
    arguments += ["--kv-cache-dtype", "kivi2", "--max-length", "400", "--parallel", "3", "--dtype", "float32", "--json"]
    # vLLM compiles how prompt logprobs are gathered, which takes longer than all else here.
    with torch._dynamo.config.patch(disable=True):
        assert cli.main(["eval", "tasks", str(model), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["kv_cache_dtype"], row["task"]): row for row in report["results"]}
    assert list(rows) == [(name, task) for name in ("auto", "kivi2") for task in ("wikitext", "longbench_hotpotqa")]
    auto, two = rows["auto", "wikitext"], rows["kivi2", "wikitext"]

    loss, number = 0.0, 0
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    for page in pages:
        for window, scored in tasks.rolling_windows(tokenizer.encode(page, add_special_tokens=False), 0, 398):
            with torch.inference_mode():
                logits = reference(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
            loss -= logits.gather(1, torch.tensor(window)[1:, None])[-scored:].sum().item()
        number += len(page.split())
    (score,) = auto["scores"]
    assert score["metric"] == "word_perplexity" and score["difference"] == 0
    assert math.log(score["value"]) == pytest.approx(loss / number, abs=1e-3)
    (score,) = two["scores"]
    assert score["difference"] == pytest.approx(math.log(score["value"]) - math.log(auto["scores"][0]["value"]))
    assert abs(score["difference"]) > 1e-5 and score["standard_error"] > 0
    assert (auto["layers"], two["layers"], two["bits"]) == ({"float32": 2}, {"kivi2": 2}, 4)  # scales of 32 bits
    assert auto["quantized_tokens"] == 0 < two["quantized_tokens"] < 1

    auto, two = rows["auto", "longbench_hotpotqa"], rows["kivi2", "longbench_hotpotqa"]
    # Prompts of about 100, 200, 300 and 400 tokens, of which 368 are kept: all but the first read quantized pages.
    assert (two["documents"], two["longest_prompt"], two["cut_prompts"]) == (4, 368, 1)
    assert 0 < two["quantized_context"] < two["quantized_tokens"] < 1
    assert auto["peak_kv_bytes"] > 2 * 300 * auto["kv_bytes_per_token"]
    lines = tasks.table(report).splitlines()
    assert sum("kivi2 x 2" in line for line in lines) == 2 and "1 prompts were longer than 400" in lines[-1]


def test_differences_are_paired_by_document():
    class Task:
        rolling = False

        def scores(self, answers):
            return {"f1": answers}

        def value(self, metric, scores):
            return sum(scores) / len(scores)

    def answers(*values):
        return tasks._Answers(list(values), [], {}, 0, 0.0)

    (score,) = tasks._scores(Task(), answers(1, 0, 0.5, 1), answers(1, 0.5, 1, 1), 64, [])
    assert score["value"] == 0.625 and score["difference"] == -0.25
    assert score["standard_error"] == pytest.approx(torch.tensor([0, 0.5, 0.5, 0]).std().item() / 2)
    (score,) = tasks._scores(Task(), answers(1), answers(0), 64, [])
    assert score["standard_error"] is None and "±" not in tasks._texts(score)[1]


def test_max_length_must_leave_room_for_the_answer():
    class Task:
        name, rolling = "gsm8k", False

        def arguments(self):
            return [("a prompt", {"until": ["\n"]})]

    with pytest.raises(session.EvalError, match="--max-length 200 leaves no room beside the 256 tokens"):
        tasks.build_requests(Task(), None, 200)
