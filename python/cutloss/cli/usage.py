"""What users may write for every command, and the error of one who wrote something else."""

import argparse
import importlib


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text):
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def shape(text):
    """N,D,V"""
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"must be three numbers N,D,V, got {text!r}")
    return tuple(count(part.strip()) for part in parts)


def needed(*modules, install="'cutloss[demo]'"):
    """Fails before any work is done where an optional package is not installed; `install`: what pip
    is told then."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{name} is needed and cannot be imported ({error}): pip install {install}"
            ) from None


def check_device(device):
    import torch

    from cutloss._torch import library, needs

    if device == "cuda" and not torch.cuda.is_available():
        driver, cuda = needs.nvidia_driver(), torch.version.cuda
        if cuda is None:
            remedy = "install a CUDA build of PyTorch"
        else:
            refusal = driver and needs.driver_refusal(driver, cuda)
            remedy = refusal or f"`cutloss doctor` says what was found (driver: {driver or 'none'})"
        raise UserError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here; "
            f"use --device cpu, or: {remedy}"
        )
    if device == "cuda" and not library.HAS_CUDA:
        raise UserError(
            "--device cuda: this cutloss was built without CUDA; use --device cpu, or install a "
            "build with CUDA (the README says how to make one)"
        )
