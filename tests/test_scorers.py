"The scorers: their parts against slow and plain versions, and the shipped ones against held-out pictures."
import random

import numpy as np
import pytest
import torch

from recap import scorers as sc
from recap.core import RecapError, foundation, keyed_rng, keyed_torch, read_json
from recap.drawing import COLOURS, nouns
from recap.reader import read_facts
from recap.world import KINDS, WORLDS, Scene, Thing, WorldConfig, facts_of, render, sample_scene, visible_scene

VOCAB, POSITIONS = sc.Vocabulary.of_world(), sc.POSITION_NAMES


def scenes(n, seed=300, **world): return [sample_scene(seed, i, WorldConfig(**world), split="scorer") for i in range(n)]


def whole(n, seed=300): return [sc.Shown.of(sample_scene(seed, i, WORLDS["whole"], split="scorer")) for i in range(n)]


def perfect(shown):
    "What a detector would say that knows the truth."
    target = sc.scene_targets([shown], VOCAB)
    sure = {k: np.eye(len(a))[target[k][0].clamp(min=0)] for k, a in (VOCAB.of_thing | VOCAB.of_scene).items()}
    return sure | {"x": target["x"][0].nan_to_num(0.5).numpy()}


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


def test_every_visible_fact_can_be_asked_and_told_from_a_lie():
    asked = dict.fromkeys(KINDS, 0)
    for i, s in enumerate(whole(300)):
        says = perfect(s)
        for f in facts_of(s.seen):
            asked[f[0]] += 1
            assert sc.fact_probability(says, f, VOCAB) > 0.5, (f, s)
        for f in sc.false_facts(s.seen, i): assert sc.fact_probability(says, f, VOCAB) <= 0.5, (f, s)
    assert min(asked.values()) > 10, asked


