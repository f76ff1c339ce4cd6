"""Links lead somewhere, the README is short, its measured figures are those of the results."""

import re
import runpy

import pytest
from helpers.checkout import ROOT

README = ROOT / "README.md"
SCRIPT = ROOT / "scripts" / "time_memory.py"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no docs beside the tests")

PAGES = sorted(
    page
    for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "decisions", ROOT / "benchmarks")
    for page in folder.glob("*.md")
)


def prose(page):
    """A page without its code, in which brackets are no links."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page):
    """What GitHub makes of the headings of a page; a second one of a name ends in -1."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = re.compile(rf"{re.escape(name)}(-\d+)?")
        times = sum(same.fullmatch(other) is not None for other in found)
        found.append(f"{name}-{times}" if times else name)
    return found


def broken_links(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    links = "[a](page.md#one-two) [b](#three) [c](gone.md) [d](https://example.org)"
    page.write_text(f"# One, `two`\n{links}\n")
    assert list(broken_links(page)) == ["#three", "gone.md"]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


needs_results = pytest.mark.skipif(
    not (SCRIPT.exists() and (ROOT / "benchmarks" / "results").exists()),
    reason="no results beside the tests",
)


@needs_results
def test_the_figures_beside_the_picture_are_those_of_the_results():
    script = runpy.run_path(str(SCRIPT))
    for page, link in script["PAGES"].items():
        assert page.read_text(encoding="utf-8") == script["rewritten"](page, link), f"run {SCRIPT}"


@needs_results
def test_the_picture_was_drawn_from_these_results():
    script = runpy.run_path(str(SCRIPT))
    assert script["fingerprint"]().encode() in script["PICTURE"].read_bytes(), f"run {SCRIPT}"
