"""What cutloss.patch promises beside the loss: what it leaves alone, what it refuses, and why."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from helpers.architectures import V, batch, make
from helpers.patched import NoLogits, assert_same, gradients, run

import cutloss

LLAMA = "LlamaForCausalLM"


def test_without_labels_nothing_changes():
    stock, inputs = make(LLAMA), batch()
    del inputs["labels"]
    model = cutloss.patch(copy.deepcopy(stock))
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits)
    ids = inputs["input_ids"]
    given = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.generate(ids, **given).tolist() == stock.generate(ids, **given).tolist()
    kept = model(**inputs, use_cache=True, logits_to_keep=1)
    assert kept.logits.shape == (2, 1, V) and kept.past_key_values is not None


@pytest.mark.parametrize(
    "training, at_patch, in_call, made",
    [
        (True, None, None, False),
        (False, None, None, True),
        (False, False, None, False),
        (True, True, None, True),
        (True, None, True, True),
        (False, True, False, False),
    ],
)
def test_when_logits_are_made(training, at_patch, in_call, made):
    stock, inputs = make(LLAMA), batch()
    model = cutloss.patch(copy.deepcopy(stock), return_logits=at_patch)
    model.train(training)
    given = {} if in_call is None else dict(return_logits=in_call)
    output, want = model(**inputs, **given), stock(**inputs)
    torch.testing.assert_close(output.loss, want.loss)
    if made:
        assert torch.equal(output.logits, want.logits)
    else:
        assert output.logits is None


def test_tuples_keep_their_places():
    stock, inputs = make(LLAMA), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    given = dict(return_dict=False, output_hidden_states=True, use_cache=False)
    want, got = stock(**inputs, **given), model(**inputs, **given)
    assert got[1] is None and len(got) == len(want)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2], want[2])


def test_labels_by_position():
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    given = (inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    assert model(*given).logits is None
    torch.testing.assert_close(model(*given).loss, model(**inputs).loss)


def test_shifted_labels_and_another_ignore_index():
    stock, inputs = make(LLAMA), batch()
    labels = inputs["labels"].masked_fill(inputs["labels"] == -100, 0)
    shifted = F.pad(labels[:, 1:], (0, 1), value=0)
    model = cutloss.patch(copy.deepcopy(stock))
    given = dict(input_ids=inputs["input_ids"], labels=labels, ignore_index=0)
    assert_same(run(model, **given), run(stock, **given))
    given["shift_labels"] = shifted
    assert_same(run(model, **given), run(stock, **given))


def test_no_label_counts():
    """NaN as the model's own; gradients of zero. A number of items makes the loss 0."""
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    inputs["labels"].fill_(-100)
    output, grads = run(model, **inputs)
    assert output.loss.isnan() and all((g == 0).all() for g in grads.values())
    output, grads = run(model, **inputs, num_items_in_batch=5)
    assert output.loss == 0 and all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("name", ["CohereForCausalLM", "GraniteForCausalLM", "Gemma2ForCausalLM"])
