"Ratings against choix, scipy, closed forms and published worked examples."
import choix
import numpy as np
import pytest
from scipy import optimize, stats
from recap.core import RecapError
from recap.ratings import ELO, agreement, bradley_terry, elo, equal_answers, rating_interval, rating_table, win_matrix, win_rates


def table(m, games, seed, spread=1.):
    "A table of wins of Bradley-Terry players, every pair met."
    rng = np.random.default_rng(seed)
    s, wins = spread * rng.normal(size=m), np.zeros((m, m))
    for i in range(m):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(s[j] - s[i])))
            wins[j, i] = games - wins[i, j]
    return wins


@pytest.mark.parametrize("m, games, spread", [(2, 30, 0.5), (4, 50, 1), (8, 20, 1), (20, 12, 1), (6, 4000, 3)])
def test_strengths_agree_with_choix(m, games, spread):
    wins = table(m, games, m, spread) + 0.5 * (1 - np.eye(m))     # half wins: ties
    ours = bradley_terry(wins)
    dense = choix.ilsr_pairwise_dense(wins, max_iter=1000)
    assert np.abs(ours - (dense - dense.mean())).max() < 1e-4
    assert ours.mean() == pytest.approx(0, abs=1e-12)


def test_strengths_agree_with_choix_mm_on_single_games():
    wins = table(5, 40, 3)
    pairs = [(i, j) for i in range(5) for j in range(5) for _ in range(int(wins[i, j]))]
    theirs = choix.mm_pairwise(5, pairs)
    assert np.abs(bradley_terry(wins) - (theirs - theirs.mean())).max() < 1e-4


def test_alpha_is_wins_added_to_every_pair():
    wins = np.array([[0, 9, 4], [0, 0, 5], [0, 2, 0.]])            # the first is unbeaten
    for alpha in (1e-6, 0.1, 2.):
        theirs = choix.ilsr_pairwise_dense(wins + alpha * (1 - np.eye(3)), max_iter=20000)
        assert np.abs(bradley_terry(wins, alpha) - (theirs - theirs.mean())).max() < 1e-4


def test_at_the_best_strengths_expected_wins_are_the_wins():
    "The condition for the maximum, on sparse tables that only just hang together, and on extreme ones."
    ring = np.roll(np.eye(7), 1, axis=1) * [3, 1, 4, 1, 5, 9, 2]
    for wins in (ring, ring + 1e-5 * (1 - np.eye(7)), 1e7 * ring + 1e-3 * (1 - np.eye(7)), np.array([[0, 1e6], [1, 0]])):
        s = bradley_terry(wins)
        p = 1 / (1 + np.exp(s[None] - s[:, None]))
        assert np.isfinite(s).all()
        assert ((wins + wins.T) * p).sum(1) == pytest.approx(wins.sum(1), rel=1e-6)


@pytest.mark.parametrize("wins, words", [
    ([[0, 2, 1], [0, 0, 3], [0, 1, 0]], ["a never lost to b, c"]),
    ([[0, 2, 1], [1, 0, 1], [0, 0, 0]], ["a, b never lost to c"]),
    ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], ["a, b and c were never compared"]),
    (np.zeros((3, 3)), ["never compared"]), ([[0]], ["two models"]), (np.ones((3, 3)), ["diagonal"]),
    ([[0, -1], [1, 0]], ["counts"]), ([[0, np.nan], [1, 0]], ["counts"]), (np.zeros((2, 3)), ["square"]),
])
def test_votes_that_place_no_one_are_refused_in_one_line(wins, words):
    with pytest.raises(RecapError) as e: bradley_terry(wins, names="abc")
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words)


@pytest.mark.parametrize("wins", [[[0, 2, 1], [0, 0, 3], [0, 1, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]], np.zeros((3, 3)), [[0, 1e9, 0], [0, 0, 1e9], [0, 0, 0]]])
def test_alpha_makes_every_table_finite(wins):
    for alpha in (1e-3, 1.): assert np.isfinite(bradley_terry(wins, alpha)).all()


def matches(n, seed, strengths=(0.8, 0.1, -0.9), ties=0.2):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        a, b = rng.choice(3, 2, replace=False)
        yield "abc"[a], "abc"[b], 0.5 if rng.random() < ties else float(rng.random() < 1 / (1 + np.exp(strengths[b] - strengths[a])))


def test_elo_minimises_the_papers_objective():
    votes = list(matches(200, 0))
    names, wins = win_matrix(votes)
    loss = lambda sigma: (wins * np.log10(1 + 10 ** ((sigma[None] - sigma[:, None]) / 400))).sum()
    found = optimize.minimize(loss, np.zeros(3), tol=1e-12).x
    assert [elo(votes)[n] for n in names] == pytest.approx(found - found.mean(), abs=0.05)


