"""Flows where zuko's are asked for, and as nessai uses them."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import fastmaf

torch = pytest.importorskip("torch")


def test_a_flow_of_zuko():
    zuko = pytest.importorskip("zuko")
    flow = fastmaf.torch.MAF(3, context_features=2, seed=0)
    wrapped = fastmaf.torch.as_zuko(flow)
    assert isinstance(wrapped, zuko.flows.Flow)
    x, context = torch.randn(7, 3), torch.randn(7, 2)
    torch.testing.assert_close(wrapped(context).log_prob(x), flow.log_prob(x, context))
    z, log_det = wrapped(context).transform.call_and_ladj(x)
    back, inverse = wrapped(context).transform.inv.call_and_ladj(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse, -log_det, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(wrapped.parameters())
    (-wrapped(context).log_prob(x).sum()).backward()
    before = flow.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, flow.weight)
    kept = copy.deepcopy(wrapped.state_dict())
    wrapped.load_state_dict(kept)
    with pytest.raises(ValueError, match="flow is 3; it must be of type Flow"):
        fastmaf.torch.as_zuko(3)


@pytest.mark.filterwarnings("ignore")
def test_a_flow_of_nessai():
    pytest.importorskip("nessai")
    from nessai.flows import configure_model, reset_weights

    config = {"n_inputs": 3, "n_neurons": 16, "n_blocks": 2, "n_layers": 2, "flow": fastmaf.torch.nessai_maf(activation="tanh")}
    flow = configure_model(config)
    assert flow.flow.to_flow().record.layers[-1].conditioner.activation == "tanh"
    x = torch.randn(6, 3)
    z, log_det = flow.forward(x)
    back, inverse = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse, -log_det, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.forward_and_log_prob(x)[1], flow.log_prob(x), rtol=1e-4, atol=1e-4)
    drawn, density = flow.sample_and_log_prob(50)
    torch.testing.assert_close(density, flow.log_prob(drawn), rtol=1e-4, atol=1e-4)
    before = flow.flow.weight.detach().clone()
    flow.apply(reset_weights)
    assert not torch.equal(before, flow.flow.weight)
    flow.freeze_transform()
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    flow.unfreeze_transform()
    assert all(parameter.requires_grad for parameter in flow.parameters())
    assert np.isfinite(flow.sample(5).detach().numpy()).all()
