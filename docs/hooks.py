"""Hooks of MkDocs: pages that lie outside docs/, integrations as they come, formulas without a script."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
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
    """The committed benchmark reports with their pictures, and the root's pages."""
    results = ROOT / "benchmarks" / "results"
    outside = [ROOT / name for name in PAGES] + [
        *results.rglob("*.md"),
        *results.rglob("*.png"),
        *results.rglob("*.csv"),
        *results.rglob("*.txt"),
    ]
    for path in outside:
        name = path.relative_to(ROOT).as_posix()
        file = File.generated(config, name, abs_src_path=str(path))
        if name.startswith("benchmarks/"):
            file.inclusion = type(file.inclusion).NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ stay inside the site; links from the root's pages into docs/ too."""
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(
        r"\]\((?:\.\./)+(benchmarks/|CONTRIBUTING\.md|CHANGELOG\.md)", lambda m: f"]({_up(page)}{m[1]}", markdown
    )


def _up(page: Any) -> str:
    return "../" * page.file.src_uri.count("/")


def on_page_content(page_html: str, **_: Any) -> str:
    """TeX becomes MathML, which browsers draw by themselves."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "[" else "inline")

    return re.sub(
        r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', formula, page_html, flags=re.DOTALL
    )
