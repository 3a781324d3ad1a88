"""Launch configurations: tables, heuristics, candidates and the tuner's choice, all without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m2f_kernels import _tuning, tune
from m2f_kernels.ops.attention_mask import configs as mask_configs
from m2f_kernels.ops.masked_attention import configs as attention_configs

SMALL, LARGE, OTHER = {"BLOCK": 16, "num_warps": 4}, {"BLOCK": 64, "num_warps": 4}, {"BLOCK": 32, "num_warps": 4}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of tables in place of the package's."""
    monkeypatch.setattr(_tuning, "DIRECTORY", tmp_path)
    _tuning._table.cache_clear()
    yield tmp_path
    _tuning._table.cache_clear()


# ---------------------------------------------------------------- tables


def test_write_table_merges(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sm_90.json"
    assert _tuning.read_table(path) == {}
    _tuning.write_table(path, {"a": {"x": SMALL, "y": LARGE}, "b": {"x": SMALL}})
    _tuning.write_table(path, {"a": {"x": OTHER}, "c": {"x": LARGE}})
    expected = {"a": {"x": OTHER, "y": LARGE}, "b": {"x": SMALL}, "c": {"x": LARGE}}
    assert _tuning.read_table(path) == expected
    assert json.loads(path.read_text()) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["JSON"]),
        ("[]", ["kernel -> key", "[]"]),
        ('{"a": 3}', ["kernel -> key", "3"]),
        ('{"a": {"x": [1]}}', ["'a'", "'x'", "[1]"]),
        ('{"a": {"x": {"BLOCK": 1.5}}}', ["'a'", "'x'", "1.5"]),
        ('{"a": {"x": {"BLOCK": true}}}', ["True"]),
    ],
)
def test_bad_table_is_an_error(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sm_90\.json: expected") as caught:
        _tuning.read_table(path)
    assert all(word in str(caught.value) for word in words)


def test_configuration_comes_from_the_table(tables: Path) -> None:
    _tuning.write_table(tables / "sm_90.json", {"a": {"x": LARGE}})
    assert _tuning.configuration(90, "a", "x", SMALL) == LARGE
    for capability, kernel, key in ((80, "a", "x"), (90, "b", "x"), (90, "a", "y")):
        assert _tuning.configuration(capability, kernel, key, SMALL) == SMALL


def test_table_of_other_names_is_an_error(tables: Path) -> None:
    """A table written for another version of a kernel."""
    _tuning.write_table(tables / "sm_90.json", {"a": {"x": {"OLD": 1}}})
    with pytest.raises(ValueError, match=r"expected \['BLOCK', 'num_warps'\] for 'a', 'x'; got \['OLD'\]"):
        _tuning.configuration(90, "a", "x", SMALL)


def test_forced(tables: Path) -> None:
    """Before the table; nested; gone afterwards, also after an error."""
    _tuning.write_table(tables / "sm_90.json", {"a": {"x": LARGE}})

    def found() -> _tuning.Configuration:
        return _tuning.configuration(90, "a", "x", SMALL)

    with _tuning.forced("a", "x", OTHER):
        assert found() == OTHER
        with _tuning.forced("a", "x", SMALL):
            assert found() == SMALL
        assert found() == OTHER
        assert _tuning.configuration(90, "a", "y", SMALL) == SMALL
    assert found() == LARGE
    with pytest.raises(RuntimeError, match="boom"), _tuning.forced("a", "x", OTHER):
        raise RuntimeError("boom")
    assert found() == LARGE


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("d", [8, 17, 32, 64, 128])
@pytest.mark.parametrize("q", [1, 20, 100, 200])
@pytest.mark.parametrize("size", [2, 4])
def test_candidates(tables: Path, size: int, q: int, d: int) -> None:
    """The default comes first; all have its names and are different; every one can be launched in principle."""
    for lookup, enumerated in (
        (attention_configs.forward(90, size, q, d), attention_configs.candidates_forward(size, q, d)),
        (attention_configs.backward(90, size, q, d), attention_configs.candidates_backward(size, q, d)),
        (mask_configs.predict(90, size, q), mask_configs.candidates(size, q)),
    ):
        assert enumerated[0] == lookup
        assert 1 < len(enumerated) <= 150
        assert len({tuple(sorted(c.items())) for c in enumerated}) == len(enumerated)
        for candidate in enumerated:
            assert candidate.keys() == lookup.keys()
            for name, value in candidate.items():
                if name.startswith("BLOCK") or name == "num_warps":
                    assert value > 0
                    assert value & (value - 1) == 0, f"{name}={value} is no power of two"
                    assert not name.startswith("BLOCK") or value >= 16
            assert candidate.get("BLOCK_K", 32) % 32 == 0, "tiles are whole words"


# ---------------------------------------------------------------- tuner


def problem(call, candidates=(SMALL, LARGE, OTHER), bound=1e-6):
    return tune.Problem("a", "x", list(candidates), call, bound)


def now() -> _tuning.Configuration:
    return _tuning.configuration(90, "a", "x", SMALL)


def by_block(times: dict[int, float]):
    """A clock: milliseconds by the block size of the configuration that is in force."""
    return lambda call: times[now()["BLOCK"]]


def test_tune_takes_the_fastest() -> None:
    outcome = tune.tune(problem(lambda: (torch.ones(3),)), time=by_block({16: 0.3, 64: 0.1, 32: 0.2}))
    assert outcome == tune.Outcome(LARGE, 100.0, 300.0)


def test_tune_keeps_the_default_where_nothing_is_faster() -> None:
    outcome = tune.tune(problem(lambda: (torch.ones(3),)), time=by_block({16: 0.1, 64: 0.1, 32: 0.2}))
    assert outcome.best == SMALL


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 1.1]), torch.tensor([1.0, float("nan")])])
def test_tune_rejects_wrong_results(wrong: torch.Tensor) -> None:
    """However fast they come."""

    def call() -> tuple[torch.Tensor]:
        return (wrong if now() == LARGE else torch.ones(2),)

    outcome = tune.tune(problem(call), time=by_block({16: 0.3, 64: 0.1, 32: 0.2}))
    assert outcome == tune.Outcome(OTHER, 200.0, 300.0, wrong=[LARGE])


