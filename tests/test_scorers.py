"The scorers: their parts against slow and plain versions, and the shipped ones against held-out pictures."
import random

import numpy as np
import pytest
import torch
from PIL import Image

from recap import scorers as sc
from recap.core import RecapError, foundation, keyed_rng, keyed_torch, read_json
from recap.language import read_facts
from recap.world import COLOURS, KINDS, Scene, Thing, WorldConfig, nouns, render, sample_scene, visible_facts

VOCAB = sc.Vocabulary.of_world()


def scenes(n, seed=300, **world): return [sample_scene(seed, i, WorldConfig(**world), split="scorer") for i in range(n)]


def test_pictures_in_any_form_are_one_batch():
    pil = [render(s) for s in scenes(3)]
    array = np.stack([np.asarray(p) for p in pil])
    want = sc.as_batch(pil)
    for form in (array, torch.as_tensor(array), array.transpose(0, 3, 1, 2), list(array), [p.convert("RGBA") for p in pil]):
        assert torch.equal(sc.as_batch(form), want)
    assert sc.as_batch([]).shape == (0, 3, 64, 64)
    big = sc.as_batch([render(scenes(1)[0], 256)])                       # a larger picture ends close to the small one
    assert (big[0].float() - want[0].float()).abs().mean() < 8
    for bad in (array / 255.0, array[..., :2], array[0]):
        with pytest.raises(RecapError): sc.as_batch(bad)


def test_boxes_are_where_the_pixels_change():
    "Paint a scene with and without its last thing: what changes lies in the boxes, or in the shadow below."
    for s in scenes(12, max_things=2, max_count=2):
        less = Scene(s.place, s.things[:-1], s.seed)
        changed = (np.asarray(render(s)).astype(int) != np.asarray(render(less)).astype(int)).any(-1)
        inside = np.zeros((64, 64), bool)
        for noun, colour, left, top, side in sc.thing_boxes(s):
            if (noun, colour) != (s.things[-1].noun, s.things[-1].colour): continue
            a, b = int(64 * top) - 1, int(64 * left) - 1
            inside[max(a, 0):a + int(64 * side * 1.15) + 4, max(b, 0):b + int(64 * side) + 4] = True
        assert changed.any() and not (changed & ~inside).any()
    assert len(sc.thing_boxes(Scene("room", (Thing("cat", "red", "large", "left", 3),), 1))) == 3


def test_targets_say_the_facts():
    for s in scenes(20, max_things=3, max_count=3, colours=11):
        t, told = sc.scene_targets([s], VOCAB), {("place", s.place)}
        for j, n in enumerate(VOCAB.nouns):
            if t["count"][0, j] <= 0: continue
            told |= {("object", n), ("colour", n, VOCAB.colours[t["colour"][0, j]]), ("size", n, sc.SIZE_NAMES[t["size"][0, j]]),
                     ("position", n, sc.POSITION_NAMES[t["position"][0, j]])}
            if t["count"][0, j] > 1: told.add(("count", n, str(int(t["count"][0, j]))))
        assert told == {f for f in visible_facts(s) if f[0] != "relation"}


def test_spoiling_is_keyed_bounded_and_leaves_its_input():
    x = sc.as_batch([render(s) for s in scenes(32)])
    before = x.clone()
    a, b, c = (sc.spoil(x, keyed_torch(k)) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, before)
    assert a.min() >= 0 and a.max() <= 1 and a.isfinite().all()
    blank, ask = sc.nothing(a, keyed_torch(2))
    assert blank.isfinite().all() and 0 <= blank.min() and blank.max() <= 1 and ask.any() and not ask.all()


def test_spoiling_keeps_colours_nameable():
    "Over all spoilings, a plain patch of each colour stays nearest to its own name."
    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    for i in range(len(rgb)):
        seen = 255 * sc.spoil(rgb[i].byte().view(1, 3, 1, 1).expand(64, 3, 64, 64), keyed_torch(i)).mean((2, 3))
        assert ((seen[:, None] - rgb).norm(dim=-1).argmin(1) == i).float().mean() > 0.95


