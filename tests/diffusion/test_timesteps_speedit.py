"""SpeeDiT's published rule, its density, duals and their marginal, against numbers computed from its definition in NumPy.

In the comments S is the sum of the unnormalised density tanh(1e6 (g - 1e-4)) + 1.5, which lies in (0.5, 2.5).
"""

import numpy as np
import pytest

from speedit_jax.diffusion.schedules import even_steps, make_schedule, respace
from speedit_jax.diffusion.timesteps import make_strategy, meaningful_steps
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