def test_a_bias_is_scaled_and_capped_too(name):
    stock = make(name, tie_word_embeddings=False)
    stock.lm_head = torch.nn.Linear(32, V)
    model = cutloss.patch(copy.deepcopy(stock))
    assert_same(run(model, **batch()), run(stock, **batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    exact, inputs = make("Gemma2ForCausalLM"), batch()
    want, _ = run(exact, **inputs)
    stock = copy.deepcopy(exact).to(dtype)
    model = cutloss.patch(copy.deepcopy(stock))
    got, grads = run(model, **inputs)
    of_stock, stock_grads = run(stock, **inputs)
    assert abs(got.loss - want.loss) <= 2 * abs(of_stock.loss - want.loss) + 1e-3
    assert all(grads[n].dtype == g.dtype for n, g in stock_grads.items())


def test_autocast():
    stock, inputs = make("CohereForCausalLM"), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = stock(**inputs).loss, model(**inputs).loss
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_activation_checkpointing():
    stock, inputs = make(LLAMA), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    model.gradient_checkpointing_enable()
    assert_same(run(model, **inputs), run(stock, **inputs))


def test_compiles_whole():
    stock, inputs = make("Gemma2ForCausalLM"), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    want = run(stock, **inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs).loss
    loss.backward()
    assert_same((transformers.utils.ModelOutput(loss=loss), gradients(model)), want)


def test_a_forward_of_ones_own_compiles_whole():
    def own(self, input_ids, labels, **others):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = (self.scale * logits[:, :-1] - self.vector) / self.scale.exp() + self.vector
        loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        halves = zip(logits.flatten(0, 1).log_softmax(-1).split(labels.shape[1] - 1), labels[:, 1:])
        loss = loss + sum(F.nll_loss(z, y) for z, y in halves)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    stock, inputs = make(LLAMA), batch()
    stock.scale = torch.nn.Parameter(torch.tensor(0.4))
    stock.vector = torch.nn.Parameter(torch.linspace(-1, 2, V)[None])
    replaced(stock, own)
    want = run(stock, **inputs)
    model = cutloss.patch(copy.deepcopy(stock))
    with NoLogits():
        assert_same(run(model, **inputs), want)
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)(**inputs).loss
    loss.backward()
    assert_same((transformers.utils.ModelOutput(loss=loss), gradients(model)), want)


@pytest.mark.parametrize("reduced_by", [None, 11])
def test_regularisers_count_in_training(reduced_by):
    stock, inputs = make(LLAMA), batch()
    logits = stock(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    how = "mean" if reduced_by is None else "sum"
    want = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=how)
    squares = logits.logsumexp(-1)[labels != -100].square()
    want = (want + 0.01 * getattr(squares, how)()) / (reduced_by or 1)
    plain = stock(**inputs, num_items_in_batch=reduced_by).loss
    model = cutloss.patch(stock, z_loss=0.01, label_smoothing=0.1)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=reduced_by).loss, want)
    model.eval()
    got = model(**inputs, num_items_in_batch=reduced_by, return_logits=False).loss
    torch.testing.assert_close(got, plain)


def test_impl_torch_and_max_workspace_arrive():
    model, inputs = cutloss.patch(make(LLAMA), impl="torch"), batch()
    with pytest.raises(AssertionError, match="made a tensor of shape"), NoLogits():
        model(**inputs)
    # The few tokens on which patch compares say nothing of what a step needs.
    model = cutloss.patch(make(LLAMA), max_workspace=1)
    with pytest.raises(ValueError, match="max_workspace"):
        model(**inputs)


# Patching -----------------------------------------------------------------------------------------


def test_patching_leaves_no_trace():
    """Random state, modes, gradients, buffers; and unpatch leaves the model as it came."""
    model, inputs = make(LLAMA), batch()
    model.model.layers[0].eval()
    run(model, **inputs)
    model.lm_head.weight.requires_grad_(False)
    names = set(model.__dict__), set(model.lm_head.__dict__)
    grads, state = gradients(model), torch.get_rng_state()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    assert cutloss.patch(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(g, grads[n]) for n, g in gradients(model).items())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for p in model.model.parameters())
    assert cutloss.unpatch(model) is model
    assert (set(model.__dict__), set(model.lm_head.__dict__)) == names
    assert model(**inputs).logits.shape == (2, 10, V)


def test_a_copy_is_patched_and_its_own():
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**inputs).loss.item() == pytest.approx(torch.tensor(float(V)).log().item())
    assert other(**inputs).logits is None
    cutloss.unpatch(other)
    assert model(**inputs).logits is None and other(**inputs).logits is not None
    with pytest.raises(TypeError, match="save_pretrained and state_dict"):
        torch.save(model, io.BytesIO())


def test_save_pretrained(tmp_path):
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hooks_of_accelerate(first):
    """As device_map puts them on every module."""
    stock, inputs = make(LLAMA), batch()
    model = copy.deepcopy(stock)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if first == "hook":
        add_hook_to_module(model.lm_head, hook)
        cutloss.patch(model)
    else:
        cutloss.patch(model)
        add_hook_to_module(model.lm_head, hook)
    with NoLogits():
        got = run(model, **inputs)
    assert_same(got, run(stock, **inputs))
    cutloss.unpatch(model)
    assert model(**inputs).logits.shape == (2, 10, V)
    remove_hook_from_module(model.lm_head)
    assert model(**inputs).logits.shape == (2, 10, V)


# What is refused ----------------------------------------------------------------------------------


def refused(change, match, name=LLAMA, error=NotImplementedError):
    model = make(name)
    changed = change(model)
    model = model if changed is None else changed
    with pytest.raises(error, match=match):
        cutloss.patch(model)
    if isinstance(model, transformers.LlamaForCausalLM):
        assert "forward" not in model.__dict__ and "_cutloss_patches" not in model.__dict__
        head = model.get_output_embeddings()
        assert not any("cutloss" in key for m in head.modules() for key in m.__dict__)