def test_fact_probability_by_hand():
    n = len(VOCAB.nouns)
    probs = {"count": np.tile([1.0, 0, 0, 0], (n, 1)), "colour": np.full((n, 11), 1 / 11), "size": np.full((n, 2), 0.5),
             "position": np.full((n, 3), 1 / 3), "x": np.full(n, 0.5), "place": np.eye(7)[2]}
    cat, dog = VOCAB.nouns.index("cat"), VOCAB.nouns.index("dog")
    probs["count"][cat], probs["count"][dog] = [0.1, 0.2, 0.7, 0], [0.2, 0.8, 0, 0]
    probs["colour"][cat] = np.eye(11)[0]
    probs["x"][cat], probs["x"][dog] = 0.2, 0.8
    ask = lambda *f: sc.fact_probability(probs, f, VOCAB)
    assert ask("object", "cat") == pytest.approx(0.9) and ask("object", "ball") == 0
    assert ask("colour", "cat", "red") == pytest.approx(0.9) and ask("colour", "cat", "blue") == 0
    assert ask("count", "cat", "2") == pytest.approx(0.7) and ask("place", "street") == 1
    assert ask("relation", "cat", "left of", "dog") == pytest.approx(0.72, abs=1e-4)
    assert ask("relation", "dog", "right of", "cat") == pytest.approx(0.72, abs=1e-4)
    assert ask("relation", "dog", "left of", "cat") < 1e-4
    for bad in (("object", "unicorn"), ("mood", "cat", "sad"), ("count", "cat", "9")):
        with pytest.raises(RecapError, match="does not know"): ask(*bad)


def test_false_facts_are_false_and_of_their_kind():
    for i, s in enumerate(scenes(40, max_things=3, max_count=2)):
        truth = visible_facts(s)
        for f in sorted(truth):
            g = sc.false_fact(f, truth, keyed_rng(0, i))
            assert g not in truth and g[0] == f[0] and (f[0] in ("object", "place") or g[1] == f[1])


def test_truth_of_texts_is_set_inclusion():
    pool, index = scenes(30), {}
    truths = [visible_facts(s) for s in pool]
    told = [read_facts(sc.people_text(s, 0, i)).facts for i, s in enumerate(pool)]
    shown_bits, told_bits = sc.fact_bits(truths, index), sc.fact_bits(told, index)
    shown, said = (sc._onehot(b, len(index)) for b in (shown_bits, told_bits))
    want = torch.tensor([[t <= p for t in told] for p in truths])
    assert torch.equal(sc.true_of(said, shown), want) and want.diagonal().all()


def test_a_changed_scene_differs_in_one_thing():
    for i, s in enumerate(scenes(60)):
        other = sc.change_one(s, keyed_rng(0, i))
        changed = (s.place != other.place) + sum(getattr(a, k) != getattr(b, k) for a, b in zip(s.things, other.things)
                                                 for k in ("noun", "colour", "size", "position", "count"))
        assert changed == 1 and len({t.noun for t in other.things}) == len(other.things)


def test_clip_loss_against_loops():
    g = torch.Generator().manual_seed(0)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=-1)
    image, text, scale = unit(5 + 2), unit(5 + 3), torch.tensor(4.0)
    true = torch.rand(5, 8, generator=g) < 0.3
    true[range(5), range(5)] = True
    total = 0.0
    for i in range(5):
        rows = [j for j in range(8) if j == i or not true[i, j]]
        cols = [k for k in range(7) if k == i or k >= 5 or not true[k, i]]
        s = lambda a, b: float(scale * image[a] @ text[b])
        total += np.log(sum(np.exp(s(i, j)) for j in rows)) - s(i, i) + np.log(sum(np.exp(s(k, i)) for k in cols)) - s(i, i)
    assert float(sc.clip_loss(image, text, true, scale)) == pytest.approx(total / 10, rel=1e-4)


