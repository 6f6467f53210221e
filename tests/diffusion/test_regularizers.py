"""Losses added to the objective: closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speedit_jax.diffusion.flow import PATHS, FlowMatching
from speedit_jax.diffusion.gaussian import GaussianDiffusion
from speedit_jax.diffusion.regularizers import ALIGNMENTS, alignment, dispersive, negatives, of_grid
from speedit_jax.diffusion.schedules import make_schedule


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def states(count, numbers, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, numbers)))


def test_examples_that_are_the_same_and_two_of_them():
    z = states(2, 50)
    np.testing.assert_allclose(dispersive(jnp.tile(z[:1], (8, 1)), 8, 0.5), 0, atol=1e-12)
    distance = float(((z[0] - z[1]) ** 2).mean())
    np.testing.assert_allclose(dispersive(z, 2, 0.5), np.log((1 + np.exp(-distance / 0.5)) / 2), rtol=1e-12)


@pytest.mark.parametrize("group, temperature", [(32, 0.5), (32, 1.0), (16, 0.5)])
def test_independent_normal_states(group, temperature):
    """Their distances are 2, to a few of sqrt(8 / 65,536)."""
    expected = np.log(1 / group + (1 - 1 / group) * np.exp(-2 / temperature))
    assert -np.log(group) < expected < 0
    np.testing.assert_allclose(dispersive(states(group, 65_536), group, temperature), expected, atol=0.01)


def test_groups_are_those_of_every_accumulation():
    """Row r is of group r mod (B / G), and so is its row in a microbatch, to which every count-th row goes."""
    z = states(24, 7)
    whole = dispersive(z, 4, 0.5)
    for r in range(24):
        members = z[np.arange(24) % 6 == r % 6]
        np.testing.assert_allclose(whole[r], dispersive(members, 4, 0.5)[0], rtol=1e-12)
    for count in (2, 3):
        parts = jnp.stack([dispersive(z[i::count], 4, 0.5) for i in range(count)], axis=1).reshape(-1)
        np.testing.assert_allclose(parts, whole, rtol=1e-12)
    order = np.random.default_rng(1).permutation(4)
    np.testing.assert_allclose(dispersive(z[::6][order], 4, 0.5), whole[::6], rtol=1e-12)


def test_gradients_are_finite_and_drive_apart():
    z = 0.1 * states(4, 6)
    gradient = jax.grad(lambda z: dispersive(z, 4, 0.5).mean())(z)
    centred = z - z.mean(axis=0)
    assert np.isfinite(gradient).all() and float((gradient * centred).sum()) < 0
    np.testing.assert_allclose(jax.grad(lambda z: dispersive(z, 4, 0.5).mean())(jnp.ones((4, 6))), 0, atol=1e-12)


def test_negatives_are_others_and_uniform():
    np.testing.assert_array_equal(negatives(jax.random.key(0), 2), [1, 0])
    drawn = np.stack([negatives(jax.random.key(seed), 5) for seed in range(400)])
    assert (drawn != np.arange(5)).all()
    # Each of the four others in a quarter of 400 draws, to four standard errors.
    for i in range(5):
        share = np.bincount(drawn[:, i], minlength=5)[np.arange(5) != i] / 400
        np.testing.assert_allclose(share, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 400))


@pytest.mark.parametrize("path", PATHS)
def test_the_target_is_that_of_the_loss(path):
    x0, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1)))
    s, flow = jnp.asarray([0.1, 0.5, 0.9]), FlowMatching(path, noise_scale=2.0)
    target = flow.target(x0, s, noise)
    np.testing.assert_allclose(flow.losses(target, x0, flow.q_sample(x0, s, noise), s, noise)["mse"], 0, atol=1e-25)


def test_the_minimiser_of_contrastive_flow_matching():
    """A constant prediction over many examples: least squares pushed off the mean of all targets by 1 / (1 - lambda)."""
    rng, lam = np.random.default_rng(0), 0.05
    u, features = rng.standard_normal((4000, 1)) + 0.7, np.stack([np.ones(4000), rng.standard_normal(4000)], 1)
    u += 2 * features[:, 1:]
    others = u.mean()  # of j, which is independent of x
    # Gradient of mean (f w - u)^2 - lam mean (f w - u_j)^2 is zero.
    gram, right = features.T @ features / 4000, features.T @ (u - lam * others) / 4000
    w = np.linalg.solve((1 - lam) * gram, right)
    plain = np.linalg.solve(gram, features.T @ u / 4000)
    np.testing.assert_allclose(features @ plain, (1 - lam) * (features @ w) + lam * others, atol=1e-10)


TORCHS = {
    "cosine": lambda torch, z, h: 1 - torch.nn.functional.cosine_similarity(z, h, dim=-1),
    "smooth_l1": lambda torch, z, h: torch.nn.functional.smooth_l1_loss(z, h, beta=0.05, reduction="none").mean(-1),
}


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_alignment_is_that_of_torch(kind):
    """Values and gradients; differences lie on both sides of beta."""
    torch = pytest.importorskip("torch")
    z, h, weight = (states(3, 5 * 8, seed).reshape(3, 5, 8) for seed in range(3))
    h = z + 0.1 * h
    weight = weight[:, 0, 0]
    assert 0.1 < (jnp.abs(z - h) < 0.05).mean() < 0.9
    theirs = torch.tensor(np.asarray(z), requires_grad=True)
    values = TORCHS[kind](torch, theirs, torch.tensor(np.asarray(h))).mean(dim=1)
    (values * torch.tensor(np.asarray(weight))).sum().backward()
    np.testing.assert_allclose(alignment(z, h, kind), values.detach(), rtol=1e-12)
    gradients = jax.grad(lambda z, h: (alignment(z, h, kind) * weight).sum(), argnums=(0, 1))(z, h)
    np.testing.assert_allclose(gradients[0], theirs.grad, atol=1e-12)
    assert not gradients[1].any(), "the teacher does not learn"


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_alignment_of_what_is_aligned_or_zero(kind):
    z = states(2, 12).reshape(2, 3, 4)
    np.testing.assert_allclose(alignment(z, z, kind), 0, atol=1e-12)
    for one, other in ((0 * z, z), (z, 0 * z), (0 * z, 0 * z)):
        assert np.isfinite(jax.grad(lambda z, other=other: alignment(z, other, kind).sum())(one)).all()
    if kind == "cosine":
        np.testing.assert_allclose(alignment(z, -3 * z, kind), 2, rtol=1e-12)
        np.testing.assert_allclose(
            alignment(5 * z, states(2, 12, 1).reshape(2, 3, 4), kind), alignment(z, states(2, 12, 1).reshape(2, 3, 4), kind)
        )


def test_features_normalised_over_an_image():
    """With all of the mean taken off: mean 0, deviation 1, whatever an affine map makes of each channel of an image."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 4, 6, 5))
    found = of_grid(jnp.asarray(features), (4, 6), 1.0)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(axis=1, ddof=1), 1, rtol=1e-5)  # 1e-6 is added to it
    mapped = features * rng.uniform(1, 9, (3, 1, 1, 5)) + rng.standard_normal((3, 1, 1, 5))
    np.testing.assert_allclose(of_grid(jnp.asarray(mapped), (4, 6), 1.0), found, atol=1e-5)
    # A channel that is the same everywhere says nothing.
    assert not of_grid(jnp.ones((1, 4, 6, 5)), (4, 6), 1.0).any()


