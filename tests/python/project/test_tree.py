"""The tests' own tree: each file in a folder that CONTRIBUTING.md has, under a name of its own, with
imports that lead to cutloss and the helpers; and the test files that are named somewhere are there."""

import ast
import collections
import pathlib
import re

import pytest
from helpers.checkout import ROOT

TESTS = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [path for path in FILES if path.name.startswith("test_")]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
needs_checkout = pytest.mark.skipif(
    not CONTRIBUTING.exists(), reason="no checkout around the tests"
)


def in_tests(path):
    return str(path.relative_to(TESTS))


@needs_checkout
def test_each_file_is_in_a_folder_that_is_written_down():
    folders = set(re.findall(r"^\| `(\w+)/` \|", CONTRIBUTING.read_text(encoding="utf-8"), re.M))
    assert {path.parent.name for path in FILES} - {TESTS.name} == folders
    assert [path.name for path in FILES if path.parent == TESTS] == ["conftest.py"]
    assert all(path.parent.parent == TESTS for path in TEST_FILES)
    assert [in_tests(path) for path in TEST_FILES if path.parent.name == "helpers"] == []


def test_each_test_file_has_a_name_of_its_own():
    count = collections.Counter(path.name for path in TEST_FILES)
    assert [name for name, times in count.items() if times > 1] == []


def imported(tree):
    """Full names of the modules, or of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name):
    package, *parts = name.split(".")
    return package == "cutloss" and any(re.match("_[^_]", part) for part in parts)


def wrong_imports(path, text):
    for name in imported(ast.parse(text)):
        if any(part.startswith("test_") for part in name.split(".")):
            yield name
        elif is_private(name) and not re.match(r"helpers/inside\w*\.py", in_tests(path)):
            yield name


def test_what_files_import():
    found = {in_tests(p): list(wrong_imports(p, p.read_text(encoding="utf-8"))) for p in FILES}
    assert {file: names for file, names in found.items() if names} == {}
    assert len(found) > 80


def test_a_wrong_import_is_seen():
    wrong = ["from test_losses import check", "import helpers.test_x", "import cutloss._core.plan"]
    wrong += ["def f():\n    from cutloss.losses import DPO, _chunks", "from cutloss import _cli"]
    for text in wrong:
        assert len(list(wrong_imports(TESTS / "loss" / "test_x.py", text))) == 1, text
    right = "import cutloss.losses\nfrom cutloss import __version__\nfrom helpers import inside"
    assert list(wrong_imports(TESTS / "loss" / "test_x.py", right)) == []
    assert list(wrong_imports(TESTS / "helpers" / "inside.py", "from cutloss import _cli")) == []


def lost_names(text):
    """Paths below tests/python, and names of test files, that lead nowhere."""
    for name in re.findall(r"tests/python/([\w/*]*\*?\.py|\w+/)", text):
        if not list(TESTS.glob(name)):
            yield name
    known = {path.name for path in TEST_FILES}
    for name in re.findall(r"(?<![\w/*])test_\w+\.py", text):
        if name not in known:
            yield name


# All but the changelog, which says what was.
PAGES = ("*.md", "docs/**/*.md", "scripts/*", ".github/**/*.yml", ".ci/*", "python/**/*.py")
READ = [
    path
    for pattern in PAGES
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
    and path.name != "CHANGELOG.md"
    and path.suffix in ("", ".md", ".sh", ".py", ".yml")
]


@needs_checkout
def test_test_files_that_are_named_are_there():
    found = {
        str(path.relative_to(ROOT)): list(lost_names(path.read_text(encoding="utf-8")))
        for path in READ
    }
    assert {page: names for page, names in found.items() if names} == {}
    assert len(found) > 100


def test_a_lost_name_is_seen():
    right = ["tests/python/loss/test_heads.py", "tests/python/sharded/test_sharded*.py"]
    right += ["`test_heads.py`", "tests/python/helpers/"]
    for text in right:
        assert list(lost_names(text)) == []
    wrong = ["tests/python/test_heads.py", "tests/python/loss/test_no*here.py", "tests/python/los/"]
    wrong += ["`test_nowhere.py`"]
    for text in wrong:
        assert len(list(lost_names(text))) == 1, text
