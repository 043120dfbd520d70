"""Published recipes."""

from __future__ import annotations

import make
import numpy as np
import pytest

import fastmaf
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Linear, Terminal


def test_maf_paper():
    flow, settings = fastmaf.presets.maf_paper(6, 2, transforms=3, names=list("abcdef"), seed=4)
    assert [type(layer) for layer in flow.layers] == [Affine, *[Autoregressive, BatchNorm] * 3]
    assert [flow.layers[k].ranks.tolist() for k in (1, 3)] == [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    assert [dense.bias.size for dense in flow.layers[1].conditioner.hidden] == [512, 512]
    assert all(norm.statistics == "batch" for norm in flow.layers[2::2])
    assert settings == {"batch_size": 100, "lr": 1e-4, "l2": 1e-6, "patience": 30}
    mixture, _ = fastmaf.presets.maf_paper(6, components=10)
    assert isinstance(mixture.base, Terminal) and mixture.base.components == 10


def test_resmade_lu():
    flow, settings = fastmaf.presets.resmade_lu(6, seed=4)
    assert [type(layer) for layer in flow.layers] == [Affine, *[Linear, Autoregressive] * 10]
    assert [block.kind for block in flow.layers[2].conditioner.blocks] == ["residual"] * 2
    assert {"schedule": "cosine", "lr": 5e-4, "clip_norm": 5.0, "batch_size": 512}.items() <= settings.items()


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (fastmaf.presets.maf_paper, {"transforms": 2, "hidden_features": (9,)}),
        (fastmaf.presets.maf_paper, {"transforms": 1, "hidden_features": (9,), "components": 2, "context_features": 1}),
        (fastmaf.presets.resmade_lu, {"transforms": 2, "hidden_features": (9, 9)}),
    ],
)
def test_settings_fit_the_model(preset, options):
    with make.reference():
        flow, settings = preset(3, **options)
        x = np.random.default_rng(0).normal(size=(300, 3)) @ np.triu(np.ones((3, 3)))
        history = flow.fit(x, x[::-1, :1] if flow.context_features else None, progress=False, **{**settings, "max_epochs": 3, "lr": 1e-2})
        assert history.validation[-1] > history.validation[0]
