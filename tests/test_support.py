"""The README's support matrix claims what tests prove, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import SimpleNamespace

import conftest
import pytest
from support import BEGIN, END, README, ROWS, TESTS, Gpu, Row, cases, claimed, read_tests, rows, split, written

NEVER = ("mark.skip", "mark.xfail", "pytest.skip", "importorskip")


def supported() -> set[str]:
    """Versions of vLLM, out of compat.py."""
    tree = ast.parse((TESTS.parent / "vllm_kivi" / "compat.py").read_text(encoding="utf-8"))
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and "SUPPORTED" in ast.unparse(node))
    return {".".join(map(str, version)) for version in ast.literal_eval(value)}


def faults(row: Row) -> Iterator[str]:
    """Why a row may not stand in the README."""
    for test in row.tests:
        file, name, case = split(test)
        found = read_tests(file).get(name) if (TESTS / file).exists() else None
        if found is None:
            yield f"there is no {test}"
            continue
        if case and case not in found.cases:
            yield f"{name} has no case {case}, but {', '.join(found.cases)}"
        if any(word in text for word in NEVER for text in (found.source, *found.marks)):
            yield f"{test} may be skipped"
        if row.refused not in found.source.replace("\\", ""):  # of regular expressions
            yield f"{test} does not expect the words {row.refused!r}"
    if row.gpu is not None:
        yield from (f"there is no {file}" for file in row.gpu.files if not (TESTS.parent / file).exists())
        of_vllm = [version for version in row.gpu.versions if not version.startswith("transformers ")]
        yield from (f"vLLM {version} is not supported" for version in of_vllm if version not in supported())
        if not row.gpu.versions:
            yield "it does not say with which vLLM it was measured"
    if not (row.tests or row.gpu or row.note):
        yield "nothing proves it, and no note says so"
    if row.refused and not row.tests:
        yield "no test shows the refusal"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature)
def test_a_row_claims_what_is_proved(row):
    assert not list(faults(row))


def test_the_readme_has_the_matrix():
    readme = README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1, f"README.md needs the lines {BEGIN} and {END}, each once"
    assert readme == written(readme), "the support matrix in README.md is old: run `python tests/support.py --write`"


def test_features_are_named_once():
    names = [row.feature for row in rows()]
    assert len(names) == len(set(names)) > 40
    assert all(ROWS.values())


@pytest.mark.parametrize("test", ["test_models.py::test_family", "test_models.py::test_refused"])
def test_every_family_has_its_row(test):
    """A model that is tested is in the matrix, and one that is refused as well."""
    file, name, _ = split(test)
    assert set(cases(test, *read_tests(file)[name].cases)) <= claimed()


def test_cases_have_the_names_that_pytest_gives_them(request):
    """Of the tests that this session runs: what is read out of the files is what is collected."""
    by_case = {test.partition("[")[0] for test in claimed() if "[" in test}
    for item in request.session.items:
        test = f"{item.path.name}::{item.name}"
        if test.partition("[")[0] in by_case:
            file, name, case = split(test)
            assert case in read_tests(file)[name].cases


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row("x", ("test_nowhere.py::test_x",)), "there is no test_nowhere.py::test_x"),
        (Row("x", ("test_models.py::test_x",)), "there is no test_models.py::test_x"),
        (Row("x", ("test_models.py::test_family[bert]",)), "has no case bert"),
        (Row("x", ("test_cuda.py::test_opcheck",)), "may be skipped"),
        (Row("x", ("test_retrieval.py::test_the_heat_map_is_written",)), "may be skipped"),
        (Row("x", ("test_errors.py::test_mla_model",), refused="MoE"), "does not expect the words 'MoE'"),
        (Row("x", refused="MLA"), "no test shows the refusal"),
        (Row("x"), "nothing proves it"),
        (Row("x", gpu=Gpu(("0.31",))), "vLLM 0.31 is not supported"),
        (Row("x", gpu=Gpu(())), "does not say with which vLLM"),
        (Row("x", gpu=Gpu(("0.32",), ("tests/gpu/other.py",))), "there is no tests/gpu/other.py"),
    ],
)
def test_a_row_without_proof_is_a_fault(row, fault):
    assert any(fault in found for found in faults(row))


@pytest.mark.parametrize(
    ("file", "name", "outcome", "expected"),
    [
        ("test_errors.py", "test_mla_model", "skipped", "failed"),
        ("test_models.py", "test_family[qwen2]", "skipped", "failed"),
        ("test_engine.py", "test_the_bypass_equals_auto[160]", "skipped", "failed"),  # the row names all its cases
        ("test_errors.py", "test_mla_model", "passed", "passed"),
        ("test_errors.py", "test_bad_options", "skipped", "skipped"),
    ],
)
def test_a_claimed_test_may_not_be_skipped(file, name, outcome, expected):
    """Whoever skips it: a mark, a fixture or the test."""
    report = SimpleNamespace(outcome=outcome, skipped=outcome == "skipped", longrepr="no GPU")
    hook = conftest.pytest_runtest_makereport(SimpleNamespace(path=TESTS / file, name=name))
    next(hook)
    with pytest.raises(StopIteration) as stop:
        hook.send(report)
    assert stop.value.value is report and report.outcome == expected
    if expected == "failed":
        assert "support matrix" in report.longrepr and name in report.longrepr and "no GPU" in report.longrepr
