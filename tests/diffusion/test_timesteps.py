"""SpeeDiT's tables against numbers computed from its definition in NumPy, and its draws against its tables.

In the comments S is the sum of the unnormalised density tanh(1e6 (g - 1e-4)) + 1.5, which lies in (0.5, 2.5).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import integrate, stats

from speedit_jax.diffusion.flow import FlowMatching
from speedit_jax.diffusion.flow_timesteps import make_flow_strategy
from speedit_jax.diffusion.gaussian import PREDICTIONS
from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace
from speedit_jax.diffusion.timesteps import PRESETS, SAMPLINGS, WEIGHTINGS, TableStrategy, make_strategy, meaningful_steps
from speedit_jax.errors import UserError

MANY = 10**12  # an even batch so large that half of it is duals to twelve digits

LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("squaredcos_cap_v2", 1000)
QUAD = make_schedule("quad", 1000)


def respaced(schedule, count):
    return respace(schedule, even_steps(schedule.num_steps, count))


COLUMNS = {
    "linear_T1000": LINEAR,
    "cosine_T1000": COSINE,
    "quad_T1000": QUAD,
    "linear_respaced250": respaced(LINEAR, 250),
    "cosine_respaced250": respaced(COSINE, 250),
}

# p is the density, m the marginal with half of the draws duals, w the p2 weight; mass_p_below_M is over t < M, and so on.
NUMBERS = """
                 linear_T1000        cosine_T1000        quad_T1000          linear_respaced250  cosine_respaced250
