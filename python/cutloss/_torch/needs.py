"""What the operators' library needs of a machine, and words for what a machine lacks.

Asked where something has failed, and by `cutloss doctor`; nothing here runs when all is well.
"""

import importlib.metadata
import platform
import re
from pathlib import Path

OLDEST_TORCH = (2, 10)
# The newest that the tests ran with (scripts/requirements.txt). Newer ones keep the stable
# interface that the library is built on, but what is private may have changed (private.py).
NEWEST_TRIED_TORCH = (2, 13)
# CUDA's major version: the oldest branch of NVIDIA's driver for Linux that runs it.
_DRIVERS = {11: 450, 12: 525, 13: 580}


def torch_release(version: str) -> tuple[int, int]:
    """Major and minor of a version like 2.13.0+cpu, 2.14.0a0+git1234567."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def torch_refusal(version: str) -> str | None:
    """Why this PyTorch cannot be used, in words."""
    if torch_release(version) >= OLDEST_TORCH:
        return None
    return (
        f"cutloss needs PyTorch {dotted(OLDEST_TORCH)} or later, this is {version}; upgrade torch "
        f"(pip install 'torch>={dotted(OLDEST_TORCH)}')"
    )


def loading_refusal(library: Path, reason: str, torch_version: str) -> str:
    """Why the dynamic loader did not take the library, and what to do, from the loader's words."""
    return f"cutloss could not load {library}: {reason}; {_remedy(library, reason, torch_version)}"


def _remedy(library: Path, reason: str, torch_version: str) -> str:
    lacks = re.search(r"version [`']((GLIBC|GLIBCXX|CXXABI|GOMP|OMP)_[\w.]+)' not found", reason)
    if lacks and lacks[2] == "GLIBC":
        built_for = wheel_platform() or "a newer system"
        return (
            f"this machine's glibc is {platform.libc_ver()[1] or 'unknown'} and has no {lacks[1]}; "
            f"this cutloss was built for {built_for}. Use a newer system or container (Debian 12, "
            f"Ubuntu 22.04, RHEL 9 or later), or build the wheel on this machine: `make wheel` in a "
            f"checkout"
        )
    if lacks:
        kind = "OpenMP" if "OMP" in lacks[2] else "C++"
        package = "libgomp" if kind == "OpenMP" else "libstdcxx"
        return (
            f"the {kind} library that this process has loaded is older than the one that cutloss "
            f"was built with and has no {lacks[1]}. In a conda environment a newer one helps "
            f"(conda install -c conda-forge {package}); on an old system, `make wheel` in a checkout"
        )
    if "undefined symbol" in reason:
        return _other_torch(torch_version)
    return f"`ldd {library}` names the library that is missing"


def missing_name(reason: str, torch_version: str) -> str:
    """Why PyTorch's Python part does not do, from the words of the error."""
    return f"cutloss could not be imported: {reason}; {_other_torch(torch_version)}"


def _other_torch(torch_version: str) -> str:
    return (
        f"this PyTorch ({torch_version}) does not have what cutloss takes of it. cutloss is for "
        f"PyTorch {dotted(OLDEST_TORCH)} and later, and was tried up to "
        f"{dotted(NEWEST_TRIED_TORCH)}: use one of these, and please report this"
    )


def wheel_platform() -> str | None:
    """The platform of the wheel that was installed, as pip calls it: manylinux_2_34_x86_64. None in
    a checkout, whose library was built on this machine."""
    try:
        text = importlib.metadata.distribution("cutloss").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    tags = re.findall(r"^Tag: \S+?-\S+?-(\S+)$", text, re.MULTILINE)
    return ", ".join(tag for tag in tags if tag != "any") or None


def untried_torch(version: str) -> str | None:
    """What is to be known of a PyTorch that is newer than the newest that was tried."""
    if torch_release(version) <= NEWEST_TRIED_TORCH:
        return None
    return (
        f"PyTorch {version} is newer than {dotted(NEWEST_TRIED_TORCH)}, the newest that cutloss "
        f"was tried with; where something fails that worked before, use that one and report it"
    )


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver that this machine runs."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Module .*?(\d+\.\d+[.\d]*)", text)
    return found and found[1]


def driver_refusal(driver: str, cuda: str) -> str | None:
    """Why NVIDIA's driver (its version, 550.54.15) does not run programs for CUDA (13.0)."""
    major = int(cuda.split(".")[0])
    oldest = _DRIVERS.get(major)
    if oldest is None or int(driver.split(".")[0]) >= oldest:
        return None
    return (
        f"CUDA {major} needs NVIDIA's driver {oldest} or newer, and {driver} is here: update the "
        f"driver, or take PyTorch and a cutloss that are built for an older CUDA (docs/install.md)"
    )
