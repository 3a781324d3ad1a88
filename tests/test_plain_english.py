"""Docstrings open with what is returned or done, and texts use the field's words."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("m2f_kernels", "m2f_model", "benchmarks", "build_backend", "csrc", "docs", "examples", "tests")
#: A docstring that opens with one of these names a question instead of the result.
QUESTIONS = {"What", "Why", "How", "Whether", "Which", "Where", "When", "Who"}
#: Files without a match need not be parsed, which takes most of the time.
QUOTED = re.compile(rf"[\"']\s*({'|'.join(QUESTIONS)})\b")
#: The CPU is a CPU. (`transformers` has image processors.)
PROCESSOR = re.compile(r"\b(the|this) processor\b|\bprocessor time\b", re.IGNORECASE)


def files(*suffixes):
    pages = [path for path in ROOT.glob("*.md") if path.suffix in suffixes]
    return pages + [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in suffixes]


def docstrings(path):
    """Yields line, name and docstring of a module and of its classes and functions, where one may be odd."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)) if QUOTED.search(source) else ():
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, getattr(node, "name", "module"), text


def test_docstrings_open_with_the_result():
    odd = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {text.splitlines()[0]}"
        for path in files(".py")
        for line, name, text in docstrings(path)
        if text.split()[0].rstrip(",:") in QUESTIONS
    ]
    assert not odd, "say what is returned or done, subject first:\n" + "\n".join(odd)


def test_the_cpu_is_called_cpu():
    odd = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".md", ".cpp", ".h", ".cu", ".cuh")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PROCESSOR.search(line)
    ]
    assert not odd, "\n".join(odd)
