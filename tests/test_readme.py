"""The documents tell the truth: their commands run, the output and help texts they quote are the real ones."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(document: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "update_docs.py"), *options, str(document)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "marks"), [("README.md", {"test", "output"}), ("docs/cli.md", {"help"})])
def test_a_document_is_current(name: str, marks: set[str]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert marks <= set(re.findall(r"^<!-- (\w+)", text, re.MULTILINE))
    done = check(ROOT / name, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("<!-- test -->\n```bash\nfalse\necho on\n```\n", "exit code 1", id="failing bash"),
        pytest.param("<!-- test -->\n```python\nraise SystemExit(5)\n```\n", "exit code 5", id="failing Python"),
        pytest.param(
            "<!-- test -->\n```bash\necho new\n```\n\n<!-- output -->\n```text\nold\n```\n", "is stale", id="output"
        ),
        pytest.param("<!-- help: run -->\n```text\nusage: flexbatch run\n```\n", "is stale", id="help"),
    ],
)
def test_a_stale_document_is_found(tmp_path: Path, text: str, complaint: str) -> None:
    document = tmp_path / "page.md"
    document.write_text(text, encoding="utf-8")
    done = check(document, "--check")
    assert done.returncode == 1
    assert complaint in done.stderr
    assert document.read_text(encoding="utf-8") == text


def test_renewing_a_document_makes_it_current(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    first = "# A\n\n<!-- test -->\n```bash\nls examples/*.py\n```\nprints\n\n<!-- output -->\n```text\n"
    document.write_text(f"{first}old\n```\nend\n", encoding="utf-8")
    assert check(document).returncode == 0
    assert document.read_text(encoding="utf-8") == f"{first}examples/generate.py\n```\nend\n"
    assert check(document, "--check").returncode == 0


def test_the_readme_names_every_root_folder() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    folders -= {name for name in folders if name in ignored or name.endswith(".egg-info")}
    assert folders >= {"flexbatch", "policy", "tests"}
    assert {folder for folder in folders if f"`{folder}/`" not in readme} == set()


def test_the_console_script_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (script,) = project["scripts"].items()
    entry = importlib.metadata.EntryPoint(script[0], script[1], "console_scripts")
    assert script[0] == "flexbatch"
    assert callable(entry.load())
