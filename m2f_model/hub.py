"""Finds a model on disk or on the hub. Imports nothing that takes time, so that a wrong path is reported at once."""

from __future__ import annotations

import re
from pathlib import Path

#: The hub's names of models: an owner and a name.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def locate(name_or_path: str | Path) -> str:
    """`name_or_path`, if it is a directory or a model on the hub; otherwise an error at once.

    Raises:
        ValueError: naming what is missing.
    """
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            unfinished = (
                " (an unfinished training run: give its checkpoint.pth, or m2f export it)"
                if (path / "checkpoint.pth").is_file()
                else ""
            )
            raise ValueError(f"{text}: expected a directory in Hugging Face's format; no config.json there{unfinished}")
        return str(path)
    if path.exists():
        raise ValueError(f"{text}: expected a directory in Hugging Face's format; got a file")
    is_name = isinstance(name_or_path, str) and _HUB_NAME.fullmatch(text) and not path.parent.is_dir()
    if not is_name or path.suffix in (".pkl", ".pth", ".safetensors", ".bin"):
        raise ValueError(f"{text}: no such directory")
    import huggingface_hub

    if not isinstance(huggingface_hub.try_to_load_from_cache(text, "config.json"), str):
        # One request in place of many, each with its retries.
        try:
            huggingface_hub.HfApi().model_info(text, timeout=10)
        except Exception as error:  # of whichever library the hub's client asks by
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(f"{text}: no such directory here, nor such a model on the hub ({reason})") from error
    return text
