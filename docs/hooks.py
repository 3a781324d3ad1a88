"""Hooks of MkDocs: pages that lie outside docs/, integrations as they come, formulas without a script."""

from __future__ import annotations

import html
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))  # for this package and the benchmarks, which need not be installed

import m2f_kernels
from benchmarks import readme, report

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/"
#: Pages and pictures of the committed results.
MADE = tempfile.TemporaryDirectory(prefix="m2f-results-")
#: Pages of the repository's root that are pages of the site.
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
TITLES = {
    "transformers": "Hugging Face",
    "functions": "Functions",
    "mask2former": "Mask2Former",
    "hub_kernels": "Kernels on the Hub",
    "onnx": "ONNX",
}


def on_config(config: Any) -> Any:
    """Whatever lies in docs/integrations is a page under "Integrations"."""
    found = {p.stem: p for p in sorted((ROOT / "docs" / "integrations").glob("*.md"))}
    if found:
        names = sorted(found, key=lambda name: name != "transformers")  # what most people come for is first
        pages = [{TITLES.get(name, name): f"integrations/{found[name].name}"} for name in names]
        at = next(i for i, entry in enumerate(config.nav) if "The model" in entry)
        config.nav.insert(at + 1, {"Integrations": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The root's pages, and pages and pictures of the committed results, which are made here."""
    made = Path(MADE.name)
    report.committed(made)
    found = {name: ROOT / name for name in PAGES}
    found |= {f"{RESULTS}{path.relative_to(made).as_posix()}": path for path in made.rglob("*.*")}
    found |= {f"{RESULTS}{path.name}": path for path in report.RESULTS.glob("*.csv")}
    for name, path in found.items():
        file = File.generated(config, name, abs_src_path=str(path))
        if name.startswith(RESULTS):
            file.inclusion = type(file.inclusion).NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts tables and operators in. Links out of docs/ stay inside the site, those of the root's pages into docs/ too.

    A link to a device's results, such as `../benchmarks/results/DEVICE.csv#point_loss`, leads to the page made of them.
    """
    if page.file.src_uri in PAGES:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    elif not page.file.src_uri.startswith(RESULTS):
        markdown = readme.fill(markdown, "../").replace("<!-- operators -->", operators())
    markdown = re.sub(rf"({RESULTS}[\w-]+)\.csv(?:#([\w/]+):?([\w-]*))?\)", _page_of_results, markdown)
    return re.sub(
        r"\]\((?:\.\./)+(benchmarks/|CONTRIBUTING\.md|CHANGELOG\.md)", lambda m: f"]({_up(page)}{m[1]}", markdown
    )


def operators() -> str:
    """The directives for the docstrings of all public functions of `m2f_kernels.ops`."""
    public = {name: getattr(m2f_kernels, name) for name in m2f_kernels.__all__}
    found = (name for name, x in public.items() if getattr(x, "__module__", "").startswith("m2f_kernels.ops."))
    return "\n".join(f"::: m2f_kernels.{name}" for name in found)


def _page_of_results(link: re.Match[str]) -> str:
    page = "" if link[1].endswith("_resources") else f"/{link[2] or 'report'}"
    return f"{link[1]}{page}.md{f'#{link[3]}' if link[3] else ''})"


def _up(page: Any) -> str:
    return "../" * page.file.src_uri.count("/")


def on_page_content(page_html: str, **_: Any) -> str:
    """TeX becomes MathML, which browsers draw by themselves."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "[" else "inline")

    return re.sub(
        r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', formula, page_html, flags=re.DOTALL
    )