def test_a_gap_of_400_points_is_ten_to_one():
    assert elo([("x", "y", 1)] * 10 + [("y", "x", 1)])["x"] == pytest.approx(200)
    assert ELO * np.log(10) == pytest.approx(400)


def test_the_order_of_votes_and_of_names_in_a_vote_does_not_matter():
    votes = list(matches(80, 1))
    turned = [(b, a, 1 - s) for a, b, s in reversed(votes)]
    assert elo(votes) == pytest.approx(elo(turned))
    assert {k: v.mean for k, v in win_rates(votes).items()} == pytest.approx({k: v.mean for k, v in win_rates(turned).items()})


def test_intervals_have_the_width_that_fisher_information_gives():
    votes = list(matches(1500, 2, ties=0))
    names, wins = win_matrix(votes)
    s = bradley_terry(wins)
    p = 1 / (1 + np.exp(s[None] - s[:, None]))
    curve = (wins + wins.T) * p * p.T
    se = np.sqrt(np.diag(np.linalg.pinv(np.diag(curve.sum(1)) - curve)))
    found = rating_interval(votes, scale=1, n=2000)
    for name, error in zip(names, se): assert (found[name].hi - found[name].lo) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    strengths = np.array([0.8, 0.1, -0.9]) - np.mean([0.8, 0.1, -0.9])
    held = [i.lo <= strengths["abc".index(k)] <= i.hi for w in range(100) for k, i in rating_interval(list(matches(150, 100 + w, ties=0)), scale=1, n=200).items()]
    assert 0.9 <= np.mean(held) <= 0.985


def test_copied_votes_of_one_rater_are_no_more_evidence():
    votes = [v for v in matches(40, 5) for _ in range(10)]
    alone, by_rater = rating_interval(votes), rating_interval(votes, groups=np.arange(400) // 10)
    assert all(by_rater[n].hi - by_rater[n].lo > 2 * (alone[n].hi - alone[n].lo) for n in "abc")


def test_win_rate_interval_is_the_bootstrap_of_a_share():
    votes = [("x", "y", 1)] * 30 + [("x", "y", 0)] * 10
    peer = stats.bootstrap((np.repeat([1, 0], [30, 10]),), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    found = win_rates(votes, n=5000)["x"]
    assert found.mean == 0.75 and found.lo == pytest.approx(peer.low, abs=0.03) and found.hi == pytest.approx(peer.high, abs=0.03)


def test_krippendorffs_example():
    "Four observers, twelve units, gaps: 0.743 (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, part C)."
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    assert agreement([[None if c == "." else c for c in row] for row in rows]) == pytest.approx(0.743, abs=5e-4)


def test_krippendorffs_example_of_two_observers():
    "Two observers, ten units, yes or no: 0.095 (the same paper, part A)."
    assert agreement([list("0100000010"), list("1110010000")]) == pytest.approx(0.095, abs=5e-4)


def test_agreement_by_pairing_every_answer_with_every_other():
    "Alpha from its definition, one pair of answers at a time."
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (4, 30)).astype(float)
    rows[0] = rows[1]
    rows[rng.random(rows.shape) < 0.3] = np.nan
    units = [[v for v in rows[:, u] if v == v] for u in range(30)]
    units = [u for u in units if len(u) > 1]
    n = sum(map(len, units))
    seen = sum((x != y) / (len(u) - 1) for u in units for i, x in enumerate(u) for j, y in enumerate(u) if i != j) / n
    flat = [v for u in units for v in u]
    chance = sum(x != y for i, x in enumerate(flat) for j, y in enumerate(flat) if i != j) / (n * (n - 1))
    assert agreement(rows) == pytest.approx(1 - seen / chance)
    pairs = [(x, y) for u in units for i, x in enumerate(u) for y in u[:i]]
    assert equal_answers(rows) == pytest.approx(np.mean([x == y for x, y in pairs]))


def test_a_table_from_answers():
    raters, items, rows = rating_table([("r1", "p2", "A"), ("r2", "p1", "tie"), ("r1", "p1", "B")])
    assert (raters, items, rows) == (["r1", "r2"], ["p2", "p1"], [["A", "B"], [None, "tie"]])


@pytest.mark.parametrize("call", [
    lambda: agreement([["x", "x"], ["x", "x"]]), lambda: agreement([]), lambda: agreement([[1, 2], [1]]), lambda: elo([]),
    lambda: elo([("a", "a", 1)]), lambda: elo([("a", "b", float("nan"))]), lambda: rating_interval([("a", "b", 1)]),
    lambda: rating_interval([("a", "b", 1), ("a", "b", 0)], groups=[1]), lambda: rating_table([("r", "p", 1), ("r", "p", 2)]),
])
def test_refusals_are_one_line(call):
    with pytest.raises(RecapError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 20
