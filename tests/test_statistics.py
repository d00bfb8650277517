"Statistics against closed forms and scipy, which the library itself does not use."
import itertools
import numpy as np
import pytest
from scipy import stats
from recap.core import RecapError
from recap.statistics import bootstrap_mean, bootstrap_ratio, draw_weights, equivalent, holm, paired_difference, sign_flip_p


def test_mean_interval_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2, size=60)
    ours = bootstrap_mean(x, n=20000, seed=1)
    peer = stats.bootstrap((x,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    assert ours.mean == pytest.approx(x.mean())
    assert ours.lo == pytest.approx(peer.low, abs=0.02) and ours.hi == pytest.approx(peer.high, abs=0.02)


def test_ratio_interval_agrees_with_scipy():
    rng = np.random.default_rng(3)
    whole = rng.integers(1, 9, 80)
    part = rng.binomial(whole, 0.7)
    ours = bootstrap_ratio(part, whole, n=10000, seed=1)
    ratio = lambda p, w, axis=-1: p.sum(axis) / w.sum(axis)
    peer = stats.bootstrap((part, whole), ratio, paired=True, n_resamples=10000, method="percentile",
                           rng=np.random.default_rng(2)).confidence_interval
    assert ours.mean == pytest.approx(part.sum() / whole.sum())
    assert ours.lo == pytest.approx(peer.low, abs=0.01) and ours.hi == pytest.approx(peer.high, abs=0.01)


def test_nested_weights_have_the_closed_form_variance():
    "k groups of m: Var* = (between + within / m) / k, each the plug-in variance over its own level."
    rng = np.random.default_rng(4)
    k, m = 9, 5
    x = rng.normal(size=(k, 1)) + 0.5 * rng.normal(size=(k, m))
    w = draw_weights(k * m, [np.repeat(np.arange(k), m)], 40000, rng)
    want = (x.mean(1).var() + x.var(1).mean() / m) / k
    assert ((w @ x.ravel()) / (k * m)).var() == pytest.approx(want, rel=0.05)


def test_crossed_weights_have_the_closed_form_variance():
    "Independent multinomials: E[w w'] is a product over the two factors."
    rng = np.random.default_rng(5)
    k, m = 7, 4
    x = rng.normal(size=(k, 1)) + rng.normal(size=(1, m)) + 0.3 * rng.normal(size=(k, m))
    i, j = np.divmod(np.arange(k * m), m)
    w = draw_weights(k * m, [i, j], 60000, rng)
    second = lambda q: np.eye(q) + (1 - 1 / q)                     # E[c_a c_b] of multinomial(q, 1/q)
    want = x.ravel() @ np.kron(second(k), second(m)) @ x.ravel() / (k * m) ** 2 - x.mean() ** 2
    assert ((w @ x.ravel()) / (k * m)).var() == pytest.approx(want, rel=0.05)


def test_weights_keep_totals_with_unequal_groups():
    labels = np.array([0, 1, 1, 1, 2, 2])
    w = draw_weights(6, [labels], 500, np.random.default_rng(6))
    copies = np.stack([w[:, labels == g].sum(1) / (labels == g).sum() for g in range(3)], 1)
    assert (copies == copies.round()).all() and (copies.sum(1) == 3).all()
    assert w.mean(0) == pytest.approx(np.ones(6), abs=0.2)


@pytest.mark.parametrize("k", [5, 30])
def test_sign_flips_agree_with_scipy(k):
    d = np.random.default_rng(k).normal(0.3, 1, size=k)
    peer = stats.permutation_test((d, np.zeros(k)), lambda a, b: (a - b).mean(), permutation_type="samples",
                                  n_resamples=20000, rng=np.random.default_rng(0)).pvalue
    assert sign_flip_p(d, 20000, np.random.default_rng(1)) == pytest.approx(peer, abs=0.015)


def test_exact_flips_by_hand():
    d = [0.3, -0.1, 0.25, 0.4]
    ways = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=4)]
    want = sum(w >= abs(sum(d)) - 1e-12 for w in ways) / 16
    assert sign_flip_p(d, 1, np.random.default_rng(0)) == want


