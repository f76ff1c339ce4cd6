"""Prints what CHANGELOG.md says of a version, for its release: python scripts/changelog.py 0.2.0

Fails where the version has no section, or one that is still called unreleased."""

import pathlib
import re
import sys

CHANGELOG = pathlib.Path(__file__).resolve().parents[1] / "CHANGELOG.md"
# ## 0.2.0 (2026-12-01), or (unreleased)
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d|unreleased)\)$", re.MULTILINE)


def sections(text):
    """{version: (its date or "unreleased", what is said of it)}, the newest first."""
    found = list(HEADING.finditer(text))
    ends = [m.start() for m in found[1:]] + [len(text)]
    return {m[1]: (m[2], text[m.end() : end].strip()) for m, end in zip(found, ends)}


def notes(version, text):
    known = sections(text)
    if version not in known:
        sys.exit(f"CHANGELOG.md has no section for {version}, only for {', '.join(known)}")
    date, said = known[version]
    if date == "unreleased":
        sys.exit(f"CHANGELOG.md calls {version} unreleased: write the date of its release there")
    return said


if __name__ == "__main__":
    print(notes(sys.argv[1], CHANGELOG.read_text()))
