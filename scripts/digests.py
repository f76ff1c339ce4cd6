"""Whether a change keeps the bits: digests of what some hundred losses give, here and at a tag.

    .venv/bin/python scripts/digests.py --against v0.1        # builds the tag in build/digests/v0.1
    python scripts/digests.py --old DIRECTORY                 # a package that is built: DIRECTORY/cutloss
    python scripts/digests.py                                 # prints the digests of this checkout

Both packages run on the same machine, each in a process of its own, with the same numbers of threads,
on the CPU and, where PyTorch finds one, on the first GPU. A case whose outputs or gradients differ, or
that one of them refuses and the other does not, is printed; the exit status is 1 then. Digests of
another kind of processor differ."""

import argparse
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = 400  # of each device
SIZES = (  # sequences, length, D, V
    (1, 1, 8, 3),
    (1, 63, 33, 511),
    (2, 37, 24, 301),
    (3, 65, 64, 1024),
    (1, 257, 48, 2047),
    (4, 129, 128, 4099),
    (1, 1030, 64, 6151),
)
CUDA_SIZES = ((1, 2048, 512, 16384), (2, 1501, 256, 8191))
DTYPES = ("float32", "bfloat16", "float16", "float64", "autocast")
KINDS = ("linear", "linear", "linear", "linear", "logits", "token", "log_probs", "policy", "teacher")


def drawn(device):
    """The cases: plain facts, the same in both packages."""
    draw = random.Random(20261129)
    sizes = SIZES + (CUDA_SIZES if device == "cuda" else ())
    for index in range(CASES):
        options = {}
        if draw.random() < 0.3:
            options["softcap"] = draw.choice((5.0, 30.0))
        if draw.random() < 0.3:
            options["logit_scale"] = draw.choice((0.5, -2.0))
        if draw.random() < 0.3:
            options["temperature"] = draw.choice((0.7, "rows"))
        if draw.random() < 0.3:
            options["label_smoothing"] = 0.1
        if draw.random() < 0.2:
            options["z_loss"] = 1e-3
        yield {
            "index": index,
            "kind": draw.choice(KINDS),
            "size": draw.choice(sizes),
            "dtype": draw.choice(DTYPES),
            "options": options,
            "bias": draw.random() < 0.3,
            "weight": draw.random() < 0.2,
            "token_weight": draw.random() < 0.2,
            "shift": draw.choice((0, 0, 1)),
            "ignored": draw.choice((0.0, 0.2, 0.2, 1.0)),
            "reduction": draw.choice(("mean", "mean", "sum", "none")),
            "schedule": draw.choice(("auto", "rows", "vocabulary")),
            # Of linear losses.
            "workspace": draw.choice((None, None, "smallest", "twice the smallest")),
            "returns": draw.choice(((), (), ("return_lse",), ("return_entropy", "return_predictions"))),
            "frozen": draw.choice(((), (), (), ("e",), ("c",))),
            "gaps": draw.random() < 0.2,
            "peaked": draw.random() < 0.3,
        }


def run(case, device):
    """A digest for each output and gradient of a case, by name; or the name of its refusal."""
    import torch

    import cutloss
    from cutloss import losses

    random_numbers = torch.Generator().manual_seed(case["index"])
    sequences, length, D, V = case["size"]
    autocast = case["dtype"] == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, case["dtype"])
    stat = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        wide = (*shape[:-1], shape[-1] + 16) if case["gaps"] else shape
        values = torch.randn(wide, generator=random_numbers, dtype=torch.float64).to(dtype)
        return values.to(device)[..., : shape[-1]]

    e = normal(sequences, length, D, dtype=torch.bfloat16 if autocast else dtype)
    c = normal(V, D) / D**0.5
    targets = torch.randint(V, (sequences, length), generator=random_numbers).to(device)
    if case["peaked"]:
        e = e + (6 * c[targets]).to(e.dtype)
    out = torch.rand(sequences, length, generator=random_numbers).to(device) < case["ignored"]
    targets = torch.where(out, -100, targets)
    options = dict(case["options"], shift=case["shift"])
    if options.get("temperature") == "rows":
        rows = (sequences, length)
        options["temperature"] = 0.5 + torch.rand(rows, generator=random_numbers).to(device, stat)
    weight = torch.rand(V, generator=random_numbers).to(device, stat) if case["weight"] else None
    token_weight = torch.rand(sequences, length, generator=random_numbers).to(device, stat)
    leaves = {"e": e, "c": c}
    if case["bias"]:
        leaves["bias"] = normal(V)
    leaves = {
        name: t.detach().requires_grad_(name not in case["frozen"]) for name, t in leaves.items()
    }

    def of_logits():
        z = torch.nn.functional.linear(*(leaves[k].float() for k in ("e", "c"))).to(dtype)
        z = z.detach().requires_grad_()
        leaves.clear()
        leaves["logits"] = z
        named = {name: True for name in case["returns"]}
        return cutloss.cross_entropy(
            z, targets, weight=weight, reduction=case["reduction"], **options, **named
        )

    def of_linear(max_workspace):
        named = {name: True for name in case["returns"]}
        if case["token_weight"]:
            named["token_weight"] = token_weight
        return cutloss.linear_cross_entropy(
            leaves["e"], leaves["c"], targets, leaves.get("bias"), reduction=case["reduction"],
            weight=weight, schedule=case["schedule"], max_workspace=max_workspace,
            **options, **named,
        )  # fmt: skip

    def of_rows():
        kept = {k: v for k, v in options.items() if k in ("softcap", "logit_scale", "temperature", "shift")}
        arguments = leaves["e"], leaves["c"], targets, leaves.get("bias")
        if case["kind"] == "token":
            return losses.linear_token_loss(
                *arguments[:3], lambda nll: nll * torch.exp(-nll).detach(), bias=arguments[3], **kept
            )
        if case["kind"] == "teacher":
            kept = {k: v for k, v in kept.items() if k in ("softcap", "shift")}
            teacher = normal(sequences, length, D), normal(V, D) / D**0.5
            arguments = leaves["e"].to(dtype), leaves["c"], *teacher, targets
            return losses.linear_distillation(*arguments, **kept)
        found = losses.token_log_probs(*arguments[:3], bias=arguments[3], **kept)
        if case["kind"] == "log_probs":
            return found.log_probs
        advantages = torch.linspace(-1, 1, sequences, device=device)
        return losses.linear_loss("policy", *arguments, advantages=advantages, **kept)

    def once(max_workspace=None):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if case["kind"] == "linear":
                return of_linear(max_workspace)
            return of_logits() if case["kind"] == "logits" else of_rows()

    try:
        outputs = once(workspace_of(case, once))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o if isinstance(o, torch.Tensor) else o.loss for o in outputs]
        differentiable = [o for o in outputs if o.requires_grad]
        if differentiable:
            upstream = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=device).view_as(o) for o in differentiable]
            torch.autograd.backward(differentiable, upstream)
    except (ValueError, TypeError, NotImplementedError) as error:
        return {"refused": type(error).__name__}
    named = {f"output {i}": o for i, o in enumerate(outputs)}
    named.update({f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None})
    return {name: digest(t) for name, t in named.items()}


