"""cutloss doctor: what was found here, and what a loss of a given shape would get."""

import importlib.util
import os
import platform
import signal
import subprocess
import sys

import torch

import cutloss
from cutloss._torch import library, needs
from cutloss.cli import proc
from cutloss.cli.bench.cases import DATA, DTYPES, Case, inputs, leaves
from cutloss.cli.bench.errors import gradient_errors, reference_gradients
from cutloss.cli.bench.methods import Method, run_pass
from cutloss.cli.bench.plan import Refusal, decide
from cutloss.cli.bench.record import processor
from cutloss.cli.usage import check_device, count, shape

# Of those that make a difference to the products, as /proc/cpuinfo calls them.
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "bf16")
# What a training step of a large model asks for on a GPU.
TYPICAL = {"N": 8192, "D": 4096, "V": 128256}
# Sizes that are a multiple of nothing.
SELF_CHECK = {"N": 67, "D": 45, "V": 1021}
ODD_SIZES = (sys.executable, "-m", "cutloss.cli.bench.odd_sizes")


def add_arguments(parser):
    add = parser.add_argument
    add(
        "--shape",
        type=shape,
        default=(2048, 768, 50257),
        metavar="N,D,V",
        help="the loss to ask about (default 2048,768,50257)",
    )
    add("--dtype", choices=DTYPES, default="fp32")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default=_default_device(),
        help="where the loss would be (default: cuda where it can be used, else cpu)",
    )
    add("--frozen", action="store_true", help="the classifier gets no gradient")
    add("--schedule", choices=("auto", "rows", "vocabulary"), default="auto")
    add("--max-workspace", type=count, metavar="MIB", help="the memory that the loss may use")


def _default_device():
    return "cuda" if library.HAS_CUDA and torch.cuda.is_available() else "cpu"


def run(args):
    check_device(args.device)
    _section("versions", _versions())
    _section("processor", _processor())
    _section("CUDA", _cuda())
    _section("engines", _engines())
    _section("optional packages", _packages())
    _section("a loss", _plan(args))
    broken = []
    _section("self-check against fp64", _self_check(args.device, broken))
    _section("self-check of odd sizes on the CPU", _odd_sizes(broken))
    if broken:
        print(f"\nBroken: {'; '.join(broken)}.")
        print("Please report this with all of the above; until then, impl='torch' is plain PyTorch.")
        return 1
    print("\nNothing is broken.")
    return 0


def _section(title, lines):
    print(f"{title}:")
    for line in lines:
        print(f"  {line}")


def _versions():
    yield f"cutloss {cutloss.__version__} in {cutloss.__path__[0]}"
    cuda = library.cuda_version()
    engines = "without CUDA" if cuda is None else f"for CUDA {needs.dotted(cuda)}"
    code = f" (code for {library.cuda_code()})" if cuda else ""
    yield f"built {engines}{code}, {needs.wheel_platform() or 'not as a wheel'}"
    yield f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    if untried := needs.untried_torch(torch.__version__):
        yield untried


def _processor():
    found = _features()
    yield f"{processor()}, {torch.get_num_threads()} threads (torch.set_num_threads)"
    if found is None:
        yield "features: unknown, /proc/cpuinfo is not there"
        return
    yield f"has {', '.join(f for f in FEATURES if f in found) or 'none of ' + ', '.join(FEATURES)}"
    if "sse2" in found and "avx2" not in found:
        yield "no avx2: losses on this processor are right, but slow"
    runtimes = _openmp_runtimes()
    if len(runtimes) > 1:
        yield f"more than one OpenMP runtime is loaded, which can be slow: {', '.join(runtimes)}"
    else:
        yield f"OpenMP: {', '.join(runtimes) or 'not found among the loaded libraries'}"


def _features():
    found = proc.value("/proc/cpuinfo", "flags", "Features")
    return None if found is None else set(found.split())


