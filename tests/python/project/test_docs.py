"""What the documentation says to write runs, and its tables leave out no option of the others."""

import importlib.util
import inspect
import re
import runpy
import sys
import types
from abc import ABC, abstractmethod

import pytest
import torch
import torch.nn.functional as F
from helpers import architectures
from helpers.checkout import ROOT
from torch import nn

from cutloss import torch_compat
from cutloss.compat import liger
from cutloss.compat.cut_cross_entropy import cce_patch
from cutloss.compat.liger import LigerFusedLinearCrossEntropyLoss as OfLiger
from cutloss.compat.liger import LigerFusedLinearJSD as JSD
from cutloss.compat.liger import LigerFusedLinearJSDLoss as JSDLoss

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


class StandInSFTLoss(ABC):
    """The interface of torchtune 0.7's losses."""

    @abstractmethod
    def set_model_output(self, model): ...

    @abstractmethod
    def forward(self, outputs, targets): ...


class StandInBasePlugin:
    """That of Axolotl 0.18's plugins, whose hooks do nothing."""

    def post_model_load(self, cfg, model): ...


STAND_INS = {
    "torchtune.modules.loss": {"SFTLoss": StandInSFTLoss},
    "axolotl.integrations.base": {"BasePlugin": StandInBasePlugin},
}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """For packages that are not installed: what the pages import of them."""
    for name, held in STAND_INS.items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            continue
        module = types.ModuleType(name)
        vars(module).update(held)
        parents = name.split(".")[:-1]
        for end in range(1, len(parents) + 1):
            above = ".".join(parents[:end])
            monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("where, code", SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_snippets_run(where, code):
    """Those of the README by themselves: whoever copies one has nothing else."""
    names = run(where, code, {} if where.startswith(README.name) else namespace())
    for name in ("loss", "expected", "same"):
        assert name not in names or names[name].isfinite()


def test_snippets_agree():
    """What stands beside each other as the same is the same."""
    ours, plain, *_ = snippets(COMING_FROM)
    got, want = (run(*s, namespace()) for s in (ours, plain))
    torch.testing.assert_close(got["loss"], want["expected"])
    of_liger = [s for s in snippets(COMING_FROM) if "Liger" in s[1] or "same = " in s[1]]
    theirs, own, logits, dpo, jsd = (run(*s, namespace()) for s in of_liger)
    torch.testing.assert_close(theirs["loss"], own["same"])
    torch.testing.assert_close(logits["loss"], logits["same"])
    torch.testing.assert_close(dpo["loss"], dpo["expected"])
    torch.testing.assert_close(dpo["chosen_rewards"].shape, dpo["rejected_rewards"].shape)
    torch.testing.assert_close(jsd["loss"], jsd["theirs"])


def snippet_with(text, language="python"):
    (found,) = [s for s in snippets(COMING_FROM, language) if text in s[1]]
    return found


class Decoder(nn.Module):
    """What torchtune's TransformerDecoder does with its last layer; tied, that is no module."""

    def __init__(self, tied):
        super().__init__()
        self.tok_embeddings = nn.Embedding(101, 16)
        self.skip_output_layer = False
        self.output = nn.Linear(16, 101, bias=False)
        if tied:
            del self.output
            self.output = types.SimpleNamespace(tied_module=self.tok_embeddings)

    def forward(self, tokens):
        assert self.skip_output_layer
        return torch.tanh(self.tok_embeddings(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_for_torchtune(tied):
    loss = run(*snippet_with("SFTLoss"), namespace())["CutLoss"]()
    model, labels = Decoder(tied), namespace()["labels"]
    loss.set_model_output(model)
    hidden = model(labels.clamp(min=0))
    weight = model.tok_embeddings.weight if tied else model.output.weight
    want = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    got = loss(hidden, labels)
    torch.testing.assert_close(got, want)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(t, parameters, retain_graph=True) for t in (got, want))):
        torch.testing.assert_close(a, b)
    assert loss(hidden, torch.full_like(labels, -100)) == 0
    assert loss.ignore_index == -100


def test_the_plugin_for_axolotl():
    plugin = run(*snippet_with("BasePlugin"), namespace())["CutlossPlugin"]()
    model, inputs = architectures.make("LlamaForCausalLM"), architectures.batch()
    want = model(**inputs).loss
    plugin.post_model_load({}, model)
    output = model(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, want)


@pytest.mark.parametrize("where, code", snippets(COMING_FROM, "yaml"))
def test_configurations_name_what_stands_above_them(where, code):
    """In the file and under the name that the page gives the class."""
    module, name = re.search(r"(my_\w+)\.(\w+)$", code.strip()).groups()
    where, _ = snippet_with(f"class {name}(")
    above = COMING_FROM.read_text().splitlines()[: int(where.partition(":")[2])]
    assert any(f"`{module}.py`" in line for line in above[-8:])


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

OF_LIGERS_LOGITS = parameters(
    liger.liger_cross_entropy, liger.LigerCrossEntropyLoss.forward, liger.LigerForCausalLMLoss
)
OF_LIGERS_SEQUENCES = parameters(
    *(
        f
        for name in ("DPO", "CPO", "SimPO", "ORPO", "KTO", "GRPO")
        for of in [getattr(liger, f"LigerFusedLinear{name}Loss")]
        for f in (of, of.forward)
    )
)

OF_TRLS_JSD = """student_logits teacher_logits labels beta temperature reduction
num_items_in_batch""".split()


@pytest.mark.parametrize(
    "title, names",
    [
        ("cut-cross-entropy", OF_CUT_CROSS_ENTROPY + parameters(cce_patch)),
        ("Liger", [*parameters(OfLiger, OfLiger.forward), "chunk_mem_const"] + OF_LIGERS_LOGITS),
        ("Preference and policy losses: Liger", OF_LIGERS_SEQUENCES),
        (
            "Distillation: TRL, Liger",
            parameters(JSD, JSD.forward, JSDLoss, JSDLoss.forward) + OF_TRLS_JSD,
        ),
        (
            "torch's F.linear_cross_entropy",
            parameters(torch_compat.linear_cross_entropy) + OF_TORCHS_OPTIONS,
        ),
    ],
    ids=["cut_cross_entropy", "liger", "liger_sequences", "distillation", "torch"],
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
