#!/usr/bin/env python3
"""Writes docs/api.md, the Python reference, from the docstrings of what each module lists in
__all__; with --check says whether it is up to date."""

import argparse
import importlib
import inspect
import pathlib
import re
import sys

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "api.md"
MODULES = [
    "cutloss",
    "cutloss.losses",
    "cutloss.trl",
    "cutloss.torch_compat",
    "cutloss.compat.liger",
    "cutloss.compat.cut_cross_entropy.transformers",
    "cutloss.integrations.megatron",
]

HEAD = """# Python reference

Made from the docstrings by `scripts/api_reference.py`. The C++ interface is described in
[include/cutloss/cutloss.h](../include/cutloss/cutloss.h).
"""


def markdown(doc: str) -> str:
    """From what the docstrings are written in: reStructuredText, as far as they use it."""
    doc = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", doc)
    doc = doc.replace("``", "`")
    out, item = [], False
    lines = doc.splitlines()
    for i, line in enumerate(lines):
        field = re.match(r":(param|return|raises?)\s*([^:]*):\s*(.*)", line)
        if field:
            if out and out[-1] and not item:
                out.append("")
            kind, name, text = field.groups()
            label = {"return": "**Returns**"}.get(kind, f"`{name}`")
            out.append(f"- {label}: {text}")
            item = True
        elif item and line.startswith("    "):
            out.append("  " + line.strip())
        elif item and not line.strip() and any(l.startswith(":") for l in lines[i + 1 : i + 2]):
            continue
        else:
            item = False
            out.append(line)
    text = "\n".join(out)

    def code(match):
        block = inspect.cleandoc("\n" + match[2])
        return f"{match[1].rstrip()}\n\n```python\n{block}\n```\n"

    text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
    text = re.sub(r"([^\n]*):(?=:\n)", r"\1", text)  # "::" ends the sentence with ":"
    return re.sub(r"([^\n]*)\n\n((?:(?:    [^\n]*)?\n)*(?:    [^\n]+)(?:\n|$))", code, text).strip()


def signature(name: str, of) -> str:
    try:
        found = inspect.signature(of)
    except (TypeError, ValueError):
        return name
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    bare = found.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in parameters],
        return_annotation=inspect.Signature.empty,
    )
    text = f"{name}{bare}"
    if len(text) <= 88:
        return text
    inner = re.sub(r"^.*?\((.*)\)$", r"\1", str(bare), flags=re.DOTALL)
    depth, start, pieces = 0, 0, []
    for i, char in enumerate(inner):
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            pieces.append(inner[start:i].strip())
            start = i + 1
    pieces.append(inner[start:].strip())
    lines, line = [], "   "
    for piece in pieces:
        if len(line) + len(piece) + 2 > 88:
            lines.append(line)
            line = "   "
        line += f" {piece},"
    return f"{name}(\n" + "\n".join([*lines, line]) + "\n)"


def public_place(of: type) -> str:
    """The outermost package that has the class under its name: where its users import it from."""
    parts = of.__module__.split(".")
    places = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(
        p for p in places if getattr(importlib.import_module(p), of.__name__, None) is of
    )


def entry(name: str, of, level: str = "###") -> str:
    if not (inspect.isclass(of) or inspect.isroutine(of)):
        if not isinstance(of, (dict, tuple, frozenset, set)):
            return ""
        names = ", ".join(f'`"{key}"`' for key in of)
        return f"{level} `{name}`\n\n{names}\n"
    doc = inspect.cleandoc(of.__doc__ or "")
    if inspect.isclass(of) and any(base.__doc__ == of.__doc__ for base in of.__mro__[1:]):
        base = next(b for b in of.__mro__[1:] if b.__name__ == name)
        doc = f"``{public_place(base)}.{name}``, by its own documentation."
    parts = [f"{level} `{name}`\n\n```python\n{signature(name, of)}\n```\n", markdown(doc) + "\n"]
    if inspect.isclass(of):
        for member, value in vars(of).items():
            shown = not member.startswith("_") and inspect.isfunction(value) and value.__doc__
            if shown:
                parts.append(entry(f"{name}.{member}", value, level + "#"))
    return "\n".join(parts)


def page() -> str:
    parts = [HEAD]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n\n{markdown(inspect.cleandoc(module.__doc__))}\n")
        for name in sorted(module.__all__, key=str.lower):
            parts.append(entry(name, getattr(module, name)))
    text = "\n".join(part for part in parts if part)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print("docs/api.md is not what the docstrings say: run scripts/api_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
