"FID, KID, CMMD and retrieval against torchmetrics, torch-fidelity and the definitions; Inception in the real format; fault 44."
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from recap.core import RecapError
from recap.distances import Inception, Moments, cmmd, fid, frechet, kid, moments, retrieval

pytestmark = pytest.mark.usefixtures("one_thread")


def clouds(n, d, seed=0, shift=0.3):
    "Two sets of features as networks give them: correlated, not negative, of very different scales."
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d) * rng.gamma(1, 1, d)
    return [np.maximum(rng.normal(size=(n, d)) @ mix + s, 0).astype(np.float32) for s in (0., shift)]


def by_torchmetrics(x, y, dtype=torch.float64):
    from torchmetrics.image.fid import FrechetInceptionDistance
    class Given(torch.nn.Module):
        num_features = x.shape[1]
        def forward(self, features): return features
    peer = FrechetInceptionDistance(Given()).set_dtype(dtype)
    for part in np.array_split(x, 3): peer.update(torch.tensor(part, dtype=dtype), real=True)
    peer.update(torch.tensor(y, dtype=dtype), real=False)
    return float(peer.compute())


def by_fidelity(x, y):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    return fid_statistics_to_metric(*(fid_features_to_statistics(torch.tensor(v)) for v in (x, y)), False)["frechet_inception_distance"]


@pytest.mark.parametrize("n, d, shift", [(500, 8, 0.3), (900, 64, 0.1), (1500, 256, 0.), (700, 300, 1.)])
def test_fid_agrees_with_torchmetrics_and_torch_fidelity(n, d, shift):
    x, y = clouds(n, d, d, shift)
    ours = fid(x, y)
    assert ours == pytest.approx(by_torchmetrics(x, y), abs=1e-3) and ours == pytest.approx(by_fidelity(x, y), abs=1e-3)


def test_fid_of_known_gaussians():
    "Diagonal covariances: sum of (mean difference)^2 + (difference of standard deviations)^2."
    a, b, rng = Moments(), Moments(), np.random.default_rng(0)
    a.n = b.n = 10**6
    a.mean, b.mean, s, t = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    a.spread, b.spread = np.diag(s**2) * (a.n - 1), np.diag(t**2) * (b.n - 1)
    assert frechet(a, b) == pytest.approx(((a.mean - b.mean)**2 + (s - t)**2).sum(), rel=1e-9)


