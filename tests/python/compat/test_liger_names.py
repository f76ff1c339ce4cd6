"""Names of liger-kernel that cutloss.compat.liger does not have: what to write instead."""

import pytest

from cutloss.compat import liger

PATCHERS = [
    "apply_liger_kernel_to_llama",
    "apply_liger_kernel_to_qwen3_moe",
    "_apply_liger_kernel",
    "_apply_liger_kernel_to_instance",
]


@pytest.mark.parametrize("name", PATCHERS)
def test_what_patches_a_model(name):
    with pytest.raises(AttributeError, match=rf"{name}'.*cutloss\.patch\(model\).*coming-from\.md"):
        getattr(liger, name)
    assert not hasattr(liger, name)


def test_the_words_reach_who_imports_a_name():
    """Of an AttributeError `from ... import` would say that it cannot import the name, no more."""
    with pytest.raises(ImportError, match=r"cutloss\.patch\(model\).*coming-from\.md"):
        from cutloss.compat.liger import apply_liger_kernel_to_llama  # noqa: F401


def test_what_makes_a_model():
    with pytest.raises(AttributeError, match=r"transformers\.AutoModelForCausalLM\.from_pre"):
        liger.AutoLigerKernelForCausalLM


def test_another_loss():
    with pytest.raises(AttributeError, match="LigerTVDLoss'.*it has CrossEntropyOutput, .*JSD"):
        liger.LigerTVDLoss


def test_no_name_of_theirs():
    with pytest.raises(AttributeError, match="^module '.*liger' has no attribute 'no'$"):
        liger.no
    with pytest.raises(AttributeError):
        liger.__path__


@pytest.mark.parametrize("name", liger.__all__)
def test_what_is_there(name):
    assert getattr(liger, name).__name__ == name
