"""Installs a wheel into an empty folder, uses it with nothing else but this Python's torch, and
sees that it brings its libraries along: python scripts/check_wheel.py dist/cutloss-*.whl

Says which engines are in it: wheels with and without CUDA have the same name."""

import os
import pathlib
import re
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
# Of the C and C++ compilers' run time, which every Linux has; and torch's, loaded before.
SYSTEM = r"/(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux-x86-64|libgomp)\.so"


def run(*command, **changes):
    done = subprocess.run(command, capture_output=True, text=True, **changes)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


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

        used, *mapped = run(*python, "-c", USE, **alone).split()
        assert used.startswith(str(there)), used
        ours = [path for path in mapped if path.startswith(str(there))]
        assert any("dnnl" in path for path in ours) and any("blas" in path for path in ours), ours
        runtimes = [path for path in mapped if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*$", path)]
        assert len(runtimes) == 1, f"more than one OpenMP: {runtimes}"

        for library in [*there.glob("cutloss/lib/*.so"), *there.glob("cutloss.libs/*")]:
            for line in run("ldd", library, **alone).splitlines():
                name, _, path = line.strip().partition(" => ")
                if path.startswith("not found"):
                    assert name == "libtorch_cpu.so", f"{library.name}: {line}"
                elif path and not path.startswith(str(there)):
                    assert re.search(SYSTEM, path), f"{library.name} takes {path} of this machine"

        shape = ("--shape", "64,32,1000")
        found = run(*python, "-m", "cutloss", "doctor", *shape, **alone)
        assert "Nothing is broken." in found, found
        named = re.findall(r"^ *engine (\S+): (?!not in this build)", found, re.MULTILINE)
        engines = list(dict.fromkeys(named))  # the plan's reasons name some again
        assert "cpu" in engines, found
    print(f"{pathlib.Path(wheel).name}: {len(ours)} libraries of its own, works without others")
    print(f"engines in it: {', '.join(engines)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