def test_singular_covariances_agree_too():
    "A feature that never fires, one that is a copy, and fewer pictures than features."
    x, y = clouds(400, 32)
    for v in (x, y): v[:, 3], v[:, 4] = 0, v[:, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid(x, y) == pytest.approx(by_torchmetrics(x, y), abs=1e-3)
    with pytest.warns(UserWarning, match="20 pictures for 32 features"): few = fid(x[:20], y[:20])
    assert few == pytest.approx(by_torchmetrics(x[:20], y[:20]), abs=1e-3)


def test_fault_44_too_few_and_equal_sets():
    x, y = clouds(300, 16)
    with pytest.raises(RecapError, match="1 picture: a covariance needs two"): fid(x[:1], y)
    with pytest.raises(RecapError, match="no pictures"): fid(x[:0], y)
    with pytest.raises(RecapError, match="not a finite number"): fid(np.where(np.arange(300)[:, None] == 7, np.nan, x), y)
    with pytest.raises(RecapError, match="one extractor"): fid(x[:, :4], y)
    assert 0 <= fid(x, x) < 1e-6 and 0 <= cmmd(x, x) < 1e-9
    for n in (2, 3, 16, 17):                                            # fewer, as many, one more than features
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for pair in ((x[:n], y[:n]), (x[:n], x[:n]), (x[:n] * 0, x[:n] * 0), (x[:n] * 1e6, y[:n] * 1e-6)):
                value = fid(*pair)
                assert isinstance(value, float) and np.isfinite(value) and value >= 0
    with pytest.warns(UserWarning, match="2 pictures for 16 features"): assert fid(x[:2], x[:2]) < 1e-6
    with pytest.raises(RecapError, match="subset_size is 1000"): kid(x, y)
    with pytest.raises(RecapError, match="2 or more"): kid(x[:1], y[:1], subset_size=1)
    assert kid(x, x, subset_size=100)[0] == pytest.approx(0, abs=3 * kid(x, x, subset_size=100)[1])


def test_moments_in_any_batches_are_numpys():
    x = np.random.default_rng(0).normal(size=(101, 7)) * 1e-3 + 1e4
    for size in (1, 2, 33, 101, 500):
        m = Moments()
        for i in range(0, 101, size): m.add(x[i:i+size])
        assert m.n == 101 and m.mean == pytest.approx(x.mean(0), rel=1e-14) and np.allclose(m.cov, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-14)


def test_memory_does_not_grow_with_the_set():
    import tracemalloc
    peaks = []
    for n in (5, 50):
        tracemalloc.start()
        moments((np.zeros((32, 32, 3), np.uint8) + i % 7 for i in range(n * 64)), lambda p: np.stack([v.reshape(-1)[:40] for v in p]).astype(float), batch_size=64)
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_statistics_are_kept_as_pytorch_fid_keeps_them(tmp_path):
    x, y = clouds(200, 12)
    moments(x).save(tmp_path/"real.npz")
    with np.load(tmp_path/"real.npz") as f: assert np.allclose(f["mu"], x.mean(0)) and np.allclose(f["sigma"], np.cov(x.astype(float), rowvar=False))
    assert fid(Moments.load(tmp_path/"real.npz"), y) == pytest.approx(fid(x, y), rel=1e-9)
    np.savez(tmp_path/"published.npz", mu=x.mean(0).astype(float), sigma=np.cov(x.astype(float), rowvar=False))
    assert fid(Moments.load(tmp_path/"published.npz"), y) == pytest.approx(fid(x, y), abs=1e-5)
    np.savez(tmp_path/"other.npz", a=1)
    with pytest.raises(RecapError, match="holds a"): Moments.load(tmp_path/"other.npz")
    np.save(tmp_path/"pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RecapError, match="no statistics"): Moments.load(tmp_path/"pickle.npy")


def test_kid_agrees_with_both_libraries():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd
    x, y = clouds(260, 24)
    theirs = kid_features_to_metric(torch.tensor(x).double(), torch.tensor(y).double(), kid_subsets=20, kid_subset_size=50, kid_kernel="poly", kid_kernel_poly_degree=3,
                                    kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=7, verbose=False)
    assert kid(x, y, subsets=20, subset_size=50, seed=7) == pytest.approx(list(theirs.values()), rel=1e-9)
    assert kid(x, y, subsets=1, subset_size=260)[0] == pytest.approx(float(poly_mmd(torch.tensor(x).double(), torch.tensor(y).double())), rel=1e-9)


def test_cmmd_by_its_definition():
    x, y = (v + 0.1 for v in clouds(40, 6))
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x.astype(float), y.astype(float)))
    k = lambda p, q: np.mean([[np.exp(-((a - b)**2).sum() / (2 * 10**2)) for b in q] for a in p])
    assert cmmd(x, y) == pytest.approx(1000 * (k(u, u) + k(v, v) - 2 * k(u, v)), abs=1e-8)
    assert cmmd(np.repeat(x, 20, 0), np.repeat(y, 20, 0)) == pytest.approx(cmmd(x, y), rel=1e-9)          # over more than one block of rows


def test_retrieval_agrees_with_torchmetrics():
    from torchmetrics.functional.retrieval import retrieval_hit_rate
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(30, 8)), rng.normal(size=(75, 8))
    owner = np.concatenate([np.arange(30), rng.integers(0, 30, 45)])
    order = np.argsort(owner, kind="stable")
    owner, text = owner[order], text[order] + 1.2 * image[owner[order]]
    captions = [[f"{j}" for j in np.flatnonzero(owner == i)] for i in range(30)]
    class Given:
        def image_features(self, images): return image
        def text_features(self, texts): return np.stack([text[int(t)] for t in texts])
    ours, like = retrieval(range(30), captions, Given(), ks=(1, 3)), torch.tensor(image @ text.T)
    for k in (1, 3):
        assert ours[f"image->text R@{k}"] == pytest.approx(np.mean([float(retrieval_hit_rate(like[i], torch.tensor(owner == i), top_k=k)) for i in range(30)]))
        assert ours[f"text->image R@{k}"] == pytest.approx(np.mean([float(retrieval_hit_rate(like[:, j], torch.arange(30) == owner[j], top_k=k)) for j in range(75)]))


def test_retrieval_gives_nothing_to_a_model_that_says_one_thing():
    class Same:
        def image_features(self, images): return np.ones((len(images), 2))
        def text_features(self, texts): return np.ones((len(texts), 2))
    assert set(retrieval(range(20), [f"text {i}" for i in range(20)], Same()).values()) == {0.}


