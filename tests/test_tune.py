"""Launch configurations: tables, and the tuner without a GPU."""

import json
import subprocess
import sys

import pytest
import torch

from m2f_kernels import _tuning, tune
from m2f_kernels.ops.attention_mask import configs as mask_configs
from m2f_kernels.ops.masked_attention import configs

DEFAULT = {"BLOCK_Q": 64, "num_warps": 4}


def test_masks_of_few_keys_get_smaller_tiles_in_tf32x3(monkeypatch):
    """The other products keep the tiles that a GPU has measured."""
    for keys in (1024, 4096, 16384):
        assert mask_configs.default(4, 100, keys) == mask_configs.default(4, 100)
        assert mask_configs.default(2, 100, keys) == mask_configs.default(2, 100)
    monkeypatch.setattr(_tuning, "TF32X3", True)
    assert [mask_configs.default(4, 100, keys)["BLOCK_S"] for keys in (1024, 4096, 16384)] == [32, 32, 64]


def test_without_a_gpu_the_tuner_says_so():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: `python -m m2f_kernels.tune` would measure")
    done = subprocess.run([sys.executable, "-m", "m2f_kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr


def test_tables_are_merged(tmp_path):
    path = tmp_path / "tuned" / "sm_90.json"
    assert _tuning.read_table(path) == {}
    _tuning.write_table(path, {"a": {"x": {"n": 1}, "y": {"n": 2}}})
    _tuning.write_table(path, {"a": {"y": {"n": 3}}, "b": {"z": {"n": 4}}})
    assert _tuning.read_table(path) == {"a": {"x": {"n": 1}, "y": {"n": 3}}, "b": {"z": {"n": 4}}}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"x": {"n": 1.5}}}', '{"a": {"x": {"n": true}}}'])
def test_bad_tables_are_named(tmp_path, content):
    path = tmp_path / "sm_90.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sm_90.json: expected"):
        _tuning.read_table(path)


def test_a_table_takes_the_defaults_place(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuning, "DIRECTORY", tmp_path)
    _tuning._table.cache_clear()
    try:
        (tmp_path / "sm_90.json").write_text(json.dumps({"k": {"x": {"BLOCK_Q": 32, "num_warps": 8}, "old": {"W": 1}}}))
        assert _tuning.configuration(90, "k", "x", DEFAULT) == {"BLOCK_Q": 32, "num_warps": 8}
        assert _tuning.configuration(90, "k", "other", DEFAULT) == DEFAULT
        assert _tuning.configuration(80, "k", "x", DEFAULT) == DEFAULT
        with pytest.raises(ValueError, match=r"expected \['BLOCK_Q', 'num_warps'\] for 'k', 'old'"):
            _tuning.configuration(90, "k", "old", DEFAULT)
        with _tuning.forced("k", "x", {"BLOCK_Q": 16, "num_warps": 2}):
            assert _tuning.configuration(90, "k", "x", DEFAULT)["BLOCK_Q"] == 16
        assert _tuning.configuration(90, "k", "x", DEFAULT)["BLOCK_Q"] == 32
    finally:
        _tuning._table.cache_clear()


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("q", [1, 20, 100, 200])
def test_candidates(element_size, q):
    """The default is the first, none comes twice, all have its names."""
    lists = [mask_configs.candidates(element_size, q)]
    for d in (16, 32, 64, 128):
        lists.append(configs.candidates(configs.default_forward(element_size, q, d)))
        lists.append(configs.candidates(configs.default_backward(element_size, q, d)))
    for found in lists:
        assert len(found) > 5
        assert all(one.keys() == found[0].keys() for one in found)
        assert len({tuple(sorted(one.items())) for one in found}) == len(found)


@pytest.mark.parametrize("element_size", [2, 4])
def test_one_key_has_one_default(element_size):
    """Calls that share a line of the table are launched alike without one; otherwise what was measured for one number
    of queries would serve another that wants something else."""
    found = {}
    for q in range(1, 400):
        found.setdefault((mask_configs.key(element_size, q), "mask"), []).append(mask_configs.default(element_size, q))
        for d in (8, 16, 20, 32, 64, 128):
            key = configs.key(element_size, q, d)
            found.setdefault((key, "forward"), []).append(configs.default_forward(element_size, q, d))
            found.setdefault((key, "backward"), []).append(configs.default_backward(element_size, q, d))
    for key, defaults in found.items():
        assert all(one == defaults[0] for one in defaults), key


