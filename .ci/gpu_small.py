"""Every operation of small flows on a GPU, against the CPU: what compute-sanitizer watches."""

import sys

import numpy as np

import fastmaf

FLOWS = {
    "transforms": fastmaf.MAF(features=5, context_features=2, transforms=2, hidden_features=(40, 30), bounds=[(0, None), *[None] * 4]),
    "residual mixture": fastmaf.MAF(features=5, transforms=2, hidden_features=(24, 24), residual=True, components=3, batch_norm=True),
    "mixture": fastmaf.MADE(features=4, conditional="mixture", components=4),
    "bernoulli": fastmaf.MADE(features=9, conditional="bernoulli"),
    "categorical": fastmaf.MADE(features=3, conditional="categorical", categories=[2, 5, 3]),
    "linear": fastmaf.presets.resmade_lu(features=6)[0],
}
rng = np.random.default_rng(0)
for name, flow in FLOWS.items():
    for dtype in ("float32", "float64"):
        own = flow.astype(dtype)
        there = own.to("cuda")
        discrete = name in ("bernoulli", "categorical")
        x = rng.integers(0, 2, (150, own.features)).astype(dtype) if discrete else np.abs(rng.normal(size=(150, own.features)))
        context = rng.normal(size=(150, own.context_features)) if own.context_features else None
        pairs = [(there.log_prob(x, context), own.log_prob(x, context))]
        pairs += zip(
            there.sample_and_log_prob(150, None if context is None else context[0], seed=1),
            own.sample_and_log_prob(150, None if context is None else context[0], seed=1),
            strict=True,
        )
        if not discrete:
            pairs.append((there.to_noise(x, context), own.to_noise(x, context)))
            pairs.append((there.from_noise(x, context), own.from_noise(x, context)))
            halves = own.to("cuda", "medium").log_prob(x, context)
            assert np.allclose(halves, own.log_prob(x, context), 0.02, 0.05), f"{name} in {dtype}, precision medium"
        worst = max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in pairs)
        assert worst < (1e-3 if dtype == "float32" else 1e-8), f"{name} in {dtype}: {worst}"

# Tiles of every width, blocks that take one tile after the other, and host arrays in several chunks: row by row the same, every time.
flow = FLOWS["transforms"].to("cuda")
x, context = np.abs(rng.normal(size=(1_000_000, 5))), rng.normal(size=2)
few = flow.log_prob(x[:150], context)
for n in (10_000, 200_000, 1_000_000) if len(sys.argv) > 1 else (40_000,):
    own = flow.log_prob(x[:n], context)
    assert np.array_equal(own[:150], few) and np.array_equal(own, flow.log_prob(x[:n], context)), f"{n} rows"
    assert np.array_equal(flow.sample(n, context, seed=3)[-7:], flow.sample(7, context, seed=3, offset=n - 7)), f"{n} samples"
print("agree")
