"""`vllm-kivi inspect`: errors of a layer against the oracle, the rule of suggestions, and a model with key biases."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from vllm_kivi import cli, reference
from vllm_kivi.evaluate import inspection
from vllm_kivi.evaluate.layer_errors import LayerInputs, measure, ratios, through_cache
from vllm_kivi.format import KVFormat
from vllm_kivi.options import KiviOptions

DTYPES = (torch.float32, torch.bfloat16)


def format_of(preset="kivi2", dtype=torch.float32, **options):
    return KiviOptions(**options).format(preset, 64, 2, str(dtype).removeprefix("torch."))


def inputs_of(length, dtype=torch.float32, seed=0, soft_cap=0.0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(length, heads, 64, generator=generator).to(dtype) for heads in (6, 2, 2))
    key[:, :, 3] *= 8  # an outlier channel
    return LayerInputs(2 * query, key, value, 0.125, soft_cap)


# -- errors of one layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["kivi2", "kivi2_boost", "kivi_k4v2"])
def test_keys_and_values_are_those_of_each_tile_and_inputs_stay_as_they_are(preset, dtype):
    fmt, given = format_of(preset, dtype), inputs_of(150, dtype)
    before = given.key.clone(), given.value.clone()
    keys, values = through_cache(fmt, given.key, given.value)
    assert torch.equal(given.key, before[0]) and torch.equal(given.value, before[1])
    size = fmt.group_size
    whole = 150 // size * size
    for first in range(0, whole, size):
        part = slice(first, first + size)
        tile = reference.unpack_tile(fmt, reference.pack_tile(fmt, given.key[part], given.value[part]))
        for found, expected in zip((keys, values), reference.dequantize_tile(fmt, tile), strict=True):
            torch.testing.assert_close(found[part], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(keys[whole:], given.key[whole:].float()) and not torch.equal(keys, given.key.float())
    assert torch.equal(values[whole:], given.value[whole:].float())


@pytest.mark.parametrize(("sinks", "soft_cap"), [(0, 0.0), (5, 0.0), (0, 3.0)])
def test_errors_of_outputs_are_those_of_decoding_each_row(sinks, soft_cap):
    """From pages that the oracle wrote and read, full-precision ones included."""
    fmt, length = format_of(sink_tokens=sinks, residual_length=40), 200
    given = inputs_of(length, soft_cap=soft_cap)
    rows, counts = [90, 103, 104, 199], (sinks, 0 if sinks else 4)
    sums = measure(fmt, given, rows, counts)
    pages = [-(-length // n) for n in (fmt.page_tokens, fmt.full_page_tokens)]
    bytes_ = fmt.page_tokens * fmt.token_bytes, fmt.full_page_tokens * fmt.full_token_bytes
    quantized, full = (torch.zeros(p + 1, 2, b, dtype=torch.uint8) for p, b in zip(pages, bytes_, strict=True))
    tables = [torch.arange(1, p + 1, dtype=torch.int32)[None] for p in pages]
    where = quantized, full, *tables
    ends = torch.tensor([0, length], dtype=torch.int32)
    reference.store(given.key, given.value, *where, ends, ends[1:], fmt.layout())
    error, size = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for row in rows:
        one = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([row + 1], dtype=torch.int32)
        query = given.query[row : row + 1]
        read = reference.decode_float64(query, *where, *one, 0.125, soft_cap, fmt.layout())
        k, v = (x[: row + 1].double().repeat_interleave(3, 1) for x in (given.key, given.value))
        scores = 0.125 * torch.einsum("hd,thd->ht", query[0].double(), k)
        scores = soft_cap * (scores / soft_cap).tanh() if soft_cap else scores
        exact = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        error += (read[0] - exact).square().sum(-1).view(2, 3).sum(-1)
        size += exact.square().sum(-1).view(2, 3).sum(-1)
    torch.testing.assert_close(sums["output_error"][0], error, atol=0, rtol=1e-3)
    torch.testing.assert_close(sums["output"], size, atol=0, rtol=1e-4)
    assert (sums["output_error"][0] - sums["output_error"][1]).abs().min() > 1e-4  # with other sinks


def test_ratios_name_the_channel_that_stands_out():
    fmt, given = format_of(residual_length=0, sink_tokens=0, rotate_values=False), inputs_of(256)
    found = ratios(measure(fmt, given, [200, 255], (0, 4)))
    assert found["key_outliers"].argmax(-1).tolist() == [3, 3]
    assert found["key_outliers"][:, 3].tolist() == pytest.approx([8, 8], rel=0.2)
    keys, _ = through_cache(fmt, given.key, given.value)
    expected = (keys - given.key)[:, 1, 7].norm() / (given.key[:, 1, 7] - given.key[:, 1, 7].mean()).norm()
    assert found["key_channels"][1, 7].item() == pytest.approx(expected.item(), rel=1e-4)
    # A constant in a channel changes no error of keys: not even where it is far larger than the rest.
    given.key[:, :, 9] += 512
    shifted = ratios(measure(fmt, given, [200, 255], (0, 4)))
    assert shifted["key_channels"][:, 9].tolist() == pytest.approx(found["key_channels"][:, 9].tolist(), rel=0.05)


def test_nothing_is_lost_in_full_precision():
    fmt = format_of(full_precision=True)
    found = ratios(measure(fmt, inputs_of(256), [200, 255], inspection.sink_counts(fmt)))
    assert all((found[name] == 0).all() for name in ("keys", "values", "scores"))
    assert found["sinks"].max() < 1e-6 and found["layer_outputs"].max() < 1e-6  # sums in another order


@pytest.mark.parametrize("window", [193, 300])
def test_measured_rows_read_quantized_pages(window):
    fmt = format_of(sink_tokens=4)
    rows = inspection.measured_rows(fmt, window)
    assert len(rows) == len(set(rows)) and rows == sorted(rows) and rows[-1] == window - 1
    assert all(fmt.boundary(row + 1) > 4 for row in rows)


# -- suggestions --------------------------------------------------------------------------------------------------


def layers_of(*errors):
    return [{"layer": str(index), "output_error": error} for index, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("errors", "skipped"),
    [
        ((0.6, 0.1, 0.1, 0.1, 0.5), ["0", "4"]),
        ((0.29, 0.05, 0.05, 0.05, 0.05), []),  # stands out, but loses little
        ((0.6, 0.5, 0.5, 0.5, 0.5), []),  # loses much, but does not stand out
    ],
)
def test_layers_to_skip_lose_much_and_stand_out(errors, skipped):
    assert inspection.suggest(layers_of(*errors)) == skipped


def test_advice_says_what_to_set():
    layers = [layer | {"layer": layer["layer"]} for layer in layers_of(0.6, 0.1, 0.1, 0.1)]
    result = {
        "median_output_error": {"0": 0.4, "4": 0.1},
        "sink_tokens": 0,
        "suggested_skip_layers": ["0"],
        "kv_bytes_per_token": 4000,
        "kv_bytes_per_token_with_suggestion": 5000,
        "layers": layers,
    }
    sinks, skip = inspection.advice(result)
    assert "sink_tokens=4 makes" in sinks and "10.0 % instead of 40.0 %" in sinks
    assert "--kv-cache-dtype-skip-layers 0 (about 5,000 KV bytes a token instead of 4,000)" in skip
    assert inspection.advice(result | {"sink_tokens": 4, "suggested_skip_layers": []}) == ["No layer stands out."]
    bad = result | {"median_output_error": {"4": 0.7, "0": 0.8}, "sink_tokens": 4, "suggested_skip_layers": []}
    assert inspection.advice(bad) == ["Attention outputs of most layers are off by more than half: choose more bits."]


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8: only kivi's own can be inspected: kivi2, "),
        (["--kv-cache-dtype", "auto"], "--kv-cache-dtype: name one of kivi2, "),
        (["--kv-cache-dtype", "kivi2:groups=1"], "unknown option 'groups'"),
        (["--window", "128"], "--window 128 has no quantized token: kivi2 needs 160"),
        (["--text", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_bad_requests_name_the_option(tmp_path, capsys, arguments, named):
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    assert cli.main(["inspect", "m", "--text", str(text), *arguments]) == 1
    assert named in capsys.readouterr().err


def save_biased_qwen2(path, layers):
    """A random Qwen2 of six layers whose key biases are 30 times what keys vary in some layers, as the first and the
    last layers of Qwen2.5 have them, and a tokenizer with a token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 512}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.05, tie_word_embeddings=False))
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].self_attn.k_proj.bias.copy_(30 * torch.randn(2 * 64).sign())
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(512)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\x01", unk_token="?").save_pretrained(path)


