"""The workflow that builds and tries wheels says what there is: scripts, settings, artifacts."""

import os
import re
import runpy
import subprocess

import pytest
from helpers.checkout import ROOT
from helpers.inside import needs

import cutloss

yaml = pytest.importorskip("yaml")

WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"
pytestmark = pytest.mark.skipif(not WORKFLOW.exists(), reason="no workflow beside the tests")

TEXT = WORKFLOW.read_text() if WORKFLOW.exists() else ""
JOBS = yaml.safe_load(TEXT)["jobs"] if TEXT else {}
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]
COMMANDS = [(name, step["run"]) for name, step in STEPS if "run" in step]
# What GitHub, pip and its own command read.
OF_OTHERS = {"PIP_EXTRA_INDEX_URL", "GH_TOKEN"}


def scripts_of(command):
    return re.findall(r"\bscripts/[\w.]+", command)


@pytest.mark.parametrize("job, command", COMMANDS)
def test_commands_are_there(job, command):
    without_expressions = re.sub(r"\$\{\{.*?\}\}", "x", command)
    parsed = subprocess.run(["bash", "-n"], input=without_expressions, text=True, check=False)
    assert parsed.returncode == 0
    for name in scripts_of(command):
        script = ROOT / name
        assert script.exists(), f"{name}, of job {job}"
        called_by_name = not re.search(rf"\bpython3? {name}", command)
        assert os.access(script, os.X_OK) or not called_by_name, f"{name} cannot be executed"
        options = re.findall(rf"{name}((?: --[\w-]+)*)", command)
        for option in " ".join(options).split():
            assert option in script.read_text(), f"{name} knows no {option}"


def test_each_job_that_builds_or_tries_calls_scripts_of_this_repository():
    called = {job: [s for j, c in COMMANDS if j == job for s in scripts_of(c)] for job in JOBS}
    assert called == {
        "build": ["scripts/setup.sh", "scripts/cuda_toolkit.sh", "scripts/wheel.sh"],
        "try": ["scripts/try_wheel.sh"],
        "release": ["scripts/changelog.py"],
    }


@pytest.mark.parametrize("job", JOBS)
def test_settings_are_read(job):
    """By a script of the job, or what it sources; or by a command of the job itself."""
    own = [s for j, c in COMMANDS if j == job for s in scripts_of(c)]
    read = "".join((ROOT / s).read_text() for s in own)
    read += "".join((ROOT / s).read_text() for s in scripts_of(read) if s.endswith(".sh"))
    read += "".join(command for j, command in COMMANDS if j == job)
    for setting in JOBS[job].get("env", {}):
        assert setting in OF_OTHERS or re.search(rf"\$\{{?{setting}\b", read), setting


def test_actions_are_pinned():
    used = re.findall(r"uses: (.*)", TEXT)
    assert len(used) == len([1 for _, step in STEPS if "uses" in step]) > 0
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def combinations(job):
    """The values of a job's matrix: the product of its lists, and what is included."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    rows = [*matrix.pop("include", [])]
    if matrix:
        base = [{}]
        for name, values in matrix.items():
            base = [{**row, name: value} for row in base for value in values]
        rows += base
    return rows


def artifacts(job, action):
    """Names of what a job puts there, or takes, with every combination of its matrix."""
    names = [s["with"]["name"] for s in job["steps"] if action in s.get("uses", "")]
    rows = combinations(job) or [{}]
    filled = lambda name, row: re.sub(  # noqa: E731
        r"\$\{\{ matrix\.(\w+) \}\}", lambda found: row[found[1]], name
    )
    return {filled(name, row) for name in names for row in rows}


def test_what_is_taken_was_built():
    built = artifacts(JOBS["build"], "upload-artifact")
    assert built == {"wheel-cpu", "wheel-cuda"}
    assert artifacts(JOBS["try"], "download-artifact") == built
    assert artifacts(JOBS["release"], "download-artifact") == {"wheel-cuda"}
    assert JOBS["try"]["needs"] == "build" and set(JOBS["release"]["needs"]) == {"build", "try"}


def test_wheels_are_tried_with_the_oldest_and_the_newest_pytorch():
    """And Python, and with both kinds."""
    rows = combinations(JOBS["try"])
    for kind in ("cpu", "cuda"):
        of_kind = [row for row in rows if row["kind"] == kind]
        releases = {needs.torch_release(row["torch"]) for row in of_kind}
        assert (min(releases), max(releases)) == (needs.OLDEST_TORCH, needs.NEWEST_TRIED_TORCH)
        assert "3.10" in {row["python"] for row in of_kind}
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert oldest == "3.10"


def test_only_the_release_may_write():
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["release"]
    assert "refs/tags/v" in JOBS["release"]["if"]


# The changelog, of which a release takes its version's section ------------------------------------

CHANGELOG = """# Changelog

## 0.3.0 (unreleased)

- Later.

## 0.2.0 (2026-12-01)

Some words:

- First.

## 0.1.0 (2026-11-21)

Older.
"""


@pytest.fixture
def script():
    return runpy.run_path(str(ROOT / "scripts" / "changelog.py"))


def test_notes_are_those_of_the_version(script):
    assert script["notes"]("0.2.0", CHANGELOG) == "Some words:\n\n- First."
    assert script["notes"]("0.1.0", CHANGELOG) == "Older."
    with pytest.raises(SystemExit, match="calls 0.3.0 unreleased: write the date"):
        script["notes"]("0.3.0", CHANGELOG)
    with pytest.raises(SystemExit, match="no section for 0.4.0, only for 0.3.0, 0.2.0, 0.1.0"):
        script["notes"]("0.4.0", CHANGELOG)


def test_the_changelog_has_a_section_for_each_version(script):
    text = script["CHANGELOG"].read_text()
    known = script["sections"](text)
    assert len(known) == text.count("\n## "), "a heading that is no version with a date"
    assert next(iter(known)) == cutloss.__version__
    numbers = [tuple(map(int, version.split("."))) for version in known]
    assert numbers == sorted(numbers, reverse=True)
    dates = [date for date, _ in known.values()]
    assert "unreleased" not in dates[1:] and dates[1:] == sorted(dates[1:], reverse=True)