def test_training_is_a_function_of_the_seed_and_saves_what_it_uses(tmp_path):
    pool = sc.draw_scenes(24, 5, 0.5)
    pictures = sc.render_all(pool)
    cfg = sc.ScorerConfig(width=32, text_width=32, detector_steps=2, detector_batch=8, clip_steps=2, clip_batch=8, forms=1, dtype="no")
    state = random.getstate(), torch.random.get_rng_state()
    for train in (sc.train_detector, sc.train_clip):
        (a, la), (b, lb) = (train(pictures, pool, cfg, seed=4) for _ in range(2))
        assert la == lb and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        a.save_pretrained(tmp_path/type(a).__name__)
        again = type(a).from_pretrained(tmp_path/type(a).__name__)
        for k, v in a.state_dict().items(): assert torch.equal(v.half().float(), again.state_dict()[k])
    assert state[0] == random.getstate() and torch.equal(state[1], torch.random.get_rng_state())
    with pytest.raises(RecapError, match="holds a ClipScorer"): sc.Detector.from_pretrained(tmp_path/"ClipScorer")
    with pytest.raises(RecapError, match="make foundation"): sc.Detector.from_pretrained(tmp_path)


def test_a_long_text_is_cut_with_a_warning():
    tok = sc.clip_tokenizer(["a red cat on a beach"] * 3, 100)
    with pytest.warns(UserWarning, match="1 of 2 texts"): ids = sc.token_ids(tok, ["a cat", "cat " * 50], 10)
    assert ids.shape == (2, 10) and (ids[0] != 0).sum() == 3


# the shipped weights

@pytest.fixture(scope="module")
def held():
    pool = scenes(150, seed=4242)
    return pool, [render(s) for s in pool], [visible_facts(s) for s in pool]


@pytest.fixture(scope="module")
def detector(): return sc.Detector.from_pretrained(foundation("detector"))


@pytest.fixture(scope="module")
def clip(): return sc.ClipScorer.from_pretrained(foundation("clip_scorer"))


def test_reliable_kinds_are_reliable(detector, held):
    kinds = read_json(foundation("detector")/"manifest.json")["quality"]["reliable_kinds"]
    assert set(kinds) >= {"object", "colour", "position", "place"}
    for view in (held[1], [sc.shrink_and_grow(p, 1.5) for p in held[1]], [sc.jpeg(p, 50) for p in held[1]]):
        got = sc.measure_detector(detector, view, held[2])
        for k in set(kinds) & set(got): assert min(got[k].values()) > 0.87, (k, got[k])


def test_nothing_is_seen_in_nothing(detector):
    g = torch.Generator().manual_seed(1)
    flat = (255 * torch.rand(40, 3, 1, 1, generator=g)).byte().expand(40, 3, 64, 64)
    noise = (255 * torch.rand(40, 3, 64, 64, generator=g)).byte()
    for x in (flat, noise, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        assert (detector.read(x)["count"][..., 0] < 0.5).sum(1).mean() < 0.1


def test_an_empty_place_holds_no_things(detector):
    empty = [render(Scene(p, (), i)) for i, p in enumerate(VOCAB.places * 5)]
    assert (detector.read(empty)["count"][..., 0] < 0.5).sum(1).mean() < 0.1


def test_the_clip_finds_the_true_text(clip, held):
    got = sc.measure_clip(clip, held[1], held[0])
    assert got["first_of_ten"] > 0.8 and min(got["place"], got["noun"], got["colour"]) > 0.85, got


def test_scorers_are_small_and_independent(detector, clip):
    for name, budget in (("detector", 8), ("clip_scorer", 6)):
        assert sum(f.stat().st_size for f in foundation(name).iterdir()) < budget * 2**20
    a, b = detector.eyes.trunk.state_dict(), clip.eyes.trunk.state_dict()
    for k in a:
        if a[k].ndim > 1: assert abs(torch.corrcoef(torch.stack([a[k].flatten(), b[k].flatten()]))[0, 1]) < 0.3