def test_groups_flip_together():
    "Copies of one prompt's difference are one piece of evidence, not ten."
    d = np.repeat([0.2, 0.1, 0.3], 10)
    alone, grouped = paired_difference(d, 0 * d), paired_difference(d, 0 * d, groups=np.repeat([0, 1, 2], 10))
    assert alone.p < 0.001 and grouped.p == 2 / 8
    assert grouped.hi - grouped.lo > alone.hi - alone.lo


def test_holm_against_its_definition():
    rng = np.random.default_rng(7)
    for _ in range(50):
        p = rng.uniform(0, 0.2, size=6)
        adjusted = holm(list(p))
        for alpha in (0.01, 0.05, 0.1, 0.3):                       # step down: stop at the first that fails
            rejected, order = set(), np.argsort(p)
            for rank, i in enumerate(order):
                if p[i] > alpha / (6 - rank): break
                rejected.add(int(i))
            assert rejected == {i for i in range(6) if adjusted[i] <= alpha}
    assert holm({"a": 0.01, "b": 0.5}) == {"a": 0.02, "b": 0.5}


def test_equivalence_agrees_with_two_one_sided_t_tests():
    "Schuirmann's test by scipy; the bootstrap's p against the larger of the two."
    for seed, margin in ((0, 0.35), (1, 0.25), (2, 0.3), (3, 0.5)):
        d = np.random.default_rng(seed).normal(0.1, 1, size=200)
        peer = max(stats.ttest_1samp(d, -margin, alternative="greater").pvalue, stats.ttest_1samp(d, margin, alternative="less").pvalue)
        ours = equivalent(d, margin, n=20000)
        assert ours.p == pytest.approx(peer, abs=0.012)
        lo, hi = stats.t.interval(0.9, 199, d.mean(), stats.sem(d))
        assert (ours.lo, ours.hi) == pytest.approx((lo, hi), abs=0.02)
        assert ours.same == (ours.lo > -margin and ours.hi < margin)


def test_no_difference_found_is_not_equivalence():
    d = np.random.default_rng(0).normal(0, 1, size=5)
    assert paired_difference(d, 0 * d).p > 0.05 and not equivalent(d, 0.2).same
    at_the_margin = [equivalent(np.random.default_rng(w).normal(0.3, 1, size=100), 0.3, n=400).same for w in range(200)]
    assert np.mean(at_the_margin) < 0.11                            # a true difference of just the margin passes about one time in twenty


def test_equivalence_over_groups_is_wider():
    d = np.repeat(np.random.default_rng(9).normal(0, 1, size=12), 10)
    alone, grouped = equivalent(d, 1), equivalent(d, 1, groups=np.repeat(np.arange(12), 10))
    assert grouped.hi - grouped.lo > 2 * (alone.hi - alone.lo)


def test_same_seed_same_interval_and_another_seed_another():
    x = np.random.default_rng(8).normal(size=40)
    assert bootstrap_mean(x, seed=3) == bootstrap_mean(x, seed=3) != bootstrap_mean(x, seed=4)


@pytest.mark.parametrize("call", [
    lambda: bootstrap_mean([]), lambda: bootstrap_mean([1, np.inf]), lambda: bootstrap_mean([1, 2], groups=[1]),
    lambda: bootstrap_ratio([0, 0], [0, 0]), lambda: bootstrap_ratio([1], [1, 2]), lambda: paired_difference([1], [1, 2]),
    lambda: bootstrap_mean([1, 2], groups=([0, 1], [0, 1], [0, 1])), lambda: holm([-0.1]),
    lambda: equivalent([0.1, 0.2], -1), lambda: equivalent([0.1], 1), lambda: equivalent([], 1), lambda: equivalent([1, 2], 1, groups=[1]),
])
def test_refusals_are_one_line(call):
    with pytest.raises(RecapError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 20