def replaced(model, method):
    model.__class__ = type("Changed", (type(model),), {"forward": method})


def test_unknown_operations_are_named():
    def biased(self, **inputs):
        logits = self.lm_head(self.model(inputs["input_ids"]).last_hidden_state)
        logits[..., 5] = -1e4
        loss = self.loss_function(logits, inputs["labels"], V)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    refused(lambda m: replaced(m, biased), "Changed.*an assignment to entries")

    def normalised(self, **inputs):
        logits = self.lm_head(self.model(inputs["input_ids"]).last_hidden_state)
        loss = self.loss_function(logits.softmax(-1), inputs["labels"], V)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    refused(lambda m: replaced(m, normalised), "the attribute 'softmax'")


def test_a_forward_that_reads_the_weight_itself():
    def fused(self, **inputs):
        hidden = self.model(inputs["input_ids"]).last_hidden_state
        loss = self.loss_function(hidden @ self.lm_head.weight.T, inputs["labels"], V)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)

    refused(lambda m: replaced(m, fused), "Changed computes its loss without a call of its")


def test_a_loss_that_differs():
    """Found by comparing: a scale that the promise of logits is not given."""

    def otherwise(self, **inputs):
        from helpers.inside import UnmadeLogits

        logits = self.lm_head(self.model(inputs["input_ids"]).last_hidden_state)
        logits = logits if isinstance(logits, UnmadeLogits) else logits * 1.5
        loss = self.loss_function(logits, inputs["labels"], V)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    refused(lambda m: replaced(m, otherwise), "on a tiny batch the .* with cutloss")


def test_classifiers_of_other_kinds():
    class Linear4bit(torch.nn.Linear):
        def forward(self, x):
            step = self.weight.abs().max() / 7
            return F.linear(x, (self.weight / step).round() * step)

    def quantised(model):
        model.lm_head = Linear4bit(32, V)

    refused(quantised, "Linear4bit, of which cutloss does not know.*in bf16 or fp32")

    class Packed(torch.Tensor):
        """As quantisers have, and a sharded weight is."""

    def of_a_subclass(model):
        weight = model.lm_head.weight.data.as_subclass(Packed)
        model.lm_head.weight = torch.nn.Parameter(weight)

    refused(of_a_subclass, "Packed, not a tensor of its own")

    def in_eight_bits(model):
        weight = torch.zeros(V, 32, dtype=torch.int8)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)

    refused(in_eight_bits, "a weight of torch.int8")

    def sequential(model):
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, V), torch.nn.Softplus())

    refused(sequential, "Sequential without a weight")

    def of_instance(model):
        model.lm_head.forward = lambda x: torch.zeros(*x.shape[:-1], V)

    refused(of_instance, "a forward of its own on the instance")

    def other(model):
        model.lm_head = torch.nn.Bilinear(1, 32, V)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32))

    refused(other, "a torch.nn.modules.linear.Bilinear, of which .* it is no nn.Linear. Put an")


def test_models_of_other_kinds():
    size = dict(vocab_size=V, hidden_size=32, num_hidden_layers=1, pad_token_id=0, bos_token_id=1)
    config = transformers.MusicgenDecoderConfig(**size, ffn_dim=32)
    with pytest.raises(NotImplementedError, match="ModuleList without a weight"):
        cutloss.patch(transformers.MusicgenForCausalLM(config))


def test_an_embedding_in_place_of_the_classifier():
    """As FSMT names it. Nothing there is quantised; and what the message says to do works."""
    stock = make("FSMTForConditionalGeneration")
    model = copy.deepcopy(stock)
    with pytest.raises(NotImplementedError, match="FSMT.* an nn.Embedding, .*what makes") as e:
        cutloss.patch(model)
    assert "bits" not in str(e.value).lower()
    model.get_output_embeddings = lambda: model.model.decoder.output_projection
    assert_same(run(cutloss.patch(model), **batch()), run(stock, **batch()))


def test_wrapped_models():
    refused(torch.nn.DataParallel, "inside .*DataParallel.*before it is wrapped", error=ValueError)
    refused(torch.compile, "inside .*OptimizedModule.*wrapped or compiled", error=ValueError)
    refused(lambda m: m.model, "LlamaModel has no output embeddings")
    with pytest.raises(TypeError, match="takes a model, got str"):
        cutloss.patch("meta-llama/Llama-3.2-1B")
    model = cutloss.patch(make(LLAMA))
    with pytest.raises(ValueError, match="patched already"):
        cutloss.patch(model)
    with pytest.raises(ValueError, match="is not patched"):
        cutloss.unpatch(make(LLAMA))