def test_tune_passes_over_what_cannot_run() -> None:
    def call() -> tuple[torch.Tensor]:
        if now() == LARGE:
            raise MemoryError
        return (torch.ones(2),)

    clock = by_block({16: 0.3, 64: 0.1, 32: 0.2})
    outcome = tune.tune(problem(call), time=clock, refused=(MemoryError,))
    assert outcome == tune.Outcome(OTHER, 200.0, 300.0, failed=[LARGE])
    with pytest.raises(MemoryError):
        tune.tune(problem(call), time=clock)


def test_integers_must_agree_exactly() -> None:
    bits = torch.tensor([1, 2], dtype=torch.int32)
    assert tune.agrees([bits], [bits.clone()], 1.0)
    assert not tune.agrees([bits], [bits + 1], 1.0)
    assert tune.agrees([torch.tensor([1.0])], [torch.tensor([1.01])], 0.1)


def test_problems_run_in_the_interpreter() -> None:
    """Every problem's call gives agreeing results with another of its candidates."""
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU; the tuner itself runs there")
    names = []
    for one in tune.problems(tune.KERNELS, ["float32", "bfloat16"], [5], [16], 70, torch.device("cpu")):
        names.append((one.kernel, one.key))
        expected = one.call()
        with _tuning.forced(one.kernel, one.key, one.candidates[-1]):
            assert tune.agrees(one.call(), expected, one.bound), one
    assert len(set(names)) == 6


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--directory", str(tmp_path)]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
