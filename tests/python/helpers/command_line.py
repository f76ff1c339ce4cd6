"""Running the command line inside the test."""

import dataclasses
import sys
import types

from cutloss import cli


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


def run_cli(capsys, *argv):
    capsys.readouterr()
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def assert_refused(outcome, *parts):
    """Exit code 2 and one line on stderr that names every part."""
    assert outcome.code == 2
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    for part in parts:
        assert part in lines[0]


def fake_module(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            fake_module(monkeypatch, parent)
        setattr(sys.modules[parent], last, module)
