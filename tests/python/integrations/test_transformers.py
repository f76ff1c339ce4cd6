"""cutloss.patch: loss and gradients are those of the model itself, and no logits are made."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES, batch, make
from helpers.patched import NoLogits, assert_same, run

import cutloss


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_models_own(name):
    model, inputs = make(name), batch()
    want = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    cutloss.patch(model)
    with NoLogits():
        got = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    for g, w in zip(got, want):
        assert_same(g, w)
        assert type(g[0]) is type(w[0])
        assert "logits" not in g[0] and g[0].logits is None
        assert [k for k in w[0] if k != "logits"] == list(g[0])
    if want[0][0].get("aux_loss") is not None:
        assert want[0][0].aux_loss > 0
        torch.testing.assert_close(got[0][0].aux_loss, want[0][0].aux_loss)
