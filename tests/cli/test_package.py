"""The package's public names, imported when they are first used."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import flexbatch


def test_the_public_names() -> None:
    assert set(flexbatch.__all__) == {"LLM", "Result", "SamplingParams", "__version__"}
    for name in flexbatch.__all__:
        assert getattr(flexbatch, name) is not None
        assert name in dir(flexbatch)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        flexbatch.Nothing  # noqa: B018


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert flexbatch.__version__ == project["version"]