def test_layers_with_key_biases_are_flagged_and_more_bits_need_no_skipping(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model, text = tmp_path / "qwen2", tmp_path / "text.txt"
    save_biased_qwen2(model, (0, 5))
    generator = torch.Generator().manual_seed(0)
    text.write_text("".join(chr(i) for i in torch.randint(97, 123, (400,), generator=generator)))
    command = ["inspect", str(model), "--text", str(text), "--window", "300", "--dtype", "float32", "--json"]
    command += ["--output", str(tmp_path / "out")]
    for name in ("kivi2", "kivi2_boost", "kivi4"):
        command += ["--kv-cache-dtype", name]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    two, boost, four = report["results"]
    assert (two["suggested_skip_layers"], four["suggested_skip_layers"]) == (["0", "5"], [])
    assert boost["suggested_skip_layers"] in ([], ["0"], ["0", "5"])
    assert [layer["layer"] for layer in two["layers"]] == list("012345")
    assert all(len(layer["heads"]) == 2 for layer in two["layers"])
    assert all(len(head["key_channels"]) == 64 for layer in two["layers"] for head in layer["heads"])
    for own, finer in zip(two["layers"], four["layers"], strict=True):
        assert 0 < finer["output_error"] < own["output_error"]
    skipped = two["kv_bytes_per_token_with_suggestion"] - two["kv_bytes_per_token"]
    assert skipped == 2 * (2 * 2 * 64 * 4 - two["layers"][0]["token_bytes"])
    assert report["layers_not_quantized"] == {}
    table = (tmp_path / "out" / "inspect-qwen2.md").read_text()
    assert "--kv-cache-dtype-skip-layers 0 5 " in table and table.count("No layer stands out.") >= 1
    assert table == inspection.table(report) + "\n"
    assert json.loads((tmp_path / "out" / "inspect-qwen2.json").read_text()) == report
    if importlib.util.find_spec("matplotlib") is not None:
        picture = (tmp_path / "out" / "inspect-qwen2.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    else:
        assert "needs matplotlib" in captured.err


def test_a_layer_that_kivi_leaves_alone_says_why():
    class Layer:
        attn_type, sliding_window, kv_sharing_target_layer_name, has_sink = "decoder", None, None, False

    layer = Layer()
    assert inspection._reason_unquantized(layer) is None
    for name, value, reason in (
        ("has_sink", True, "learned attention sinks"),
        ("kv_sharing_target_layer_name", "x", "shares another layer's cache"),
        ("sliding_window", 128, "sliding window"),
        ("attn_type", "encoder", "encoder attention"),
    ):
        setattr(layer, name, value)
        assert inspection._reason_unquantized(layer) == reason


def test_formats_of_the_model_dtype():
    assert format_of(dtype=torch.bfloat16) == KVFormat("kivi2", 64, 2, "bfloat16", **KiviOptions().resolved("kivi2"))