def test_a_model_without_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make(LLAMA).config)
    with pytest.raises(ValueError, match="meta device.*verify=False"):
        cutloss.patch(model)
    cutloss.patch(model, verify=False)
    model.to_empty(device="cpu").load_state_dict(make(LLAMA).state_dict())
    assert model(**batch()).logits is None


def test_what_a_call_does_not_know():
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    with pytest.raises(ValueError, match="labels .* logits .*logits_to_keep"):
        model(**inputs, logits_to_keep=3)
    model.config.vocab_size = 90
    with pytest.raises(ValueError, match="the vocabulary, of 97"):
        model(**inputs)
    model.config.vocab_size = V
    # Later than the patch:
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, V), torch.nn.Softplus())
    with pytest.raises(NotImplementedError, match="Sequential without a weight"):
        model(**inputs)


@pytest.mark.parametrize(
    "given, match",
    [
        (dict(z_loss=-1.0), "z_loss must be finite"),
        (dict(label_smoothing=2.0), "label_smoothing must be in"),
        (dict(max_workspace=-1), "max_workspace must be in"),
        (dict(impl="torch", max_workspace=1), "stores all logits"),
    ],
)
def test_bad_options(given, match):
    with pytest.raises(ValueError, match=match):
        cutloss.patch(make(LLAMA), **given)


def test_label_smoothing_given_twice():
    def smoothed(logits, labels, vocab_size, **kwargs):
        flat = logits[:, :-1].reshape(-1, V)
        return F.cross_entropy(flat, labels[:, 1:].flatten(), label_smoothing=0.1)

    model = make(LLAMA)
    model.loss_function = smoothed
    want = run(model, **batch())
    assert_same(run(cutloss.patch(model), **batch()), want)
    cutloss.unpatch(model)
    cutloss.patch(model, label_smoothing=0.2)
    with pytest.raises(ValueError, match="label_smoothing is given twice, as 0.2 .* and as 0.1"):
        model(**batch())


HOOKS = {
    "pre": lambda head: head.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "forward": lambda head: head.register_forward_hook(lambda m, a, out: out),
    "backward": lambda head: head.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_classifier_are_refused(name):
    """They are for logits, which are not made."""
    model = make("LlamaForCausalLM")
    HOOKS[name](model.lm_head)
    with pytest.raises(NotImplementedError, match="has a hook"):
        cutloss.patch(model)
    model = cutloss.patch(make("LlamaForCausalLM")).train()
    HOOKS[name](model.lm_head)
    ids = torch.randint(5, 40, (2, 6))
    with pytest.raises(NotImplementedError, match="has a hook"):
        model(ids, labels=ids)


def of_outputs(m, args, out):
    return out * 2 if m.__class__ is torch.nn.Linear else None


def in_any_structure(m, args, out):
    """Also in the dict that the loss is in, which would be doubled."""
    return torch.utils._pytree.tree_map(lambda t: t * 2, out) if type(out) is dict else None


@pytest.mark.parametrize("hook", [of_outputs, in_any_structure])
def test_hooks_of_all_modules_that_change_outputs_are_refused(hook):
    model = cutloss.patch(make(LLAMA))
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(NotImplementedError, match="register_module_forward_hook.*leave this"):
            model(**batch())
    finally:
        handle.remove()


def test_hooks_of_all_modules_that_look_do_no_harm():
    model, seen = cutloss.patch(make(LLAMA)), []
    want = model(**batch()).loss
    look = torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(m))
    try:
        assert torch.equal(model(**batch()).loss, want) and model.lm_head in seen
    finally:
        look.remove()


def test_a_cast_that_reads_a_shape():
    def cast(module, args, out):
        assert out.shape[-1] > 1
        return out.float()

    model = make(LLAMA).bfloat16()
    model.lm_head.register_forward_hook(cast)
    with pytest.raises(NotImplementedError, match="a forward hook.*reads what .*attribute 'shape'"):
        cutloss.patch(model)


def test_a_loss_of_logits_on_a_patched_model_is_an_error():
    model = cutloss.patch(make("LlamaForCausalLM")).train()
    model.loss_function = cutloss.CausalLMLoss(model.config.vocab_size)
    ids = torch.randint(5, 40, (2, 6))
    with pytest.raises(TypeError, match="this model is patched and makes no logits"):
        model(ids, labels=ids)