def _openmp_runtimes():
    """Two of them keep two pools of threads that wait for each other's processors."""
    return proc.loaded(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*")


def _cuda():
    driver = needs.nvidia_driver()
    yield f"NVIDIA driver {driver}" if driver else "no NVIDIA driver was found"
    if torch.version.cuda is None:
        yield f"not used: this PyTorch ({torch.__version__}) is built without CUDA"
    elif not torch.cuda.is_available():
        yield f"not used: PyTorch is built for CUDA {torch.version.cuda}, but finds no device"
        if refusal := driver and needs.driver_refusal(driver, torch.version.cuda):
            yield refusal
    else:
        yield f"PyTorch is built for CUDA {torch.version.cuda}"
        yield from _mixed_cuda()
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            gib = found.total_memory / 2**30
            yield f"cuda:{i}: {found.name}, sm_{found.major}{found.minor}, {gib:.0f} GiB"
        if not library.HAS_CUDA:
            yield "not used: this cutloss was built without CUDA; the README says how to make one"
        else:
            yield from _typical()


def _mixed_cuda():
    """Where PyTorch and cutloss are for different CUDAs, each brings its own part of it."""
    ours = library.cuda_version()
    if ours is None or ours[0] == int(torch.version.cuda.split(".")[0]):
        return
    yield (
        f"this cutloss is built for CUDA {needs.dotted(ours)}: together with PyTorch for CUDA "
        f"{torch.version.cuda} it is untried; `make wheel` with that CUDA's toolkit makes one"
    )


def _typical():
    case = Case(**TYPICAL, dtype="bf16", device="cuda")
    try:
        plan = decide(case, Method("cutloss"), "fwbw")
        yield f"a loss of {case.label} takes engine {plan.engine}, schedule {plan.schedule}"
    except Refusal as error:
        yield f"not used for {case.label}: {error}".replace("\n", "\n  ")


def _engines():
    for engine in library.engines():
        yield f"engine {engine.name}: {engine.description or f'not here: {engine.absent}'}"
    if not library.HAS_CUDA:
        yield "engine cuda: not in this build of cutloss"


def _packages():
    for name, use in (("rich", "demo, bench"), ("matplotlib", "demo, bench --plot")):
        there = importlib.util.find_spec(name) is not None
        yield f"{name} ({use}): {'found' if there else 'not found; pip install cutloss[demo]'}"


def _plan(args):
    case = Case(*args.shape, args.dtype, device=args.device)
    method = Method("cutloss", args.schedule, args.max_workspace)
    pass_name = "fwbw_frozen" if args.frozen else "fwbw"
    yield f"asked: {case.label}, {method.label}{', frozen classifier' if args.frozen else ''}"
    try:
        yield from str(decide(case, method, pass_name)).splitlines()
    except Refusal as error:
        yield from f"no engine takes it: {error}".splitlines()


def _self_check(device, broken):
    """The rule of the tests: at most twice plain PyTorch's error, or a few roundings."""
    for dtype in ("fp32", "bf16"):
        for data in DATA:
            case = Case(**SELF_CHECK, dtype=dtype, data=data, device=device)
            reference = reference_gradients(case)
            rounding = torch.finfo(case.product_dtype).eps
            named = {}
            for name in ("cutloss", "plain"):
                errors = gradient_errors(Method(name), case, "fwbw", reference)
                named[name] = (_loss_error(Method(name), case), *errors)
            for part, ours, plain in zip(("loss", "dE", "dC"), named["cutloss"], named["plain"]):
                if not ours <= 2 * plain + 4 * rounding:  # NaN is not
                    broken.append(
                        f"{part} in {dtype}, {data}: error {ours:.1e}, plain PyTorch's {plain:.1e}"
                    )
            errors = ", ".join(f"{e:.1e}" for e in named["cutloss"])
            plain = ", ".join(f"{e:.1e}" for e in named["plain"])
            yield f"{dtype:5} {data:7} errors of loss, dE, dC: {errors}   (plain PyTorch: {plain})"


def _odd_sizes(broken):
    """In a process of its own: a wrong matrix library can end it."""
    done = subprocess.run(ODD_SIZES, capture_output=True, text=True, env=_of_the_child())
    wrong = done.stdout.splitlines()
    if done.returncode < 0:
        wrong.append(f"the process was ended by {signal.Signals(-done.returncode).name}")
    elif done.returncode != 0 and not wrong:
        wrong.append(f"the check failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    broken.extend(wrong)
    yield from wrong or ["products and gradients of 6 sizes, 3 dtypes, 4 plans: right"]


def _of_the_child():
    """This process's environment, with the package that it has imported. Small products on many
    threads: passive waiting."""
    place = os.path.dirname(cutloss.__path__[0])
    old = os.environ.get("PYTHONPATH")
    path = place if not old else f"{place}{os.pathsep}{old}"
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}


def _loss_error(method, case):
    e, c, targets = inputs(case)
    exact = torch.nn.functional.cross_entropy(e.double() @ c.double().t(), targets)
    loss = run_pass(method, case, "fw", *leaves((e, c, targets), "fw"))
    return ((loss.double() - exact).abs() / exact.abs().clamp(min=1.0)).item()
