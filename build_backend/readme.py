"""README for PyPI, with absolute links to the repository's files."""

from __future__ import annotations

import re


def absolute(text: str, repository: str, version: str) -> str:
    """`text` with its relative links made absolute: to the release's tag, or to main for a version in development.

    Args:
        repository: address of the repository on GitHub.
    """
    ref = "main" if ".dev" in version else f"v{version}"
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)([^)]+\))", rf"\1{raw}/{ref}/\2", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#|mailto:)([^)]+\))", rf"\1{repository}/blob/{ref}/\2", text)