def workspace_of(case, once):
    """Bytes; the least is read from the error that says it."""
    if case["workspace"] is None or case["kind"] != "linear":
        return None
    import re

    try:
        once(0)
    except ValueError as error:
        least = re.search(r"smallest plan needs (\d+) bytes", str(error))
        if least is None:
            raise
        return int(least[1]) * (2 if case["workspace"].startswith("twice") else 1)
    return None


def digest(t):
    import torch

    data = t.detach().cpu().contiguous().view(-1)
    data = data.view(torch.uint8) if data.numel() else data
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def run_all(devices):
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for device in devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        for case in drawn(device):
            print(json.dumps({"device": device, **case, "digests": run(case, device)}), flush=True)


def of_package(package, devices):
    """The lines of a package, by device and index."""
    environment = dict(os.environ, OMP_WAIT_POLICY="passive", PYTHONSAFEPATH="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(package), os.environ.get("PYTHONPATH")))
    )
    done = subprocess.run(
        [sys.executable, __file__, "--here", str(package), "--devices", *devices],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return {(line["device"], line["index"]): line for line in map(json.loads, done.stdout.splitlines())}


def build(tag):
    """A worktree of the tag with its operators built as this checkout's are: its Python folder."""
    place = ROOT / "build" / "digests" / tag.replace("/", "-")
    if not place.exists():
        place.mkdir(parents=True)
        files = subprocess.run(["git", "-C", ROOT, "archive", tag], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", place], input=files.stdout, check=True)
        (place / ".venv").symlink_to(ROOT / ".venv")
    settings = [
        line.split(":")[0] + "=" + line.split("=", 1)[1]
        for line in (ROOT / "build/release/CMakeCache.txt").read_text().splitlines()
        if line.startswith(("CUTLOSS_CUDA", "CMAKE_CUDA_COMPILER:", "CUBLASLT_INC", "CUTLASS_INC", "dnnl_DIR"))
    ]
    flags = [f"-D{setting}" for setting in settings] + ["-DCUTLOSS_TESTS=OFF"]
    subprocess.run(["cmake", "--preset", "release", *flags], cwd=place, check=True, stdout=2)
    subprocess.run(["cmake", "--build", "build/release", "--target", "cutloss_torch"], cwd=place, check=True, stdout=2)
    return place / "python"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", metavar="TAG")
    parser.add_argument("--old", type=pathlib.Path, metavar="DIRECTORY")
    parser.add_argument("--new", type=pathlib.Path, metavar="DIRECTORY", default=ROOT / "python")
    parser.add_argument("--devices", nargs="*", default=())
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
        import cutloss

        assert cutloss.__path__[0].startswith(asked.here), (cutloss.__path__, asked.here)
        run_all(asked.devices)
        return 0
    old = build(asked.against) if asked.against else asked.old
    new = of_package(asked.new.resolve(), asked.devices)
    if old is None:
        for line in new.values():
            print(json.dumps(line))
        return 0
    before = of_package(old.resolve(), asked.devices)
    different = 0
    for key, line in new.items():
        names = sorted({*line["digests"], *before[key]["digests"]})
        wrong = [n for n in names if line["digests"].get(n) != before[key]["digests"].get(n)]
        if wrong:
            different += 1
            told = {k: v for k, v in line.items() if k != "digests"}
            print(f"{', '.join(wrong)} of {json.dumps(told)}")
            if "refused" in wrong:
                print(f"    before {before[key]['digests']}, now {line['digests']}")
    refused = sum("refused" in line["digests"] for line in new.values())
    print(f"{len(new)} cases, {refused} of them refused; {different} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