def test_tuned_problems_have_keys_of_their_own():
    """The sizes that the tuner measures do not overwrite each other's lines."""
    for element_size in (2, 4):
        assert len({mask_configs.key(element_size, q) for q in (20, 100, 200)}) == 3
        assert len({configs.key(element_size, q, d) for q in (20, 100, 200) for d in (32, 64)}) == 6


def test_the_fastest_right_candidate_wins():
    """One is slow, one wrong, one fails, one is fast; what is left out is named."""
    names = ["slow", "wrong", "failing", "fast"]
    candidates = [{"i": i} for i in range(4)]
    current = lambda: names[_tuning._forced["k", "x"]["i"]]  # noqa: E731

    def run():
        if current() == "failing":
            raise RuntimeError("out of resource")
        return (torch.ones(3) * (2 if current() == "wrong" else 1),)

    lines = []
    times = {"slow": 2.0, "fast": 1.0, "wrong": 0.1}
    problem = tune.Problem("k", "x", candidates, run)
    assert tune.fastest(problem, lambda _: times[current()], lines.append) == ({"i": 3}, False)
    assert "gives another result" in lines[0]
    assert "failed: RuntimeError" in lines[1]


def test_batches_name_every_kernel_once():
    """`waves` alone makes no other kernel."""
    default = configs.default_backward(2, 100, 32)
    problems = [tune.Problem("k", str(d), configs.candidates({**default, "BLOCK_Q": d}), tuple) for d in (64, 128)]
    parts = tune.batches(iter(problems))
    assert {index for index, _ in parts} == {0, 1}
    assert all(0 < len(candidates) <= 8 for _, candidates in parts)
    for index, problem in enumerate(problems):
        kernels = [tuple(c[k] for k in c if k != "waves") for i, part in parts if i == index for c in part]
        assert len(kernels) == len(set(kernels))
        assert set(kernels) == {tuple(c[k] for k in c if k != "waves") for c in problem.candidates}
        assert len(kernels) <= len(problem.candidates) / 2 + 1


def test_candidates_are_compiled_in_other_processes():
    """On CPU nothing is compiled, but the operators are called the same way."""
    default = mask_configs.default(4, 20)
    lines = []
    tune.compile_ahead([(0, [default, default]), (1, [default])], "cpu", 2, lines.append)
    assert len(lines) == 2
    assert lines[-1] == "tried 3 of 3 candidates"


def test_a_candidate_that_fails_stops_no_other(monkeypatch):
    tried = []

    def run():
        tried.append(_tuning._forced["k", "x"]["i"])
        if tried[-1] == 1:
            raise RuntimeError("out of resource")
        return ()

    candidates = [{"i": i} for i in range(3)]
    monkeypatch.setattr(tune, "problems", lambda *_: iter([tune.Problem("k", "x", candidates, run)]))
    tune.compile_batch((0, candidates), "cpu")
    assert tried == [0, 1, 2]


def test_compiling_that_fails_is_named():
    """It is done again later, one by one: slower, not wrong."""
    lines = []
    tune.compile_ahead([(0, [{}, {}])], "no such device", 1, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("2 candidates wait until they are measured: RuntimeError: ")


def test_the_default_must_run():
    """Otherwise another candidate would silently become the yardstick."""

    def run():
        raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match=r"k, x: the default \{'i': 0\} does not run"):
        tune.fastest(tune.Problem("k", "x", [{"i": 0}, {"i": 1}], run), lambda _: 0.0, lambda _: None)


def test_problems_are_calls_of_the_operators(monkeypatch):
    """Everything that the tuner would measure on a GPU runs, small and on a CPU; each has a line of its own."""
    monkeypatch.setattr(tune, "KEYS", 96)
    monkeypatch.setattr(tune, "CHANNELS", 8)
    monkeypatch.setattr(tune, "HEADS", 1)
    seen = set()
    for problem in tune.problems(torch.device("cpu")):
        result = problem.run()
        outputs = result if isinstance(result, tuple) else (result,)
        assert tune.agree(outputs, problem.run())
        assert problem.candidates
        assert len({tuple(sorted(c)) for c in problem.candidates}) == 1
        assert (problem.kernel, problem.key) not in seen
        seen.add((problem.kernel, problem.key))
    assert {kernel for kernel, _ in seen} == {mask_configs.PREDICT, configs.FORWARD, configs.BACKWARD}


def test_different_results_do_not_agree():
    a = torch.randn(5, 7)
    bits = torch.zeros(4, dtype=torch.int32)
    assert tune.agree((a, bits), (a * (1 + 1e-7), bits))
    assert not tune.agree((a,), (a * 1.1,))
    assert not tune.agree((torch.full_like(a, torch.nan),), (a,))
    assert not tune.agree((bits,), (bits + 1,))