def test_cells_belong_to_what_is_painted_last():
    "A cell of a noun shows that noun's colour somewhere near its middle, unless the thing has holes."
    table, cat = Thing("table", "blue", "large", "middle"), Thing("cat", "red", "small", "middle", relation="on", other="table")
    cells = sc.cell_targets([sc.Shown(*[Scene("room", (table, cat), 1)] * 2), None], VOCAB)
    owners = [VOCAB.nouns[j] for j in cells["cell_noun"][0].tolist() if j < len(VOCAB.nouns)]
    assert {"table", "cat"} == set(owners)
    for j, c in zip(cells["cell_noun"][0].tolist(), cells["cell_colour"][0].tolist()):
        assert c == (VOCAB.colours.index({"table": "blue", "cat": "red"}[VOCAB.nouns[j]]) if j < len(VOCAB.nouns) else -1)
    assert (cells["cell_noun"][1] == len(VOCAB.nouns)).all() and (cells["cell_colour"][1] == -1).all()
    picture = np.asarray(render(Scene("room", (table, cat), 1))).astype(int)
    reds = np.argwhere((picture[..., 0] > 180) & (picture[..., 1:] < 90).all(-1))       # the cat's body
    at = cells["cell_noun"][0].view(8, 8)
    assert np.mean([VOCAB.nouns[int(at[y // 8, x // 8])] == "cat" for y, x in reds if at[y // 8, x // 8] < len(VOCAB.nouns)]) > 0.8


def test_what_is_hidden_or_cannot_be_told_is_not_asked():
    cat, cup = Thing("cat", "red", "large", "left"), Thing("cup", "blue", "small", "right", texture="striped", relation="behind", other="cat")
    drawn = Scene("room", (cat, cup))
    j, k = (VOCAB.nouns.index(n) for n in ("cat", "cup"))
    t = sc.scene_targets([sc.Shown(drawn, Scene("room", (cat,)))], VOCAB)
    assert t["count"][0, k] == -1 and t["count"][0, j] == 1 and t["relation"][0, j] == -1 and t["colour"][0, k] == -1
    many = Thing("cup", "", "small", "right", count=0, texture="")
    t = sc.scene_targets([sc.Shown(drawn, Scene("room", (cat, many)))], VOCAB)
    assert [int(t[h][0, k]) for h in ("count", "colour", "texture", "size")] == [5, -1, -1, 0]  # several; small
    t = sc.scene_targets([sc.Shown(drawn, drawn)], VOCAB)
    assert [("", *sc.STANDS)[int(t["relation"][0, i])] for i in (j, k)] == ["in front of", "behind"]
    sign = Thing("sign", "red", "large", "left", word="OPEN")
    unread = Scene("street", (Thing("sign", "red", "large", "left"),))
    t = sc.scene_targets([sc.Shown(Scene("street", (sign,)), unread), sc.Shown(unread, unread)], VOCAB)
    assert t["word"].tolist() == [-1, 0]


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
    probs = {k: np.full((n, len(a)), 1 / len(a)) for k, a in VOCAB.of_thing.items()} | {k: np.eye(len(a))[2] for k, a in VOCAB.of_scene.items()}
    probs |= {"count": np.eye(6)[[0] * n], "x": np.full(n, 0.5)}
    cat, dog, poodle, sign = (VOCAB.nouns.index(w) for w in ("cat", "dog", "poodle", "sign"))
    probs["count"][cat], probs["count"][dog] = [0.1, 0.2, 0.7, 0, 0, 0], [0.2, 0.8, 0, 0, 0, 0]
    probs["count"][poodle], probs["count"][sign] = [0.5, 0.5, 0, 0, 0, 0], [0.3, 0.7, 0, 0, 0, 0]
    probs["colour"][cat] = np.eye(11)[0]
    probs["x"][cat], probs["x"][dog] = 0.2, 0.8
    ask = lambda *f: sc.fact_probability(probs, f, VOCAB)
    assert ask("object", "cat") == pytest.approx(0.9) and ask("object", "ball") == 0
    assert ask("colour", "cat", "red") == pytest.approx(0.9) and ask("colour", "cat", "blue") == 0
    assert ask("count", "cat", "2") == pytest.approx(0.7) and ask("place", "street") == 1
    assert ask("family", "dog") == pytest.approx(1 - 0.2 * 0.5) and ask("family", "fruit") == 0
    assert ask("texture", "cat", "dotted") == pytest.approx(0.9 / 5) and ask("weather", "sunset") == 1 and ask("style", "outline") == 0
    assert ask("word", "sign", VOCAB.words[1]) == pytest.approx(0.7) and ask("word", "sign", VOCAB.words[0]) == 0
    assert ask("relation", "cat", "left of", "dog") == pytest.approx(0.72, abs=1e-4)
    assert ask("relation", "dog", "right of", "cat") == pytest.approx(0.72, abs=1e-4)
    assert ask("relation", "dog", "left of", "cat") < 1e-4
    probs["position"][cat] = probs["position"][dog] = [1, 0, 0]
    probs["relation"][cat], probs["relation"][dog] = (np.eye(10)[("", *sc.STANDS).index(r)] for r in ("on", "under"))
    assert ask("relation", "cat", "on", "dog") == ask("relation", "dog", "under", "cat") == pytest.approx(0.72)
    assert ask("relation", "dog", "on", "cat") == 0 and ask("relation", "cat", "next to", "dog") == 0
    probs["position"][dog] = [0, 0, 1]
    assert ask("relation", "cat", "on", "dog") == 0                      # two tables: another one
    for bad in (("object", "unicorn"), ("relation", "cat", "astride", "dog"), ("word", "sign", "XYZ"), ("family", "gods"), ("mood", "cat", "sad"), ("count", "cat", "9")):
        with pytest.raises(RecapError, match="does not know"): ask(*bad)


def test_truth_of_texts_is_set_inclusion():
    pool, index = scenes(15) + [s.seen for s in whole(15)], {}
    truths = [sc.implied(facts_of(s)) for s in pool]
    told = [read_facts(sc.people_text(s, 0, i)).facts for i, s in enumerate(pool)]
    shown_bits, told_bits = sc.fact_bits(truths, index), sc.fact_bits(told, index)
    shown, said = (sc._onehot(b, len(index)) for b in (shown_bits, told_bits))
    want = torch.tensor([[t <= p for t in told] for p in truths])
    assert torch.equal(sc.true_of(said, shown), want) and want.diagonal().all()


def test_a_text_may_name_the_family():
    poodle = Scene("snow", (Thing("poodle", "red", "small", "left", relation="on", other="table"), Thing("table", "brown", "large", "left")))
    shown = sc.implied(facts_of(poodle))
    for text in ("a red dog in the snow", "a red poodle in the snow", "a small dog on a table"): assert read_facts(text).facts <= shown, text
    for text in ("a red dachshund in the snow", "a blue dog in the snow", "a red poodle on a beach"): assert not read_facts(text).facts <= shown, text


def test_a_changed_scene_has_one_kind_of_wrong_fact():
    made = dict.fromkeys(KINDS, 0)
    brings = {"object": KINDS, "family": KINDS, "position": ("position", "relation"), "relation": ("relation", "position")}  # another noun brings all its facts along
    for i, s in enumerate([s.seen for s in whole(200)] + [visible_scene(s) for s in scenes(100)]):
        for kind in KINDS:
            if not (other := sc.change_one(s, keyed_rng(0, i, kind), kind)): continue
            new = facts_of(other) - facts_of(s)
            assert any(f[0] == kind for f in new) and {f[0] for f in new} <= set(brings.get(kind, (kind,))), (kind, new, s)
            families = [nouns()[t.noun].family for t in other.things]
            assert len(set(families)) == len(families) == len(s.things)
            assert [POSITIONS.index(t.position) for t in other.things] == sorted(POSITIONS.index(t.position) for t in other.things)
            made[kind] += 1
    assert min(made.values()) > 10, made


def test_what_stands_on_a_thing_stays_on_it():
    s = Scene("room", (Thing("table", "brown", "large", "left"), Thing("cat", "red", "small", "left", relation="on", other="table")))
    for i in range(40):
        other = sc.change_one(s, keyed_rng(3, i), "object")
        host, = (t.noun for t in other.things if not t.relation)
        assert [t.other for t in other.things if t.relation] == [host]
        turned = sc.change_one(s, keyed_rng(3, i), "relation")
        assert [t.relation for t in turned.things if t.relation] != ["on"] and sc.change_one(s, keyed_rng(3, i), "position") is None
    assert {sc.change_one(Scene("room", (Thing("poodle", "red", "small", "left"),)), keyed_rng(4, i), "object").things[0].noun for i in range(30)} <= {
        n for n, w in nouns().items() if w.family == "dog"} - {"poodle", "dog"}


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
    return [visible_scene(s) for s in pool], [render(s) for s in pool]


@pytest.fixture(scope="module")
def detector(): return sc.Detector.from_pretrained(foundation("detector"))


@pytest.fixture(scope="module")
def clip(): return sc.ClipScorer.from_pretrained(foundation("clip_scorer"))


def test_reliable_kinds_are_reliable(detector, held):
    kinds = read_json(foundation("detector")/"manifest.json")["quality"]["reliable_kinds"]
    assert set(kinds) >= {"object", "colour", "position", "place"}
    for view in (held[1], [sc.shrink_and_grow(p, 1.5) for p in held[1]], [sc.jpeg(p, 50) for p in held[1]]):
        got = sc.measure_detector(detector, view, held[0])
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
    assert got["first_of_ten"] > 0.8 and min(got["place"], got["object"], got["colour"]) > 0.85, got


def test_scorers_are_small_and_independent(detector, clip):
    for name, budget in (("detector", 8), ("clip_scorer", 6)):
        assert sum(f.stat().st_size for f in foundation(name).iterdir()) < budget * 2**20
    a, b = detector.eyes.trunk.state_dict(), clip.eyes.trunk.state_dict()
    for k in a:
        if a[k].ndim > 1: assert abs(torch.corrcoef(torch.stack([a[k].flatten(), b[k].flatten()]))[0, 1]) < 0.3
