"""The Python of the documentation runs, one page after the other from top to bottom."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = ["losses.md"]


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page):
    text = (DOCS / page).read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert snippets
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(DOCS / page), "exec"), names)