@pytest.mark.parametrize("call, words", [
    (lambda: retrieval([1, 2], ["a"]), "2 pictures for 1 captions"), (lambda: retrieval([1], [[]]), "picture 0 has no caption"), (lambda: retrieval([], []), "no pictures"),
    (lambda: retrieval([1], ["a"], long="window"), "refuse and truncate"), (lambda: cmmd(np.zeros((0, 3)), np.zeros((2, 3))), "no pictures"), (lambda: Moments().add(np.zeros(3)), "shape"),
])
def test_refusals_are_one_line(call, words):
    with pytest.raises(RecapError, match=words) as e: call()
    assert "\n" not in str(e.value)


def test_without_an_extractor_the_small_clip_looks():
    from recap.metrics import open_clip_scorer
    pictures = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    seen = open_clip_scorer(device="cpu").image_features(pictures)
    assert np.allclose(moments(pictures).mean, seen.mean(0), atol=1e-5) and cmmd(pictures[:3], pictures[3:]) == pytest.approx(cmmd(seen[:3], seen[3:]), abs=1e-4)
    assert np.allclose(moments(Image.fromarray(p) for p in pictures).mean, seen.mean(0), atol=1e-5)


# --- Inception

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Random weights under the names of torch-fidelity's file, batch norms with something to fold."
    from torchvision.models import inception_v3
    torch.manual_seed(0)
    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for v, low, high in ((m.running_mean, -0.2, 0.2), (m.running_var, 0.05, 0.4), (m.weight.data, 0.5, 1.5), (m.bias.data, -0.2, 0.3)): v.uniform_(low, high)
    torch.save(net.state_dict(), path := tmp_path_factory.mktemp("inception")/"weights.pth")
    return path


PICTURES = np.random.default_rng(1).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)


def test_inception_is_torch_fidelitys(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance
    x = torch.tensor(PICTURES).permute(0, 3, 1, 2)
    with torch.no_grad(): want = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))(x)[0].numpy()
    plain, fast = Inception(weights, "cpu", fast=False), Inception(weights, "cpu")
    assert want.shape == (2, 2048) and want.std(0).max() > 1e-3 and np.allclose(plain(PICTURES), want, rtol=0, atol=1e-6 * np.abs(want).max())
    got = fast(PICTURES)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-6
    mixed = fast([Image.fromarray(PICTURES[0]), Image.fromarray(PICTURES[1]).resize((30, 20))])         # sizes that differ
    assert np.allclose(mixed[0], got[0], atol=1e-5 * np.abs(got).max()) and np.abs(mixed[1] - got[1]).max() > 0
    smooth = Inception(weights, "cpu", antialias=True)
    peer = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(weights))                   # torchmetrics' default way to resize
    big = torch.randint(0, 256, (1, 3, 330, 330), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): want = peer.inception(big).numpy()
    assert np.linalg.norm(smooth(big) - want) / np.linalg.norm(want) < 2e-6


def test_inception_refuses_what_it_cannot_trust(weights, tmp_path):
    from safetensors.torch import save_file
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path/"weights.safetensors")
    assert Inception(tmp_path/"weights.safetensors", "cpu", fast=False)(PICTURES[:1]).shape == (1, 2048)
    torch.save({**state, "run": print}, tmp_path/"pickled.pth")
    with pytest.raises(RecapError, match="cannot be read safely"): Inception(tmp_path/"pickled.pth", "cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    with pytest.raises(RecapError, match="does not hold this Inception") as e: Inception(tmp_path/"other.pth", "cpu")
    assert "\n" not in str(e.value)
    with pytest.raises(RecapError, match="no weights here"): Inception(tmp_path/"none.pth")


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end(tmp_path):
    import json, subprocess, sys
    from conftest import ROOT, environment
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.metrics", "--quick", "--out", str(tmp_path/"metrics.json")], cwd=ROOT,
                          env=environment(ROOT, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, told = json.loads(done.stdout.strip().split("\n")[-1]), json.loads((tmp_path/"metrics.json").read_text())
    assert said["name"] == "metrics" and said["ratio"] == pytest.approx(said["ours"]/said["peer"], abs=1e-3)
    assert [c["name"] for c in told["cases"]] == ["frechet", "inception", "clip", "clip, four pictures a text"] and told["complete"] and told["quick"]
    for c in told["cases"]: assert max(c["difference"].values()) < 1e-3 and all(v > 0 for v in c["ratio"].values())
    assert {"provenance", "peers", "seed", "threads", "clock", "estimated"} <= set(told)
