r"""Gaussian diffusion: the forward process, what the network predicts of it, the reverse step and the training loss.

  (1)  x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                          DDPM eq. (4)
  (2)  the network predicts y: eps, or x_0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          v: arXiv 2202.00512
       from eps:  x0_hat = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_hat
       from x_0:  eps_hat = (x_t / sqrt(abar_t) - x0_hat) / sqrt(1 / abar_t - 1)
       from v:    x0_hat = sqrt(abar_t) x_t - sqrt(1 - abar_t) v_hat,  eps_hat = sqrt(1 - abar_t) x_t + sqrt(abar_t) v_hat
  (3)  log var_t = f log beta_t + (1 - f) log btilde_t,  f = (r + 1) / 2         IDDPM eq. (15), r the network's 2nd output
  (4)  mse = mean (y - y_hat)^2
  (5)  vb_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / log 2              t > 0, in bits per dimension
       vb_0 = -log p(x_0 | x_1) / log 2                                         discretised to 8 bits on [-1, 1]

  (6)  loss = w mse + vb  ("mse"),  w mse + (T / 1000) vb  ("rescaled_mse"),  w vb  ("kl")  or  w T vb  ("rescaled_kl")

w is the timestep strategy's weight. As in IDDPM the vb beside a mse, there only with a learned variance, trains nothing but the
variance: the mean enters it frozen. Alone, as "kl", it trains both, and the mean over uniform t of T vb is the bound, but for its
prior (likelihood.py). One error of the network is worth, in the mse of each prediction, mse_eps = SNR mse_x0 and
mse_v = (SNR + 1) mse_x0 with SNR = abar_t / (1 - abar_t).
All arrays are [B, ...]; t is [B] int and indexes the schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from speedit_jax.diffusion.schedules import Schedule
from speedit_jax.errors import UserError

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def mean_flat(x: jax.Array) -> jax.Array:
    """Mean over all but the batch axis: [B, ...] -> [B]."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def _at(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """table[t] in the dtype of `like`, shaped to broadcast against it."""
    return jnp.asarray(table, like.dtype)[t].reshape(t.shape + (1,) * (like.ndim - t.ndim))


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + jnp.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * jnp.exp(-logvar2))


def _discretized_log_likelihood(x, mean, log_scale):
    """log of the Gaussian's mass on the 8-bit bin around x in [-1, 1] (DDPM eq. 13), in nats.

    The normal CDF is Page's tanh approximation, as in the published code, so that losses can be compared.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    inv_scale = jnp.exp(-log_scale)
    upper = cdf(inv_scale * (x - mean + 1.0 / 255.0))
    lower = cdf(inv_scale * (x - mean - 1.0 / 255.0))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(mass.clip(min=1e-12))


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """Forward process, reverse step and losses over one schedule.

    Attributes:
      schedule: the noise levels, of training or, respaced, of sampling.
      variance: "learned_range" (the network has a second output for it), "fixed_small" (btilde) or "fixed_large" (beta).
      prediction: what the network's first output is: "epsilon", "x0" or "v", eq. (2).
      loss: one of LOSSES, eq. (6).
    """

    schedule: Schedule
    variance: str = "learned_range"
    prediction: str = "epsilon"
    loss: str = "mse"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise UserError(f"unknown diffusion.prediction {self.prediction!r}; choose one of {', '.join(PREDICTIONS)}")
        if self.variance not in VARIANCES:
            raise UserError(f"unknown diffusion.variance {self.variance!r}; choose one of {', '.join(VARIANCES)}")
        if self.loss not in LOSSES:
            raise UserError(f"unknown diffusion.loss {self.loss!r}; choose one of {', '.join(LOSSES)}")

    @property
    def learned_variance(self) -> bool:
        return self.variance == "learned_range"

    @property
    def bound_alone(self) -> bool:
        """Whether the loss has no mse."""
        return self.loss in ("kl", "rescaled_kl")

    @property
    def weighted(self) -> str:
        """What the strategy's weight multiplies."""
        return "the variational bound" if self.bound_alone else f"the mse of {self.prediction}"

    def draw_time(self, key: jax.Array, t: jax.Array) -> jax.Array:
        """Levels are times here; a flow draws its own within a level."""
        del key
        return t

    def less_noise(self, t: jax.Array, by: jax.Array) -> jax.Array:
        """The timesteps t [B], but `by` [B] of the whole schedule nearer to the data; whole steps, rounded down."""
        return (t - (by * self.schedule.num_steps).astype(t.dtype)).clip(0)

    def model_time(self, t: jax.Array) -> jax.Array:
        """What the network is told for step t."""
        return jnp.asarray(self.schedule.model_steps)[t]

    def schedule_index(self, model_time: jax.Array) -> jax.Array:
        """The step of training that the network is told about: itself, also in a respaced schedule."""
        return model_time

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t of eq. (1)."""
        return _at(np.sqrt(self.schedule.alphas_cumprod), t, x0) * x0 + _at(self.schedule.sigmas, t, x0) * noise

    def target(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """y of eq. (2), what the network is to predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        return _at(np.sqrt(self.schedule.alphas_cumprod), t, x0) * noise - _at(self.schedule.sigmas, t, x0) * x0

    def predict_x0(self, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """x0_hat of eq. (2) from eps."""
        abar = self.schedule.alphas_cumprod
        return _at(np.sqrt(1 / abar), t, x_t) * x_t - _at(np.sqrt(1 / abar - 1), t, x_t) * eps

    def predict_eps(self, x_t: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
        """The inverse of `predict_x0`."""
        abar = self.schedule.alphas_cumprod
        return (_at(np.sqrt(1 / abar), t, x_t) * x_t - x0) / _at(np.sqrt(1 / abar - 1), t, x_t)

    def posterior_mean(self, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Mean of q(x_{t-1} | x_t, x_0), schedules eq. (4)."""
        s = self.schedule
        return _at(s.posterior_mean_coef_x0, t, x_t) * x0 + _at(s.posterior_mean_coef_xt, t, x_t) * x_t

    def split_output(self, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Architecture output [..., C or 2C] -> (y_hat, r or None)."""
        if not self.learned_variance:
            return output, None
        prediction, r = jnp.split(output, 2, axis=-1)
        return prediction, r

    def predict_x0_and_eps(
        self, output: jax.Array, x_t: jax.Array, t: jax.Array, clip: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """(x0_hat, eps_hat) of eq. (2), each like x_t, whatever the network predicts.

        Args:
          output: [B, ..., C or 2C]; the variance's half, if any, is left alone.
          clip: clip x0_hat to [-1, 1], and let eps_hat be the noise that goes with the clipped one.
        """
        prediction, _ = self.split_output(output)
        if self.prediction == "epsilon":
            x0, eps = self.predict_x0(x_t, t, prediction), prediction
        elif self.prediction == "x0":
            x0, eps = prediction, self.predict_eps(x_t, t, prediction)
        else:
            signal, sigma = _at(np.sqrt(self.schedule.alphas_cumprod), t, x_t), _at(self.schedule.sigmas, t, x_t)
            x0, eps = signal * x_t - sigma * prediction, sigma * x_t + signal * prediction
        if clip:
            x0 = x0.clip(-1, 1)
            eps = self.predict_eps(x_t, t, x0)
        return x0, eps

    def log_variance(self, t: jax.Array, r: jax.Array | None, like: jax.Array) -> jax.Array:
        """log var of p(x_{t-1} | x_t), broadcastable to `like`: eq. (3), or the fixed ones."""
        s = self.schedule
        if self.variance == "fixed_small":
            return _at(s.posterior_log_variance_clipped, t, like)
        if self.variance == "fixed_large":
            # DDPM: the first entry is btilde_1, which gives a better decoder likelihood than beta_0.
            return _at(np.append(s.posterior_log_variance_clipped[0], np.log(s.betas[1:])), t, like)
        f = (r + 1) / 2
        return f * _at(np.log(s.betas), t, like) + (1 - f) * _at(s.posterior_log_variance_clipped, t, like)

    def p_mean_log_variance(
        self, output: jax.Array, x_t: jax.Array, t: jax.Array, clip: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """p(x_{t-1} | x_t) from the network's output.

        Args:
          output: [B, ..., C or 2C].
          clip: clip x0_hat to [-1, 1]; for pixels, not for latents.

        Returns:
          (mean, log variance, x0_hat), the second broadcastable to x_t.
        """
        x0, _ = self.predict_x0_and_eps(output, x_t, t, clip)
        _, r = self.split_output(output)
        return self.posterior_mean(x0, x_t, t), self.log_variance(t, r, x_t), x0

    def variational_bound(self, output: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, clip: bool = False) -> jax.Array:
        """vb_t of eq. (5), in bits per dimension, of the reverse step that `p_mean_log_variance` makes. [B]"""
        true_mean = self.posterior_mean(x0, x_t, t)
        true_log_variance = _at(self.schedule.posterior_log_variance_clipped, t, x_t)
        mean, log_variance, _ = self.p_mean_log_variance(output, x_t, t, clip)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll = mean_flat(-_discretized_log_likelihood(x0, mean, 0.5 * log_variance))
        return jnp.where(t == 0, nll, kl) / np.log(2.0)

    def losses(self, output: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Per-example training terms, each [B]: "mse", eq. (4), and where the loss has one "vb", eq. (5)."""
        prediction, r = self.split_output(output)
        terms = {"mse": mean_flat((self.target(x0, t, noise) - prediction) ** 2)}
        if self.bound_alone:
            terms["vb"] = self.variational_bound(output, x0, x_t, t)
        elif r is not None:
            frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), r], axis=-1)
            terms["vb"] = self.variational_bound(frozen, x0, x_t, t)
        return terms

    def objective(self, terms: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
        """What is minimised of the terms of `losses`, eq. (6). [B]"""
        num_steps = self.schedule.num_steps
        scale = {"mse": 1.0, "rescaled_mse": num_steps / 1000, "kl": 1.0, "rescaled_kl": num_steps}[self.loss]
        vb = scale * terms["vb"] if "vb" in terms else 0.0
        return weight * vb if self.bound_alone else weight * terms["mse"] + vb
