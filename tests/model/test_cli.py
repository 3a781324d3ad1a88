"""The command line itself: help at once and without extras, devices, mistakes."""

import subprocess
import sys

import pytest
import torch

from m2f_kernels.dispatch import BACKENDS
from m2f_model import cli
from tests.model.command import m2f

COMMANDS = ("segment", "evaluate", "export", "info", "bench", "train")


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_help_imports_nothing_that_takes_time(command):
    """Neither PyTorch nor an extra: the standard library, and this package's light modules."""
    code = (
        "import sys; from m2f_model.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}", *command, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: m2f")
    imported = set(eval(done.stderr.splitlines()[-1]))
    assert "m2f_model" in imported
    assert not imported & {"torch", "numpy", "transformers", "PIL", "rich", "typer", "m2f_kernels", "scipy"}


def test_help_names_every_command_and_backend():
    code, output = m2f("--help")
    assert code == 0
    assert all(f"    {name} " in output for name in COMMANDS)
    output = " ".join(m2f("train", "--help").output.split())
    assert all(name in output.partition("--backend")[2] for name in BACKENDS)
    assert m2f().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["segment", "image.png", "--weights", "model"], "transformers, PIL, pycocotools, rich"),
        (["evaluate", "--data", "shapes", "--weights", "model"], "transformers, PIL, pycocotools, rich"),
        (["bench"], "transformers, PIL, rich"),
        (["train", "-o", "out", "--data", "shapes"], "transformers, PIL, pycocotools, tensorboard, rich"),
    ],
)
def test_missing_extras_are_one_line(arguments, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(b"")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    message = f"error: this command needs {missing}: pip install 'm2f-kernels[model]'\n"
    assert m2f(*arguments) == (2, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "error: argument COMMAND: invalid choice: 'fly'"),
        (["segment"], "error: the following arguments are required: --weights"),
        (["segment", "--weights", "w"], "error: the following arguments are required: IMAGE"),
        (["train", "--data", "shapes"], "error: the following arguments are required: -o/--out"),
        (["bench", "--rounds", "many"], "error: argument --rounds: invalid int value: 'many'"),
        (["info", "--weights", "nowhere"], "error: nowhere: no such directory"),
        (["train", "-o", "x", "--data", "shapes", "--device", "tpu"], "error: --device: expected auto, cpu, cuda"),
        (["train", "-o", "x", "--data", "instance", "--annotations", "gone.json", "--images", "."], "gone.json"),
        (["train", "-o", "x", "--data", "shapes", "--weights", "gone/away"], "error: gone/away: no such directory"),
        (["train", "-o", "x", "--data", "shapes", "--steps", "0"], "error: steps: expected at least 1; got 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    code, output = m2f(*arguments)
    assert code == 2
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def test_devices(monkeypatch):
    assert cli.resolve_device("cpu") == "cpu"
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert cli.resolve_device("auto") == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(cli.UsageError, match="--device cuda:2: 2 CUDA devices here"):
        cli.resolve_device("cuda:2")


def test_our_own_faults_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        m2f("info", "--weights", "x")
