"""What the documentation says to write runs, and its tables leave out no option of the others."""

import inspect
import pathlib
import re
import runpy

import pytest
import torch
from torch import nn

from cutloss import torch_compat
from cutloss.compat.liger import LigerFusedLinearCrossEntropyLoss as OfLiger
from cutloss.compat.liger import LigerFusedLinearJSD as JSD
from cutloss.compat.liger import LigerFusedLinearJSDLoss as JSDLoss

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMING_FROM = ROOT / "docs" / "coming-from.md"
README = ROOT / "README.md"
CPP = ROOT / "docs" / "cpp.md"

pytestmark = pytest.mark.skipif(not COMING_FROM.exists(), reason="no docs beside the tests")


def snippets(path, language="python"):
    if not path.exists():
        return []
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(f"{path.name}:{text[: m.start()].count(chr(10)) + 2}", m.group(1)) for m in found]


SNIPPETS = snippets(COMING_FROM) + snippets(README)


def namespace():
    torch.manual_seed(0)
    labels = torch.randint(0, 101, (2, 9))
    labels[0, 6:] = -100
    return {
        "hidden": torch.randn(2, 9, 16, requires_grad=True),
        "labels": labels,
        "lm_head": nn.Linear(16, 101),
        "embedding": nn.Embedding(101, 16),
    }


def run(where, code, names):
    exec(compile(code, where, "exec"), names)
    return names


@pytest.mark.parametrize("where, code", SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_snippets_run(where, code):
    names = run(where, code, namespace())
    for name in ("loss", "expected", "same"):
        assert name not in names or names[name].isfinite()


def test_snippets_agree():
    """What stands beside each other as the same is the same."""
    ours, plain, *_ = snippets(COMING_FROM)
    got, want = (run(*s, namespace()) for s in (ours, plain))
    torch.testing.assert_close(got["loss"], want["expected"])
    of_liger = [s for s in snippets(COMING_FROM) if "Liger" in s[1] or "same = " in s[1]]
    theirs, own, jsd = (run(*s, namespace()) for s in of_liger)
    torch.testing.assert_close(theirs["loss"], own["same"])
    torch.testing.assert_close(jsd["loss"], jsd["theirs"])


def section(title):
    of_title = rf"^## {title}\n(.*?)(?=^## |\Z)"
    return re.search(of_title, COMING_FROM.read_text(), re.DOTALL | re.MULTILINE)[1]


OF_CUT_CROSS_ENTROPY = """e c targets bias ignore_index softcap reduction shift return_lse filter_eps
accum_e_fp32 accum_c_fp32 filter_e_grad filter_c_grad impl vocab_parallel_options""".split()


def parameters(*functions):
    names = [name for f in functions for name in inspect.signature(f).parameters]
    return [n for n in names if n != "self"]


OF_TORCHS_OPTIONS = """batch_chunk_size chunking_method acc_policy allow_retain_graph
acc_dtype""".split()

OF_TRLS_JSD = """student_logits teacher_logits labels beta temperature reduction
num_items_in_batch""".split()


@pytest.mark.parametrize(
    "title, names",
    [
        ("cut-cross-entropy", OF_CUT_CROSS_ENTROPY),
        ("Liger", [*parameters(OfLiger, OfLiger.forward), "chunk_mem_const"]),
        (
            "Distillation: TRL, Liger",
            parameters(JSD, JSD.forward, JSDLoss, JSDLoss.forward) + OF_TRLS_JSD,
        ),
        (
            "torch's F.linear_cross_entropy",
            parameters(torch_compat.linear_cross_entropy) + OF_TORCHS_OPTIONS,
        ),
    ],
    ids=["cut_cross_entropy", "liger", "distillation", "torch"],
)
def test_every_option_of_theirs_has_a_row(title, names):
    rows = "".join(line for line in section(title).splitlines() if line.startswith("|"))
    assert not [name for name in names if not re.search(rf"`{name}\b", rows)]


PAGES = [p.name for p in sorted(COMING_FROM.parent.glob("*.md")) if snippets(p)]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("api.md", COMING_FROM.name)])
def test_a_page_runs_from_top_to_bottom(page, monkeypatch):
    """Its snippets make all that they use; those of training stacks and shards in one process, which
    torchrun might have started."""
    if page in ("training-stacks.md", "sharded.md"):
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    found = snippets(ROOT / "docs" / page)
    assert found
    names = {}
    for where, code in found:
        run(where, code, names)
        if "expected" in names:
            torch.testing.assert_close(names["loss"], names.pop("expected"))


def lines_of(code):
    return [line.strip() for line in code.splitlines() if line.strip()]


CPP_SNIPPETS = snippets(CPP, "cpp") + snippets(CPP, "cmake")


@pytest.mark.parametrize("where, code", CPP_SNIPPETS, ids=[where for where, _ in CPP_SNIPPETS])
def test_cpp_snippets_are_lines_of_the_examples(where, code):
    """Which are built and run by ctest (tests/CMakeLists.txt)."""
    wanted = lines_of(code)
    sources = [path for folder in ("cpp_cpu", "cpp_cuda", "cpp_libtorch", "cpp_nccl")
               for path in (ROOT / "examples" / folder).iterdir()]  # fmt: skip
    for source in sources:
        lines = lines_of(source.read_text())
        if any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))):
            return
    pytest.fail("no example has these lines, one after the other:\n" + code)


def test_the_reference_is_what_the_docstrings_say():
    script = runpy.run_path(str(ROOT / "scripts" / "api_reference.py"))
    assert script["PAGE"].read_text() == script["page"](), "run scripts/api_reference.py"