T                1000                1000                1000                250                 250
M                642                 959                 829                 189                 248
M_thr5e5         700                 980                 882                 201                 249
sum_raw          1782.703604649      2416.511979803      2155.205441668      500.2916335033      619
p_hi             0.001402364360222   0.001034548978401   0.001159982223349   0.004997085364977   0.004038772213247
p_lo             0.0002804728720445  0.0002069097956802  0.0002319964446698  0.0009994170729955  0.0008077544426494
mass_p_below_M   0.899506084229      0.9915142407101     0.9603179936001     0.9390355585426     0.9983844911147
dual_max         642                 959                 829                 189                 248
m0               0.0008790699148075  0.0006219485568085  0.0007007931372802  0.002998251221319   0.002423263327948
mM               0.0008790699148075  0.0006219485568085  0.0007007931372802  0.002998251221319   0.002423263327948
m_last           0.0001402364360222  0.0001034548978401  0.0001159982223349  0.0004997085364977  0.0004038772213247
mass_m_below_M   0.9490518599344     0.9952398458658     0.9795790056884     0.9670192365888     0.9971728594507
mass_m_above_M   0.05006907015081    0.004138205577351   0.01972020117432    0.02998251218986    0.0004038772213247
mean_t_p         370.4718425782      482.9467157128      433.2994390656      101.1130951646      123.302907916
mean_t_marg      338.9230683887      479.6696660519      417.8720694375      96.32893324358      124.0008077544
w_min            9.999999999999e-05  4.128422482197e-05  9.999999999999e-05  9.999999999999e-05  4.128422482197e-05
w_max            0.9999596417023     0.9999999975712     0.9992665875404     0.9999596417023     0.9999999975712
w_mean_uniform   0.7244867666032     0.5044224874175     0.5773442714545     0.7238104293989     0.5044085878025
w_mean_p         0.6148319709369     0.487347774376      0.5104994492716     0.65516169696       0.4996054215951
w_mean_marg      0.5815059282293     0.4839429639443     0.4925236706497     0.6352014450003     0.5024318726354
alphabar_last    4.035829765376e-05  2.428766907035e-09  0.0007334124595808  4.035829765376e-05  2.428766907033e-09
m1               0.001218300553294   0.0008374143342838  0.0008599426500864  0.003498030679362   0.002827140549273
m10              0.001542600795928   0.001138003876241   0.001275980445018   0.005496793901475   0.004038772213247
m100             0.001542600796245   0.001034548978401   0.001275980445684   0.004997085364977   0.004038772213247
m_half_M         0.001542600796245   0.001034548978401   0.001159982223349   0.004997085364977   0.004038772213247
m_M_minus_20     0.001402364360222   0.001034548978401   0.001159982223349   0.004997085364977   0.004038772213247
"""


def column(name):
    header, *lines = NUMBERS.strip("\n").splitlines()
    i = header.split().index(name) + 1
    return {line.split()[0]: float(line.split()[i]) for line in lines}


@pytest.mark.parametrize("name", COLUMNS)
def test_published_rule_in_numbers(name):
    schedule = COLUMNS[name]
    strategy = make_strategy(schedule, "speedit")
    t = np.arange(schedule.num_steps)
    p, m, w, M = strategy.density, strategy.marginal(MANY), strategy.weights, strategy.pivot
    got = {
        "T": len(p),
        "M": M,
        "M_thr5e5": 1 + np.argmax(np.gradient(schedule.sigmas) < 5e-5),
        "sum_raw": 2.5 / p.max(),
        "p_hi": p[0],
        "p_lo": p[-1],
        "mass_p_below_M": p[:M].sum(),
        "dual_max": strategy.dual.max(),
        "m0": m[0],
        "mM": m[M],
        "m_last": m[-1],
        "mass_m_below_M": m[:M].sum(),
        "mass_m_above_M": m[M + 1 :].sum(),
        "mean_t_p": p @ t,
        "mean_t_marg": m @ t,
        "w_min": w.min(),
        "w_max": w.max(),
        "w_mean_uniform": w.mean(),
        "w_mean_p": p @ w,
        "w_mean_marg": m @ w,
        "alphabar_last": schedule.alphas_cumprod[-1],
        "m1": m[1],
        "m10": m[10],
        "m100": m[100],
        "m_half_M": m[M // 2],
        "m_M_minus_20": m[M - 20],
    }
    expected = column(name)
    assert got.keys() == expected.keys()
    # 1e6 in the density's exponent and abar_T near 1e-9 cost the last digits of float64.
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-9)
    np.testing.assert_allclose([p.sum(), m.sum()], 1, rtol=1e-12)
    # The duals are 0..M, all of them and no others.
    np.testing.assert_array_equal(np.unique(strategy.dual), np.arange(M + 1))


def test_the_edge_of_the_density_is_soft():
    gradient = np.gradient(LINEAR.sigmas)[[0, 640, 641, 642, 999]]
    np.testing.assert_allclose(gradient, [4.829293e-3, 1.00981358e-4, 9.98271951e-5, 9.86841116e-5, 4.118e-7], rtol=1e-4)
    p = make_strategy(LINEAR, "speedit").density
    raw = [2.499978, 2.499759, 2.497406, 2.473050, 2.253653, 1.328895, 0.634242, 0.514843, 0.501587, 0.500172, 0.500019, 0.500002]
    np.testing.assert_allclose(p[636:648] * 1782.7036046491744, raw, atol=1e-6)
    np.testing.assert_allclose(p[[0, 641, 642, 999]], [1.4023643602e-3, 7.45437904e-4, 3.55775469e-4, 2.8047287204e-4], rtol=1e-8)
    assert (p * 1782.7036046491744 > 1.5).sum() == 641
    np.testing.assert_allclose(
        [p[:642].sum(), p[642:].sum(), p[:700].sum()], [0.8995060842, 0.1004939158, 0.9158581384], atol=1e-9
    )


def test_duals_and_their_marginal():
    strategy = make_strategy(LINEAR, "speedit")
    np.testing.assert_array_equal(strategy.dual[[0, 1, 641, 642, 999]], [642, 641, 1, 0, 357])
    m, p, w = strategy.marginal(MANY), strategy.density, strategy.weights
    np.testing.assert_allclose(m[10:351], 1.542600796e-3, rtol=1e-6)  # 2.75 / S: drawn, dual of a low and of a high step
    np.testing.assert_allclose(m[358:631], 1.402364360e-3, rtol=1e-6)  # 2.5 / S: drawn, and dual of a low step
    np.testing.assert_allclose(m[[0, 1, 642, 643]], [8.790699148e-4, 1.218300553e-3, 8.790699148e-4, 1.443994e-4], rtol=1e-6)
    np.testing.assert_allclose(m[650:], 1.4023643602e-4, rtol=1e-4)  # 0.25 / S: drawn only
    masses = [m[1:358].sum(), m[358:638].sum(), m[638:642].sum()]
    np.testing.assert_allclose(masses, [0.550307, 0.392662, 0.005204], atol=1e-6)
    for density, divergence, effective in ((m, 0.273780, 0.706984), (p, 0.175896, 0.775817)):
        np.testing.assert_allclose(density @ np.log(1000 * density), divergence, atol=1e-6)
        np.testing.assert_allclose(1 / (1000 * density @ density), effective, atol=1e-6)
    effort = [0.00009, 0.04635, 0.16175, 0.53012, 0.9348, 1.29327, 1.37973, 0.14225, 0.14023]
    np.testing.assert_allclose((1000 * m * w)[[0, 50, 100, 200, 300, 500, 637, 643, 999]], effort, atol=5e-6)
    assert np.argmax(m * w) == 637


@pytest.mark.parametrize(
    "n, mass",
    [(1, 0.100138), (2, 0.100138), (3, 0.066759), (4, 0.075104), (7, 0.057222), (8, 0.062586), (32, 0.053198), (256, 0.050460)],
)
def test_the_marginal_depends_on_the_batch(n, mass):
    m = make_strategy(LINEAR, "speedit").marginal(n)
    np.testing.assert_allclose(m[643:].sum(), mass, atol=1e-6)
    np.testing.assert_allclose(m.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("n, at_500, at_100", [(7, 8.75, 9.5), (8, 8.0, 8.6), (32, 9.412, 10.294), (256, 9.922, 10.907)])
def test_suppression_depends_on_the_batch(n, at_500, at_100):
    m = make_strategy(LINEAR, "speedit").marginal(n)
    np.testing.assert_allclose([m[500] / m[900], m[100] / m[900]], [at_500, at_100], atol=1e-3)


def test_p2_weight_is_one_over_one_plus_snr():
    for schedule in COLUMNS.values():
        abar = schedule.alphas_cumprod
        np.testing.assert_allclose(make_strategy(schedule, "p2").weights, 1 / (1 + abar / (1 - abar)), rtol=1e-9)
    w = make_strategy(LINEAR, "p2").weights
    np.testing.assert_allclose(
        w[[100, 200, 300, 500, 700]], [0.10485841, 0.34365299, 0.60598888, 0.92220334, 0.99313172], atol=5e-9
    )


@pytest.mark.parametrize(
    "schedule, boundary, raw_sum, mass_p, mass_m",
    [
        (respaced(LINEAR, 100), 82, 212.00, 0.9575, 0.0200),
        (respace(LINEAR, range(0, 1000, 20)), 44, 111.01, 0.9730, 0.0113),
    ],
)
def test_published_rule_on_short_schedules(schedule, boundary, raw_sum, mass_p, mass_m):
    strategy = make_strategy(schedule, "speedit")
    assert strategy.pivot == boundary
    np.testing.assert_allclose(2.5 / strategy.density.max(), raw_sum, atol=5e-3)
    np.testing.assert_allclose(strategy.density[:boundary].sum(), mass_p, atol=6e-5)
    np.testing.assert_allclose(strategy.marginal(MANY)[boundary + 1 :].sum(), mass_m, atol=6e-5)


@pytest.mark.parametrize(
    "name, boundaries",
    [
        ("linear", {50: 41, 100: 80, 200: 153, 250: 187, 500: 349, 1000: 642, 2000: 1157, 4000: 2016}),
        ("squaredcos_cap_v2", {200: 199, 250: 248, 500: 490, 1000: 959, 2000: 1835, 4000: 3334}),
    ],
)
def test_meaningful_steps_of_native_schedules(name, boundaries):
    assert {steps: meaningful_steps(make_schedule(name, steps)) for steps in boundaries} == boundaries


@pytest.mark.parametrize("schedule, first, last", [(LINEAR, 12, 16), (QUAD, 81, 93), (COSINE, 107, 160)])
def test_a_dual_past_the_table_becomes_its_last_step(schedule, first, last):
    """Where M = N, the published dual(0) = N indexes past the end."""
    for count in range(first, last + 1):
        strategy = make_strategy(respaced(schedule, count), "speedit")
        assert strategy.pivot == count
        np.testing.assert_array_equal(strategy.dual, np.minimum(count - np.arange(count), count - 1))
        np.testing.assert_allclose(strategy.marginal(256).sum(), 1, rtol=1e-12)
    assert meaningful_steps(respaced(schedule, last + 1)) <= last
    with pytest.raises(UserError):
        meaningful_steps(respaced(schedule, first - 1))


@pytest.mark.parametrize(
    "schedule",
    [
        respaced(COSINE, 100),
        respace(COSINE, range(0, 1000, 20)),
        respace(QUAD, range(0, 1000, 20)),
        make_schedule("squaredcos_cap_v2", 100),
        make_schedule("squaredcos_cap_v2", 50),
    ],
    ids=lambda s: s.name,
)
def test_no_step_below_the_threshold_is_an_error_that_names_the_schedule(schedule):
    for keys in ({"strategy": "speedit"}, {"strategy": "p2", "sampling": "speedit"}, {"strategy": "uniform", "dual": True}):
        with pytest.raises(
            UserError, match=f"'{schedule.name}' with {schedule.num_steps} steps.*timesteps.strategy=speed_cvpr25"
        ):
            make_strategy(schedule, **keys)
    # The others do not need the rule.
    for strategy in ("uniform", "p2", "speed_cvpr25"):
        assert len(make_strategy(schedule, strategy).density) == schedule.num_steps


@pytest.mark.parametrize(
    "k, tau, high, low, below, above_with_dual",
    [
        (2, 700, 1.176471e-3, 5.88235e-4, 0.823529, 0.088235),
        (5, 700, 1.315789e-3, 2.63158e-4, 0.921053, 0.039474),
        (10, 700, 1.369863e-3, 1.36986e-4, 0.958904, 0.020548),
        (25, 700, 1.404494e-3, 5.6180e-5, 0.983146, 0.008427),
        (5, 500, 1.6667e-3, 1.6667e-3 / 5, 0.8333, 0.2025),
        (5, 600, 1.4706e-3, 1.4706e-3 / 5, 0.8824, 0.0904),
        (5, 800, 1.1905e-3, 1.1905e-3 / 5, 0.9524, 0.0238),
        (5, 900, 1.0870e-3, 1.0870e-3 / 5, 0.9783, 0.0109),
    ],
)
def test_asymmetric_sampling(k, tau, high, low, below, above_with_dual):
    strategy = make_strategy(LINEAR, "speed_cvpr25", k=k, tau=tau)
    p = strategy.density
    assert strategy.pivot is None
    np.testing.assert_allclose(p[:tau], k / (1000 + tau * (k - 1)), rtol=1e-12)
    np.testing.assert_allclose(p[tau:], 1 / (1000 + tau * (k - 1)), rtol=1e-12)
    np.testing.assert_allclose([p[0], p[-1]], [high, low], rtol=5e-5)
    np.testing.assert_allclose(p[:tau].sum(), below, atol=5e-5)
    # The published code pairs this density about SpeeDiT's M.
    paired = dataclasses.replace(strategy, pivot=642).marginal(MANY)
    np.testing.assert_allclose(paired[tau:].sum(), above_with_dual, atol=5e-5)


def test_asymmetric_sampling_paired_about_another_boundary():
    m = dataclasses.replace(make_strategy(LINEAR, "speed_cvpr25"), pivot=642).marginal(MANY) * 3800
    steps = {0: 5, 1: 7.5, 57: 7.5, 58: 5.5, 357: 5.5, 358: 5, 642: 5, 643: 2.5, 699: 2.5, 700: 0.5, 999: 0.5}
    np.testing.assert_allclose(m[list(steps)], list(steps.values()), rtol=1e-9)
    cosine = make_strategy(COSINE, "speed_cvpr25")
    np.testing.assert_allclose(cosine.marginal(256)[700:].sum(), 0.0789, atol=5e-5)
    np.testing.assert_allclose(dataclasses.replace(cosine, pivot=959).marginal(MANY)[700:].sum(), 0.2105, atol=5e-5)


def test_boundary_of_asymmetric_sampling_scales_with_the_schedule():
    p = make_strategy(make_schedule("linear", 250), "speed_cvpr25", k=5, tau=700).density
    np.testing.assert_allclose(p[174] / p[175], 5, rtol=1e-12)
    assert len(np.unique(p)) == 2


@pytest.mark.parametrize("lam, mean", [(0.5, 0.5), (0.6, 0.473713), (0.8, 0.421138), (1.0, 0.368563)])
def test_change_aware_weights(lam, mean):
    w = make_strategy(LINEAR, "speed_cvpr25", lam=lam).weights
    np.testing.assert_allclose([w.min(), w.max(), w.mean()], [1 - lam, lam, mean], atol=5e-7)
    if lam > 0.5:
        assert (np.argmax(w), np.argmin(w)) == (219, 999)
    # Linear in lambda: all follow from the weights of 1.
    np.testing.assert_allclose(w, 1 - lam + (2 * lam - 1) * make_strategy(LINEAR, "speed_cvpr25", lam=1).weights, atol=1e-12)


def test_change_aware_weights_of_the_default_lambda():
    strategy = make_strategy(LINEAR, "speed_cvpr25")
    w = strategy.weights
    expected = [0.40879, 0.53890, 0.6, 0.51577, 0.41472, 0.40720, 0.4]
    np.testing.assert_allclose(w[[0, 100, 219, 400, 640, 699, 999]], expected, atol=5e-6)
    # The paper's closed form: v ~ (beta_0 + D u) exp(-(beta_0 + D u / 2) t), u = t / T.
    t = np.arange(1000)
    v = (1e-4 + 0.0199 * t / 1000) * np.exp(-(1e-4 + 0.0199 * t / 2000) * t)
    np.testing.assert_allclose(w, 0.4 + 0.2 * (v - v.min()) / (v.max() - v.min()), atol=2e-3)
    effort = strategy.density * w
    np.testing.assert_allclose(effort[700:].sum() / effort.sum(), 0.064, atol=5e-4)


def test_min_snr_weights():
    w = make_strategy(LINEAR, "min_snr").weights
    np.testing.assert_allclose(w[[0, 100]], [5.0005e-4, 0.585709], rtol=2e-6)
    assert (w[130:] == 1).all() and (np.diff(w[:131]) > 0).all()
    # min(SNR, gamma) on the error of x0, which is SNR^-1/2 times that of the noise.
    snr = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
    np.testing.assert_allclose(make_strategy(LINEAR, "min_snr", gamma=1).weights, np.minimum(snr, 1) / snr, rtol=1e-12)
    # The paper's own forms for the others.
    np.testing.assert_allclose(make_strategy(LINEAR, "min_snr", prediction="x0").weights, np.minimum(snr, 5), rtol=1e-12)
    of_v = make_strategy(LINEAR, "min_snr", prediction="v").weights
    np.testing.assert_allclose(of_v, np.minimum(snr, 5) / (snr + 1), rtol=1e-12)
    assert np.argmax(of_v) == 130
    np.testing.assert_allclose(of_v[130], 0.832866, atol=5e-7)


def test_lognormal_is_the_nearest_step_of_a_normal_log_sigma():
    strategy = make_strategy(LINEAR, "lognormal")
    log_sigma = 0.5 * np.log(1 / LINEAR.alphas_cumprod - 1)
    drawn = np.random.default_rng(0).normal(-1.2, 1.2, 1_000_000)
    assert strategy.density.sum() == pytest.approx(1, abs=1e-12) and (strategy.density > 0).all()
    # The cumulative density against the normal's, at the borders between steps: a Kolmogorov-Smirnov distance of a million draws.
    borders = (log_sigma[1:] + log_sigma[:-1]) / 2
    empirical = np.searchsorted(np.sort(drawn), borders) / len(drawn)
    np.testing.assert_allclose(np.cumsum(strategy.density)[:-1], empirical, atol=2e-3)


SNR = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
NOISE = 1 / np.sqrt(SNR)  # EDM's sigma


def mse(prediction):
    """Of a network of that prediction whose image is off by one in every pixel: x_t is given, so that eps and v are off, too."""
    signal, sigma = np.sqrt(LINEAR.alphas_cumprod), LINEAR.sigmas
    eps = -signal / sigma
    return {"x0": np.ones(1000), "epsilon": eps**2, "v": (signal * eps - sigma) ** 2}[prediction]


@pytest.mark.parametrize("weighting", ["p2", "min_snr", "edm", "flow"])
def test_weights_of_an_error_minimise_the_same_whatever_is_predicted(weighting):
    losses = [make_strategy(LINEAR, "uniform", weighting=weighting, prediction=p).weights * mse(p) for p in PREDICTIONS]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-9)


@pytest.mark.parametrize(
    "strategy",
    ["uniform", "lognormal", "logit_normal", "laplace", "speed_cvpr25", "clts", "loss_second_moment", "gradient_noise"],
)
def test_factors_of_the_mse_are_the_same_whatever_is_predicted(strategy):
    weights = [make_strategy(LINEAR, strategy, prediction=p).weights for p in PREDICTIONS]
    np.testing.assert_array_equal(weights[1:], [weights[0]] * 2)


def test_p2_and_speedit_of_every_prediction():
    abar = LINEAR.alphas_cumprod
    for strategy in ("p2", "speedit"):
        for prediction, expected in (("epsilon", 1 - abar), ("x0", abar), ("v", abar * (1 - abar))):
            np.testing.assert_allclose(make_strategy(LINEAR, strategy, prediction=prediction).weights, expected, rtol=1e-12)


def test_edm_is_its_papers_weight_of_the_image():
    w = make_strategy(LINEAR, "lognormal", weighting="edm", prediction="x0", sigma_data=0.5).weights
    np.testing.assert_allclose(w, (NOISE**2 + 0.5**2) / (NOISE * 0.5) ** 2, rtol=1e-9)
    # Preconditioned by c_out = sigma sd / sqrt(sigma^2 + sd^2) the loss has weight one; for sd = 1 what is learned is -v.
    np.testing.assert_allclose(w * (NOISE * 0.5) ** 2 / (NOISE**2 + 0.5**2), 1, rtol=1e-12)
    of_v = make_strategy(LINEAR, "lognormal", weighting="edm", prediction="v", sigma_data=1.0).weights
    np.testing.assert_allclose(of_v, 1, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_flow_is_the_mse_of_the_velocity(prediction):
    # z = (1 - u) x0 + u eps of noise level u / (1 - u) is given; an image off by one makes eps off by -(1 - u) / u.
    u = NOISE / (1 + NOISE)
    velocity_error = (-(1 - u) / u - 1) ** 2
    w = make_strategy(LINEAR, "logit_normal", weighting="flow", prediction=prediction).weights
    np.testing.assert_allclose(w * mse(prediction), velocity_error, rtol=1e-9)
    if prediction == "v":
        assert w.min() >= 1 and w.max() <= 2


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.6, 1.2), (0.5, 0.6)])
def test_logit_normal_is_the_nearest_step_of_a_flows_time(mean, std):
    """The density of u, integrated between the times of the flow that lie half-way between two steps in log-SNR."""
    density = make_strategy(LINEAR, "logit_normal", logit_mean=mean, logit_std=std).density
    log_snr = np.log(SNR)
    between = np.exp(-(log_snr[1:] + log_snr[:-1]) / 4)  # noise levels
    edges = np.concatenate([[0], between / (1 + between), [1]])

    def of_u(u):
        return np.exp(-((np.log(u / (1 - u)) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * u * (1 - u))

    for t in (1, 20, 300, 640, 998):
        mass, _ = integrate.quad(of_u, edges[t], edges[t + 1], epsabs=0, epsrel=1e-10)
        np.testing.assert_allclose(density[t], mass, rtol=1e-9)
    assert density.sum() == pytest.approx(1, abs=1e-12)


def test_logit_normal_against_drawn_times():
    density = make_strategy(LINEAR, "logit_normal").density
    n = 400_000
    u = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal(n)))
    log_snr = 2 * np.log((1 - u) / u)
    nearest = np.abs(np.log(SNR)[:, None] - log_snr[None, :2000]).argmin(axis=0)
    middles = -(np.log(SNR)[1:] + np.log(SNR)[:-1]) / 2
    drawn = np.searchsorted(middles, -log_snr)
    np.testing.assert_array_equal(drawn[:2000], nearest)
    blocks = np.bincount(drawn // 20, minlength=50) / n
    expected = density.reshape(50, 20).sum(axis=1)
    often = n * expected > 30  # about normal
    assert expected[often].sum() > 0.999
    # Five standard errors of each block's frequency.
    assert (np.abs(blocks - expected) < 5 * np.sqrt(expected / n))[often].all()


@pytest.mark.parametrize("mean, scale", [(0.0, 0.5), (1.5, 2.0), (-3.0, 1.0)])
def test_laplace_is_the_nearest_step_of_a_laplace_log_snr(mean, scale):
    strategy = make_strategy(LINEAR, "laplace", laplace_mean=mean, laplace_scale=scale)
    density, log_snr = strategy.density, np.log(SNR)
    edges = np.concatenate([[np.inf], (log_snr[1:] + log_snr[:-1]) / 2, [-np.inf]])
    # scipy's law between the borders; from the side on which the difference of two numbers keeps its digits.
    law = stats.laplace(mean, scale)
    expected = np.where(log_snr > mean, law.sf(edges[1:]) - law.sf(edges[:-1]), law.cdf(edges[:-1]) - law.cdf(edges[1:]))
    np.testing.assert_allclose(density, expected, rtol=1e-9)
    assert density.sum() == pytest.approx(1, abs=1e-12) and (density > 0).all()
    # The paper's schedule draws from the same law: log-SNR of an even u is mu - b sgn(1/2 - u) log(1 - 2 |u - 1/2|).
    u = (np.arange(100_000) + 0.5) / 100_000
    drawn = mean - scale * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(u - 0.5))
    np.testing.assert_allclose(np.cumsum(density)[:-1], 1 - np.searchsorted(np.sort(drawn), edges[1:-1]) / len(u), atol=2e-5)


def test_laplace_draws_about_equal_signal_and_noise():
    strategy = make_strategy(LINEAR, "laplace")
    assert np.log(SNR)[np.argmax(strategy.density / -np.gradient(np.log(SNR)))] == pytest.approx(0, abs=0.01)
    # Within a factor of e in SNR lie 1 - e^-2 of the draws.
    assert strategy.density[np.abs(np.log(SNR)) < 1].sum() == pytest.approx(1 - math.exp(-2), abs=5e-3)
    flow = make_flow_strategy(FlowMatching("linear"), LINEAR, 256, strategy="laplace")
    of_flow = FlowMatching("linear").schedule.alphas_cumprod
    level = np.log(of_flow / (1 - of_flow))
    assert flow.density[np.abs(level) < 1].sum() == pytest.approx(1 - math.exp(-2), abs=5e-3)


@pytest.mark.parametrize("strategy", ["lognormal", "logit_normal"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, QUAD], ids=lambda s: s.name)
def test_no_tail_is_lost_to_rounding(schedule, strategy):
    density = make_strategy(schedule, strategy).density
    assert (density > 0).all()
    assert density.sum() == pytest.approx(1, abs=1e-12)
    mean, std = (-1.2, 1.2) if strategy == "lognormal" else (0, 1)
    log_sigma = -0.5 * np.log(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))
    np.testing.assert_allclose(density[-1], stats.norm.sf((log_sigma[-2:].mean() - mean) / std), rtol=1e-9)
    np.testing.assert_allclose(density[0], stats.norm.cdf((log_sigma[:2].mean() - mean) / std), rtol=1e-9)


@pytest.mark.parametrize(
    "key, value",
    [
        ("gamma", 0),
        ("gamma", np.inf),
        ("sigma_data", 0),
        *((f"{name}_std", 0) for name in ("log_sigma", "logit", "clts")),
        *((f"{name}_mean", np.nan) for name in ("log_sigma", "logit", "clts", "laplace")),
        ("clts_steps", 0),
        ("laplace_scale", 0),
        ("probe_every", 0),
    ],
)
def test_numbers_out_of_range(key, value):
    with pytest.raises(UserError, match=f"timesteps.{key}={value}"):
        make_strategy(LINEAR, "uniform", **{key: value})


UNFIXED = ("clts", "loss_second_moment", "gradient_noise")  # densities that are not one table


def parts(strategy):
    tables = [getattr(strategy, name).tobytes() for name in ("density", "first", "last") if hasattr(strategy, name)]
    sampling = (type(strategy).__name__, *tables)
    return {"sampling": sampling, "weighting": strategy.weights.tobytes(), "dual": getattr(strategy, "pivot", None)}


@pytest.mark.parametrize("strategy", PRESETS)
def test_presets_are_their_three_parts(strategy):
    sampling, weighting, dual = PRESETS[strategy]
    preset = make_strategy(LINEAR, strategy)
    spelled_out = make_strategy(LINEAR, "uniform", sampling=sampling, weighting=weighting, dual=dual)
    assert parts(preset) == parts(spelled_out)
    assert parts(preset) == parts(make_strategy(LINEAR, strategy, sampling=None, weighting=None, dual=None))


@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize(
    "part, value",
    [("sampling", v) for v in SAMPLINGS] + [("weighting", v) for v in WEIGHTINGS] + [("dual", v) for v in (False, True)],
)
def test_an_override_changes_only_its_part(strategy, part, value):
    before, chosen = make_strategy(LINEAR, strategy), dict(zip(("sampling", "weighting", "dual"), PRESETS[strategy], strict=True))
    chosen[part] = value
    if chosen["sampling"] in UNFIXED and chosen["dual"]:
        with pytest.raises(UserError, match=f"timesteps.dual .* timesteps.sampling={chosen['sampling']} has not"):
            make_strategy(LINEAR, strategy, **{part: value})
        return
    after = make_strategy(LINEAR, strategy, **{part: value})
    same = value == PRESETS[strategy][["sampling", "weighting", "dual"].index(part)]
    changed = {key for key in parts(before) if parts(before)[key] != parts(after)[key]}
    # The asymmetric density brings the pivot of its own boundary along.
    allowed = {"sampling", "dual"} if part == "sampling" and chosen["dual"] and value == "speed" else {part}
    assert changed == (set() if same else allowed)
    assert (before.name == after.name) == same
    assert same or f"{part}={value}" in after.name


def test_pivots():
    assert make_strategy(LINEAR, "uniform", dual=True).pivot == 642
    assert make_strategy(LINEAR, "speed_cvpr25", dual=True).pivot == 700
    assert make_strategy(LINEAR, "speed_cvpr25", dual=True, tau=500).pivot == 500
    # About its own boundary the pairing keeps the suppression.
    m = make_strategy(COSINE, "speed_cvpr25", dual=True).marginal(MANY)
    np.testing.assert_allclose(m[701:].sum(), 0.0789 / 2, atol=2e-4)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"strategy": "speedy"}, r"timesteps\.strategy 'speedy'.*uniform, p2, speedit, speed_cvpr25"),
        ({"sampling": "p2"}, r"timesteps\.sampling 'p2'.*uniform, speedit, speed"),
        ({"weighting": "speed"}, r"timesteps\.weighting 'speed'.*none, p2, change_aware"),
        ({"k": 0.5}, r"timesteps\.k=0\.5"),
        ({"k": float("inf")}, r"timesteps\.k=inf"),
        ({"k": float("nan")}, r"timesteps\.k=nan"),
        ({"tau": 0}, r"timesteps\.tau=0"),
        ({"tau": 1000}, r"timesteps\.tau=1000"),
        ({"lam": 0.4}, r"timesteps\.lam=0\.4"),
        ({"lam": 1.1}, r"timesteps\.lam=1\.1"),
    ],
)
def test_user_errors_name_the_key(keys, message):
    with pytest.raises(UserError, match=message):
        make_strategy(LINEAR, **({"strategy": "speed_cvpr25"} | keys))


PAIRED = [("speedit", {}), ("uniform", {"dual": True}), ("speed_cvpr25", {"dual": True})]
INDEPENDENT = [("uniform", {}), ("p2", {}), ("speed_cvpr25", {})]


@pytest.mark.parametrize(
    "n, strategy, keys",
    [(n, "speedit", {}) for n in (1, 2, 3, 7)] + [(256, *s) for s in PAIRED + INDEPENDENT + [("laplace", {})]],
)
def test_structure_of_a_draw(n, strategy, keys):
    strategy = make_strategy(LINEAR, strategy, **keys)
    state = strategy.init()
    t, weight, importance = jax.jit(strategy.sample, static_argnums=1)(jax.random.key(3), n, 7, state)
    assert t.shape == weight.shape == (n,)
    assert jnp.issubdtype(t.dtype, jnp.integer)
    assert weight.dtype == importance.dtype == jnp.float32
    np.testing.assert_array_equal(importance, 1)
    assert ((t >= 0) & (t < 1000)).all()
    np.testing.assert_array_equal(weight, strategy.weights.astype(np.float32)[t])
    if strategy.pivot is not None:
        drawn = n // 2 + 1
        np.testing.assert_array_equal(t[drawn:], strategy.dual[t[: n - drawn]])
    assert strategy.update(state, t, weight) == state == ()


def test_draws_depend_on_the_key_alone():
    strategy = make_strategy(LINEAR, "speedit")
    draw = lambda seed, step: np.asarray(strategy.sample(jax.random.key(seed), 64, step, ())[0])  # noqa: E731
    np.testing.assert_array_equal(draw(0, 0), draw(0, 5))
    assert (draw(0, 0) != draw(1, 0)).any()


@pytest.mark.parametrize("n, strategy, keys", [(256, *s) for s in PAIRED + INDEPENDENT] + [(7, *s) for s in PAIRED])
def test_drawn_frequencies_are_the_marginal(n, strategy, keys):
    """z-scores of all 1,000 counts over about 1.5 million draws.

    Bounds: were all normal, one beyond 5.5 has a chance of 1000 x 4e-8; the mean of z^2 is 1 with a standard deviation of
    sqrt(2 / 1000), or sqrt(4 / 1000) where the counts of t and dual(t) go together; 5 of the latter are 0.32.
    """
    strategy = make_strategy(LINEAR, strategy, **keys)
    batches = 1_500_000 // n
    sample = jax.jit(jax.vmap(lambda key: strategy.sample(key, n, 0, ())[0]))
    counts = np.bincount(np.asarray(sample(jax.random.split(jax.random.key(11), batches))).ravel(), minlength=1000)
    expected = batches * n * strategy.marginal(n)
    variance = expected.copy()
    if strategy.pivot is not None and strategy.pivot % 2 == 0:
        # The step that is its own dual is counted in twos.
        fixed = strategy.pivot // 2
        assert strategy.dual[fixed] == fixed
        variance[fixed] += 2 * batches * (n - n // 2 - 1) * strategy.density[fixed]
    z = (counts - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 5.5
    assert abs(np.mean(z**2) - 1) < 0.32


def test_the_draw_is_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    strategy, key = make_strategy(LINEAR, "speedit"), jax.random.key(0)
    draw = lambda key: strategy.sample(key, 64, 0, ())  # noqa: E731
    alone = jax.jit(draw)(key)
    sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec("data")))(key)
    assert len(sharded[0].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, sharded, alone)


def test_the_log_line_says_what_is_drawn():
    line = make_strategy(LINEAR, "speedit").describe(MANY)
    assert line == (
        "speedit: T=1000, E[t]=338.9, E[weight]=0.5815, density max/min=11, dual draw about 642, 5.1% of draws at t >= 642"
    )
    assert "dual" not in make_strategy(LINEAR, "uniform").describe(256)


def test_a_strategy_is_its_tables():
    strategy = TableStrategy("two", np.array([0.0, 1.0]), np.array([3.0, 4.0]))
    t, weight, _ = strategy.sample(jax.random.key(0), 5, 0, ())
    np.testing.assert_array_equal(t, 1)
    np.testing.assert_array_equal(weight, 4)
    np.testing.assert_array_equal(strategy.marginal(5), strategy.density)