def test_features_of_a_finer_grid_are_averaged():
    features = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float16)
    found = of_grid(jnp.asarray(features), (2, 2), 0.0)
    assert found.shape == (2, 4, 5) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 1], features[:, :2, 3:].astype(np.float32).mean(axis=(1, 2)), atol=1e-6)


def test_less_noise():
    by = jax.random.uniform(jax.random.key(0), (1000,)) * 0.2
    s = jax.random.uniform(jax.random.key(1), (1000,))
    nearer = FlowMatching("linear").less_noise(s, by)
    assert (nearer >= s).all() and (nearer <= 1).all() and (nearer == 1).any()
    np.testing.assert_allclose(nearer[s < 0.8], (s + by)[s < 0.8], rtol=1e-15)
    diffusion = GaussianDiffusion(make_schedule("linear", 500), "fixed_small", "epsilon", "mse")
    t = jax.random.randint(jax.random.key(2), (1000,), 0, 500)
    nearer = diffusion.less_noise(t, by)
    assert nearer.dtype == t.dtype and (nearer <= t).all() and (nearer >= 0).all()
    # As the published randint(0, 0.2 T) draws them: 100 whole numbers.
    assert set(np.asarray(t - nearer)[t >= 100].tolist()) <= set(range(100)) and len(np.unique((t - nearer)[t >= 100])) > 95
