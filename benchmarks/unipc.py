"""Is UniPC-2 (arXiv 2302.04867, of x0_hat, B_2) nearer to the probability flow than DPM-Solver++(2M), at equal evaluations?

  python -m speedit_jax.train --config=configs/digits.py --config.training.num_steps=300 --workdir=runs/digits300
  python -m benchmarks.unipc --workdir=runs/digits300

It is 2M that takes each step again once x0_hat at its end, `new`, is known. With the letters of samplers.py, u = -h,
p1 = e^u - 1, p2 = p1 / u - 1, p3 = p2 / u - 1/2 and slope = (x0_hat - previous x0_hat) h / h_previous:

  2M       x' = sigma' / sigma x - alpha' p1 (x0_hat + slope / 2)
  UniPC-2  x' = sigma' / sigma x - alpha' (p1 x0_hat + c slope + (p2 - c) (new - x0_hat)),  c = (p2 - 2 p3) / (1 + h_previous / h)

Steps are those of spacing=logsnr on the linear schedule. Of Gaussian mixtures the perfect network and the flow are known; of a
run's network, with its guidance and clipping, 100 steps of 2M stand for the flow. Prints the root mean square error of 2M, over
all numbers, and UniPC's as a multiple of it; in brackets the multiple for the median image.
"""

import argparse
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import softmax

from speedit_jax import sharding
from speedit_jax.data.sources import load_digits
from speedit_jax.diffusion.samplers import guided, spaced_steps
from speedit_jax.diffusion.schedules import make_schedule
from speedit_jax.training.run import open_run

COUNTS, NUM_IMAGES = (5, 8, 10, 15, 20), 200
SCHEDULE = make_schedule("linear", 1000)
ALPHA, SIGMA = np.sqrt(SCHEDULE.alphas_cumprod), SCHEDULE.sigmas
Predict = Callable[[np.ndarray, float, float], np.ndarray]  # (x [B, D], alpha, sigma) -> x0_hat


def solve(predict: Predict, x: np.ndarray, num_steps: int, corrector: bool) -> np.ndarray:
    """Images of 2M, or with the corrector of UniPC-2, from x at the noisiest level."""
    steps = spaced_steps(SCHEDULE, "logsnr", num_steps)[::-1]
    alpha, sigma = ALPHA[steps], SIGMA[steps]
    h = np.diff(np.log(alpha / sigma))
    x0, slope = predict(x, alpha[0], sigma[0]), 0
    for k in range(num_steps - 1):
        p2 = -(p1 := np.expm1(-h[k])) / h[k] - 1
        p3 = -p2 / h[k] - 1 / 2
        c = (p2 - 2 * p3) / (1 + h[k - 1] / h[k]) if k else p2 - p1 / 2  # the first step knows one point less
        step = lambda change, k=k, x=x: sigma[k + 1] / sigma[k] * x - alpha[k + 1] * change  # noqa: E731
        predicted = step(p1 * (x0 + slope / 2))
        new = predict(predicted, alpha[k + 1], sigma[k + 1])
        x = step(p1 * x0 + c * slope + (p2 - c) * (new - x0)) if corrector else predicted
        x0, slope = new, (new - x0) * h[min(k + 1, num_steps - 2)] / h[k]
    return x0


def flow(predict: Predict, x: np.ndarray) -> np.ndarray:
    """Images of the exact probability flow: with y = x / alpha and s = sigma / alpha, dy / dlog(s) = y - x0_hat."""

    def x0_hat(log_s, y):
        alpha = 1 / np.hypot(1, np.exp(log_s))
        return predict(alpha * y.reshape(x.shape), alpha, alpha * np.exp(log_s))

    ends, start = np.log(SIGMA / ALPHA)[[-1, 0]], (x / ALPHA[-1]).reshape(-1)
    derivative = lambda log_s, y: y - x0_hat(log_s, y).reshape(-1)  # noqa: E731
    return x0_hat(ends[1], solve_ivp(derivative, ends, start, method="DOP853", rtol=1e-9, atol=1e-9).y[:, -1])


def mixture(means: np.ndarray, spread: float) -> Predict:
    """E[x_0 | x] of equally likely N(mean, spread^2)."""

    def predict(x, alpha, sigma):
        y, variance = x / alpha, spread**2 + (sigma / alpha) ** 2
        mean = softmax((y @ means.T - (means**2).sum(-1) / 2) / variance, axis=1) @ means
        return mean + spread**2 / variance * (y - mean)

    return predict


def mixtures() -> Iterator[tuple[str, int, Predict]]:
    """Name, dimensions, perfect network; under guidance a part of the mixture, the label's, away from all of it."""
    random, (digits, labels) = np.random.default_rng(0).uniform(-1, 1, (20, 256)), load_digits("train")
    for name, means, part, spread in (
        ("3 Gaussians in 2-D", random[:3, :2], slice(1), 0.3),
        ("20 Gaussians in 256-D", random, slice(5), 0.25),
        ("a Gaussian at each digit", digits.reshape(-1, 64).astype(np.float64), labels == 3, 0.2),
    ):
        f, g = mixture(means[part], spread), mixture(means, spread)
        for w in (0, 1.5, 4):
            yield f"{name}, guidance {w}" if w else name, means.shape[1], lambda *x, f=f, g=g, w=w: g(*x) + w * (f(*x) - g(*x))


def network(workdir: str) -> tuple[int, Predict]:
    """Dimensions, and x0_hat of a run's EMA weights under its own guidance and clipping."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    run = open_run(workdir, mesh=mesh)
    shape, sampling = run.model.image_shape, run.config.sampling
    apply, labels = functools.partial(run.model.apply, run.restore()), jnp.arange(NUM_IMAGES) % len(run.class_names)
    denoise = guided(apply, labels, run.model.null_label, sampling.guidance_scale, shape[-1])
    x0_hat = jax.jit(lambda x, t: run.diffusion.predict_x0_and_eps(denoise(x, t), x, t, sampling.clip)[0])

    def predict(x, alpha, sigma):
        t = jnp.full(NUM_IMAGES, np.abs(ALPHA - alpha).argmin())
        with jax.set_mesh(mesh):
            return np.asarray(x0_hat(jnp.asarray(x, jnp.float32).reshape(-1, *shape), t), np.float64).reshape(x.shape)

    return int(np.prod(shape)), predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run of diffusion with the linear schedule of 1,000 steps")
    trained = network(parser.parse_args().workdir)
    print("| |", *(f"{n} steps |" for n in COUNTS), "\n|" + "---|" * (len(COUNTS) + 1))
    for name, size, predict in (*mixtures(), ("trained network", *trained)):
        x, cells = np.random.default_rng(1).normal(size=(NUM_IMAGES, size)), []
        exact = solve(predict, x, 100, False) if predict is trained[1] else flow(predict, x)
        for n in COUNTS:
            errors = [((solve(predict, x, n, corrector) - exact) ** 2).mean(axis=1) for corrector in (False, True)]
            rms, median = (np.sqrt([f(e) for e in errors]) for f in (np.mean, np.median))
            cells.append(f"{rms[0]:.3f} x {rms[1] / rms[0]:.2f} ({median[1] / median[0]:.2f}) |")
        print(f"| {name} |", *cells, flush=True)


if __name__ == "__main__":
    main()
