"""Calls of a patched model inside of each other, and in several threads: each gets what it asks."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import V, batch, make
from helpers.patched import NoLogits, assert_same, gradients, run
from torch.utils.checkpoint import checkpoint

import cutloss

LLAMA = "LlamaForCausalLM"
SECONDS = 60  # after which a thread that waits has failed


def without_labels():
    return {k: v for k, v in batch().items() if k != "labels"}


@pytest.mark.parametrize("asks", ["no labels", "return_logits", "evaluation", "labels"])
def test_a_loss_function_that_calls_the_model_again(asks):
    """As self-distillation does."""
    seen = []

    def of(model):
        plain = type(model).loss_function.fget(model)

        def loss_function(logits, labels, vocab_size, **kwargs):
            own = plain(logits, labels, vocab_size, **kwargs)
            if len(seen) % 2:  # the inner call of "labels" and others that take a loss
                return own
            given = without_labels() if asks == "no labels" else batch()
            if asks == "return_logits" and model is patched:
                given["return_logits"] = True
            seen.append(None)
            model.train(asks != "evaluation")
            output = model(**given)
            model.train()
            seen[-1] = output.logits
            again = plain(logits, labels, vocab_size, **kwargs)
            if asks == "labels":
                return own + 2 * again + output.loss
            return own + 2 * again + output.logits.square().mean()

        return loss_function

    stock, patched = make(LLAMA), make(LLAMA)
    cutloss.patch(patched)
    results = []
    for model in (stock, patched):
        seen.clear()
        model.loss_function = of(model)
        results.append(run(model, **batch()))
        assert len(seen) == 1
        if model is stock or asks != "labels":
            assert type(seen[0]) is torch.Tensor and seen[0].shape == (2, 10, V)
        else:
            assert seen[0] is None
    assert results[1][0].logits is None
    assert_same(results[1], results[0])


def test_a_call_that_fails_leaves_no_state():
    model, inputs = cutloss.patch(make(LLAMA)), batch()

    def fails(*args, **kwargs):
        raise KeyError("of the loss")

    model.loss_function = fails
    with pytest.raises(KeyError, match="of the loss"):
        model(**inputs)
    assert type(model.lm_head(torch.zeros(1, 32))) is torch.Tensor
    assert model(**without_labels()).logits.shape == (2, 10, V)


def in_thread(function):
    """Its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert results, "the thread failed or did not end"
    return results[0]


def test_another_thread_while_one_trains():
    """In the middle of a training call, where the classifier makes no logits here: without labels,
    with logits asked for, another training call, the classifier alone."""
    stock, inputs = make(LLAMA), batch()
    model = cutloss.patch(copy.deepcopy(stock), z_loss=0.1)
    want, seen = run(model, **inputs), []

    def meanwhile(module, args, output):
        handle.remove()
        seen.append(in_thread(lambda: model(**without_labels(), return_logits=True).logits))
        seen.append(in_thread(lambda: model(**inputs, return_logits=True).logits))
        seen.append(in_thread(lambda: model(**inputs)))
        seen.append(in_thread(lambda: model.lm_head(output)))

    handle = model.model.norm.register_forward_hook(meanwhile)
    with_others = run(model, **inputs)
    assert_same(with_others, want)
    assert with_others[0].logits is None
    for logits in seen[:2]:
        torch.testing.assert_close(logits, stock(**inputs).logits)
    assert seen[2].logits is None
    torch.testing.assert_close(seen[2].loss, want[0].loss)
    assert type(seen[3]) is torch.Tensor


def test_threads_that_train_and_evaluate_at_once():
    stock, inputs = make(LLAMA), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    without = without_labels()  # made once: it sets the seed that all threads share
    logits, loss = stock(**inputs).logits, stock(**inputs).loss
    failed, start = [], threading.Barrier(4)

    def calls(trains):
        try:
            start.wait(SECONDS)
            for _ in range(15):
                if trains:
                    output = model(**inputs)
                    assert output.logits is None
                    torch.testing.assert_close(output.loss, loss)
                else:
                    with torch.no_grad():
                        torch.testing.assert_close(model(**without).logits, logits)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=calls, args=(i % 2 == 0,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failed and not any(t.is_alive() for t in threads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_is_computed_again_in_backward(reentrant):
    """In a thread of autograd on CUDA, here in one of our own."""
    stock, inputs = make(LLAMA), batch()
    want = run(stock, **inputs)
    model = cutloss.patch(make(LLAMA))
    embedded = model.get_input_embeddings()(inputs["input_ids"])

    def loss_of(embedded):
        given = {k: v for k, v in inputs.items() if k != "input_ids"}
        return model(inputs_embeds=embedded, **given).loss

    with NoLogits():
        loss = checkpoint(loss_of, embedded, use_reentrant=reentrant)

    def backward():
        with NoLogits():
            loss.backward()
        return True

    in_thread(backward)
    assert_same((type(want[0])(loss=loss), gradients(model)), want)


def test_a_teacher_that_shares_the_classifier():
    """Two patched models, one called in the loss of the other."""
    student, teacher = make(LLAMA), make(LLAMA)
    teacher.model.norm.weight.data.mul_(1.5)
    stock = copy.deepcopy(student), copy.deepcopy(teacher)
    cutloss.patch(teacher), cutloss.patch(student)

    def trained(student, teacher):
        plain = type(student).loss_function.fget(student)

        def loss_function(logits, labels, vocab_size, **kwargs):
            with torch.no_grad():
                of_teacher = teacher(**without_labels()).logits
                inner = teacher(**batch()).loss
            scale = F.softmax(of_teacher, -1).amax() + inner
            return plain(logits, labels, vocab_size, **kwargs) * scale

        student.loss_function = loss_function
        return run(student, **batch())

    assert_same(trained(student, teacher), trained(*stock))
