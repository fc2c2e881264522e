"""What the README and the guides show exists: every code block parses, and every name it imports is there."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from tests.test_architecture import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks():
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text())):
            if "--8<--" not in block:
                yield pytest.param(block, id=f"{page.stem}-{number}")


@pytest.mark.parametrize("block", list(_blocks()))
def test_a_code_block_parses_and_imports_names_that_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_every_package_has_a_reference_page_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in ROOMS:
        assert f"::: {name}" in (ROOT / "docs" / "reference" / f"{name}.md").read_text()
        assert f"reference/{name}.md" in navigation


def test_every_local_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_every_command_of_the_readme_is_a_target_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for code in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", (ROOT / "README.md").read_text(), re.DOTALL)
        for name in re.findall(r"\bmake ([a-z-]+)", "".join(code))
    }
    assert {"demo", "test"} <= named <= targets


def test_docstrings_become_markdown():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    text = "Uses :func:`a.b`.\nk: how many.\nmore\n>>> f(\n...     1)\n2\nRaises: ValueError"
    expected = "Uses `a.b`.\n\nk: how many.\nmore\n\n```pycon\n>>> f(\n...     1)\n2\n```\n\nRaises: ValueError"
    assert docstrings.as_markdown(text) == expected
