"""Installs a wheel into an empty folder, uses it with nothing else but this Python's torch, and
sees that it brings its libraries along and needs no newer glibc than its name says:

    python scripts/check_wheel.py dist/cutloss-*.whl

Says which engines are in it, and for which GPUs: wheels with and without CUDA have the same
name."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import torch

USE = """
import cutloss, torch
e, c = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
loss = cutloss.linear_cross_entropy(e, c, torch.randint(300, (40,)))
loss.backward()
assert loss.isfinite() and e.grad.isfinite().all() and c.grad.isfinite().all()
double = [t.detach().double() for t in (e, c)]
assert cutloss.linear_cross_entropy(*double, torch.randint(300, (40,))).isfinite()
print(cutloss.__file__)
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}), sep="\\n")
"""
OF_TORCH = ("libtorch_cpu.so", "libgomp.so.1")  # loaded before
# Of the C and C++ compilers' run time, which every Linux has; and torch's, loaded before.
SYSTEM = r"/(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux-x86-64|libgomp)\.so"

# Beside a toolkit's nvcc, that of scripts/cuda_toolkit.sh among them.
TOOLKITS = (pathlib.Path(__file__).parents[1] / ".venv/cuda-toolkit", "/usr/local/cuda")
ENGINES = """
from cutloss._torch import library, needs
cuda = library.cuda_version()
print(cuda and needs.dotted(cuda), library.cuda_code(), sep=";")
"""


def run(*command, **changes):
    done = subprocess.run(command, capture_output=True, text=True, **changes)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_use(alone, python, there):
    """Uses it; returns the libraries that it brought along and that were loaded."""
    used, *mapped = run(*python, "-c", USE, **alone).split()
    assert used.startswith(str(there)), used
    ours = [path for path in mapped if path.startswith(str(there))]
    assert any("dnnl" in path for path in ours) and any("blas" in path for path in ours), ours
    runtimes = [path for path in mapped if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*$", path)]
    assert len(runtimes) == 1, f"more than one OpenMP: {runtimes}"
    return ours


def check_libraries(libraries, there, alone):
    """That each takes of this machine what every Linux has, and nothing else; returns the newest
    version of each set of symbols that they take, {"GLIBC": (2, 34)}."""
    newest = {}
    for library in libraries:
        places, _, versions = run("ldd", "-v", library, **alone).partition("Version information:")
        for line in places.splitlines():
            name, _, path = line.strip().partition(" => ")
            if path.startswith("not found"):
                assert name in OF_TORCH, f"{library.name}: {line}"
            elif path and not path.startswith(str(there)):
                assert re.search(SYSTEM, path), f"{library.name} takes {path} of this machine"
        # A paragraph for each library that is loaded: this one's is about itself.
        own = re.search(rf"^\t{re.escape(str(library))}:\n((?:\t\t.*\n)+)", versions, re.MULTILINE)
        for kind, number in re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", own[1]):
            number = tuple(map(int, number.split(".")))
            newest[kind] = max(newest.get(kind, number), number)
    return newest


def check_name(wheel, needed):
    """That pip, which goes by the name, puts it on no machine whose glibc is too old for it."""
    name = pathlib.Path(wheel).name
    promised = re.search(r"-manylinux_(\d+)_(\d+)_x86_64\.whl$", name)
    assert promised, f"{name} does not say which glibc it is for"
    assert tuple(map(int, promised.groups())) >= needed["GLIBC"], f"{name} needs glibc {needed}"


def engines_of(alone, python):
    found = run(*python, "-m", "cutloss", "doctor", "--shape", "64,32,1000", **alone)
    assert "Nothing is broken." in found, found
    named = re.findall(r"^ *engine (\S+): (?!not in this build)", found, re.MULTILINE)
    engines = list(dict.fromkeys(named))  # the plan's reasons name some again
    assert "cpu" in engines, found
    return engines


def check_gpus(library, code):
    """That it holds code for all that it was to be compiled for ("80-real 90"); in words."""
    folders = os.pathsep.join([os.environ["PATH"], *(f"{t}/bin" for t in TOOLKITS)])
    tool = shutil.which("cuobjdump", path=folders)
    if tool is None:
        return f"code for {code}, by the build's own word: there is no cuobjdump here"
    there = set(re.findall(r"\.sm_(\w+)\.cubin", run(tool, "--list-elf", library)))
    wanted = {c.removesuffix("-real") for c in code.split() if not c.endswith("-virtual")}
    assert wanted <= there, f"{library.name}: code for {there}, not for all of {wanted}"
    return f"code for sm_{', sm_'.join(sorted(there, key=lambda c: (len(c), c)))}"


def dotted(number):
    return ".".join(map(str, number))


def main(wheel):
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder, "site")
        pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
        run(*pip, "install", "--no-deps", "--no-index", "--target", there, wheel)
        torch_home = pathlib.Path(torch.__file__).parent.parent
        # -S: not this environment's packages by themselves, of which cutloss is one.
        python = (sys.executable, "-S")
        environment = {"PATH": os.defpath, "HOME": folder}
        environment["PYTHONPATH"] = f"{there}{os.pathsep}{torch_home}"
        alone = {"cwd": folder, "env": environment}

        ours = check_use(alone, python, there)
        operators = next(there.glob("cutloss/lib/*.so"))
        needed = check_libraries([operators, *there.glob("cutloss.libs/*")], there, alone)
        check_name(wheel, needed)
        engines = engines_of(alone, python)
        cuda, code = run(*python, "-c", ENGINES, **alone).strip().split(";")
        gpus = "no CUDA" if cuda == "None" else f"CUDA {cuda}, {check_gpus(operators, code)}"
    print(f"{pathlib.Path(wheel).name}: {len(ours)} libraries of its own, works without others")
    print(f"needs {', '.join(f'{kind} {dotted(n)}' for kind, n in sorted(needed.items()))}")
    print(f"engines in it: {', '.join(engines)}; {gpus}")


if __name__ == "__main__":
    main(*sys.argv[1:])
