"Decoding against references written apart from it: open_clip's own beam search, exhaustive search, the full forward pass of every kind of block."
import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from recap import decode
from recap.captioner import Loaded, captioner_config, captioner_tokenizer, make_captioner, plain_greedy
from recap.core import RecapError, keyed_torch
from recap.decode import Captioner, Decoder, Packed, beam, generate, greedy, sampler

PEERS = ROOT/".peers"/"transformers-4.55"


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n, seed=0, size=64): return torch.randn(n, 3, size, size, generator=keyed_torch(seed, "noise"))

def tiny(vocab, seed=0, context=32, **changes):
    cfg = captioner_config("tiny", vocab, context)
    for part, values in changes.items(): cfg[part].update(values) if isinstance(values, dict) else cfg.__setitem__(part, values)
    return make_captioner(cfg, seed).eval()

@torch.no_grad()
def last_scores(model, image, rows): # rows of equal length -> (rows, vocabulary)
    return model(image[None].expand(len(rows), -1, -1, -1), torch.tensor(rows), output_labels=False)["logits"][:, -1].double()


def open_clips_search(model, image, max_len, start, end, beams=6, groups=3, min_len=5):
    """One picture, told from what open_clip does: each group keeps its best beginnings by the sum of raw scores; of its 2 * size best ways on,
    an end among the first `size` puts the caption aside, the first `size` others go on; ranks are sums over lengths, start and end counted."""
    size, aside = beams//groups, []
    for _ in range(groups):
        rows, sums, done, kept = [[start] for _ in range(size)], [0.] + [-1e9]*(size - 1), False, []
        while not done and len(rows[0]) < max_len:
            scores = last_scores(model, image, rows)
            if len(rows[0]) < min_len: scores[:, end] = -np.inf
            ways = sorted(((sums[i] + s, i, t) for i in range(size) for t, s in enumerate(scores[i].tolist())), reverse=True)[:2*size]
            length, go = len(rows[0]) + 1, []
            for place, (total, i, t) in enumerate(ways):
                if t != end: go.append((total, rows[i] + [t]))
                elif place < size: kept = sorted(kept + [(total/length, rows[i], True)], key=lambda k: -k[0])[:size]
                if len(go) == size: break
            done = len(kept) == size and kept[-1][0] >= ways[0][0]/length
            sums, rows = [g[0] for g in go], [g[1] for g in go]
        if not done: kept = sorted(kept + [(s/len(r), r, False) for s, r in zip(sums, rows)], key=lambda k: -k[0])[:size]
        aside += kept
    return max(aside, key=lambda k: k[0])[1][1:]


WITH_ENDS = [(40, 1), (12, 7), (60, 5), (12, 8)]  # models whose captions hold an end or token 0

@pytest.mark.parametrize("vocab, seed, changes", [(90, 0, dict(text_cfg=dict(layers=2), multimodal_cfg=dict(layers=3))), *((v, s, {}) for v, s in WITH_ENDS)])
def test_legacy_search_is_open_clips(vocab, seed, changes):
    model, images = tiny(vocab, seed, **changes), noise(5, seed)[:3]
    want = [open_clips_search(model, im, 16, 2, 1) for im in images]
    assert [w.ids for w in beam(model, images, 16, legacy=True)] == want
    assert [w.ids for w in beam(model, images[:1], 16, beams=4, groups=1, legacy=True, min_len=0)] == [open_clips_search(model, im, 16, 2, 1, 4, 1, 0) for im in images[:1]]


def test_the_legacy_cases_hold_ends_and_token_zero():
    found = [w for v, s in WITH_ENDS for w in beam(tiny(v, s), noise(5, s)[:3], 16, legacy=True)]
    assert any(w.finished for w in found) and any(0 in w.ids[:-1] for w in found), "else the test above says nothing of them"


THERE = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[1] + "/tests")
from test_decode import noise, tiny
import transformers
assert transformers.__version__.startswith("4.55")
out = []
for vocab, seed in ((90, 0), (12, 7), (40, 1)):
    model, images = tiny(vocab, seed), noise(6, seed)
    how = dict(seq_len=20, max_seq_len=32, eos_token_id=1, sot_token_id=2)
    out.append([model.generate(images, **how).tolist(), model.generate(images, generation_type="top_k", top_k=1, **how).tolist()])
pickle.dump(out, open(sys.argv[2], "wb"))
"""

def test_open_clips_own_generate_in_its_own_environment(tmp_path):
    if not (PEERS/"transformers").is_dir(): pytest.skip("no .peers: `python -m benchmarks.decode --quick` makes it")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PEERS), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", THERE, str(ROOT), str(tmp_path/"out")], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    def cut(row, ends=(1,)): row = row[1:]; return row[:next((i for i, t in enumerate(row) if t in ends), len(row))]
    for (vocab, seed), (beams, best) in zip(((90, 0), (12, 7), (40, 1)), pickle.loads((tmp_path/"out").read_bytes())):
        model, images = tiny(vocab, seed), noise(6, seed)
        assert [w.ids for w in beam(model, images, 20, legacy=True)] == [cut(r) for r in beams]
        # greedy: it takes token 0 for an end too, and forces an end at place 20
        assert [cut([2, *w.ids], (0, 1)) for w in generate(model, images, 19, min_len=5)] == [cut(r, (0, 1)) for r in best]


@pytest.mark.parametrize("penalty", [0., 1., 2.])
def test_a_wide_search_finds_the_best_of_all_captions(penalty):
    model, images, vocab, max_len = tiny(6, 2), noise(3, 2), 6, 5
    for image, found in zip(images, beam(model, images, max_len, beams=6**3*2, length_penalty=penalty)):
        every = {}
        for n in range(max_len - 1):
            for ids in itertools.product([t for t in range(vocab) if t != 1], repeat=n): every[ids] = None
        by_length = {}
        for ids in every: by_length.setdefault(len(ids), []).append(ids)
        for n, group in by_length.items():
            rows = torch.tensor([[2, *ids, 1] for ids in group])
            with torch.no_grad(): logits = model(image[None].expand(len(rows), -1, -1, -1), rows)["logits"].double().log_softmax(-1)
            for ids, lp in zip(group, logits.gather(2, rows[:, 1:, None]).sum((1, 2)).tolist()): every[ids] = lp
        best = max(every, key=lambda ids: every[ids]/(len(ids) + 2)**penalty)
        assert tuple(found.ids) == best and abs(found.logprob - every[best]) < 1e-3 and found.finished


def test_diverse_groups_pay_for_the_tokens_of_earlier_ones():
    n, size, vocab = 2, 2, 300
    scores = torch.full((n*size, 384), -torch.inf); scores[:, :vocab] = torch.randn(n*size, vocab, generator=keyed_torch(0, "diverse"))
    state = decode._Beams(n, size, 9, (2,), "cpu"); state.sums[:] = torch.randn(n, size, generator=keyed_torch(1, "diverse"))
    logs = scores[:, :vocab].log_softmax(-1).view(n, size, vocab)
    taken = [logs[:, 0].argmax(-1), logs[:, 1].argmax(-1)]
    want = state.sums[:, :, None] + logs
    paid = want.clone()
    for t in taken: paid[torch.arange(n), :, t] -= 1.5
    where = paid.flatten(1).topk(2*size).indices
    sums, logprob, parents, tokens = decode._candidates(state, decode._nearest(scores[:, :vocab], 2*size + len(taken)), False, taken, 1.5)
    assert torch.equal(parents*vocab + tokens, where) and torch.allclose(sums, want.flatten(1).gather(1, where), atol=1e-5)
    together, apart = (beam(tiny(90), noise(4), 20, beams=4, groups=4, diversity=d) for d in (1e-6, 50.))
    assert [w.ids for w in together] == [w.ids for w in beam(tiny(90), noise(4), 20, beams=1)] and len(apart) == 4


BLOCKS = {
    "layer scale": dict(text_cfg=dict(ls_init_value=.5), multimodal_cfg=dict(ls_init_value=.3)),
    "attentional pool": dict(vision_cfg=dict(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=9)),
    "quick gelu": dict(quick_gelu=True),
    "norms on queries and keys": dict(text_cfg=dict(qk_norm=True)),
    "scaled heads": dict(text_cfg=dict(scale_heads=True)),
    "all norms": dict(text_cfg=dict(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, ls_init_value=.7)),
    "no class token": dict(text_cfg=dict(embed_cls=False)),
    "class mask in its right place": {},
    "more heads in the decoder": dict(multimodal_cfg=dict(heads=4, layers=2)),
}

@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_block_scores_as_the_full_forward(kind):
    model = tiny(150, 1, **BLOCKS[kind])
    if "right place" in kind: model.text.correct_cls_mask = True
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim <= 1 or "scale" in name: p.add_(.3*torch.randn(p.shape, generator=keyed_torch(1, name)))   # biases, norms and gains that are not 0 and 1
        images, tokens = noise(3), torch.randint(0, 150, (3, 32), generator=keyed_torch(0, "tokens"))
        tokens[:, 0] = 2; tokens[:, 1:] = tokens[:, 1:].where(tokens[:, 1:] % 5 > 0, 0)
        full = model(images, tokens, output_labels=False)["logits"]
        decoder = Decoder(model, images, 32)
        steps = torch.stack([decoder.step(t) for t in tokens.T], 1)
    assert torch.allclose(full, steps, atol=2e-4, rtol=1e-4)


def test_what_cannot_be_remembered_is_refused():
    with pytest.raises(RecapError, match="causal"): Packed(tiny(30, text_cfg=dict(no_causal_mask=True)))
    with pytest.raises(RecapError, match="places"): generate(tiny(30), noise(1), 33)
    with pytest.raises(RecapError, match="prefix"): generate(tiny(30), noise(1), 6, prefix=(3, 4, 5, 6, 7))


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_open_clips_configurations_with_fewer_layers(name):
    import open_clip
    cfg = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"): cfg[part]["layers"] = 1
    model = make_captioner(cfg, 0).eval()
    images = noise(2, size=224)
    written = generate(model, images, 8, 49406, 49407, min_len=8)
    assert [w.ids for w in written] == [r[:7] for r in plain_greedy(model, images, 49406, -1, 8)]


def test_beams_share_one_notebook_and_read_only_their_own_past():
    model, images = tiny(80, 4), noise(2, 4)
    decoder, rows, r = Decoder(model, images, 20, rows=3, shared=True), [[[2]]*3]*2, keyed_torch(0, "moves")
    newest = torch.full((6,), 2)
    for _ in range(12):
        got = decoder.step(newest).view(2, 3, -1).double()
        want = torch.stack([last_scores(model, im, rs) for im, rs in zip(images, rows)])
        assert torch.allclose(got, want, atol=1e-4)
        parents, tokens = torch.randint(0, 3, (2, 3), generator=r), torch.randint(0, 80, (2, 3), generator=r)
        tokens[tokens % 4 == 0] = 0
        decoder.move(parents)
        rows = [[rows[i][parents[i, k]] + [int(tokens[i, k])] for k in range(3)] for i in range(2)]
        newest = tokens.flatten()


def test_a_decoder_starts_again_as_new():
    packed = Packed(tiny(80, 4))
    decoder, tokens = Decoder(packed, noise(3, 1), 20, rows=2, shared=True), torch.randint(0, 80, (10, 6), generator=keyed_torch(0, "again"))
    for t in tokens: decoder.step(t); decoder.move(torch.tensor([[1, 0], [0, 0], [1, 1]]))
    decoder.restart(noise(3, 2))
    fresh = Decoder(packed, noise(3, 2), 20, rows=2, shared=True)
    for t in tokens: assert torch.equal(decoder.step(t), fresh.step(t))


def test_copies_look_at_the_picture_once():
    model, images, seen = tiny(90), noise(4), []
    hook = model.visual.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    many = generate(model, images, 20, copies=50, pick=sampler(keyed_torch(0, "many")))
    hook.remove()
    assert seen == [4] and len(many) == 200
    p = last_scores(model, images[0], [[2]])[0].softmax(-1)
    many = generate(model, images[:1], 2, copies=4000, pick=sampler(keyed_torch(0, "first")))
    counts = torch.bincount(torch.tensor([w.ids[0] if w.ids else 1 for w in many]), minlength=90)
    assert float(((counts - 4000*p)**2/(4000*p)).sum()) < 150, "chi-squared of 89 degrees of freedom: above 150 once in 10,000"


def test_prefix_lengths_and_probability():
    model, images = tiny(90, 7), noise(4, 7)
    for w, image in zip(generate(model, images, 30, prefix=(5, 0, 9), min_len=12), images):
        row = torch.tensor([[2, 5, 0, 9, *w.ids] + [1]*w.finished])
        with torch.no_grad(): logits = model(image[None], row)["logits"][0].double()
        assert abs(logits.log_softmax(-1).gather(1, row[0, 1:, None])[3:].sum().item() - w.logprob) < 1e-3
        assert len(w.ids) + 4 >= 12
        logits[:11, 1] = -np.inf    # no end while fewer than 12 tokens stand
        assert all(logits[i].max() - logits[i, row[0, i + 1]] < 1e-4 for i in range(3, row.shape[1] - 1))


def test_any_way_of_choosing_gets_the_scores_that_greedy_sees():
    model, images = tiny(1000, 1), noise(5, 1)
    assert [w.ids for w in generate(model, images, 24, pick=lambda s: s.argmax(-1))] == [w.ids for w in generate(model, images, 24, pick=greedy)]


@pytest.mark.parametrize("copies, spread, doubted", [(1, 0., False), (12, 2e-3, False), (100, 2e-3, True)])
def test_the_draft_changes_no_token(monkeypatch, copies, spread, doubted):
    """Tokens of almost the same weights, whose order bfloat16 does not know; with 100 of them the candidates prove nothing."""
    monkeypatch.setattr(decode, "_quick_bf16", lambda: True)
    model, images, settle, seen = tiny(9000, 6), noise(4, 6), Decoder.settle, []
    with torch.no_grad():
        w, r = model.text_decoder.text_projection, keyed_torch(0, "copies")
        w.copy_(w[:, torch.arange(9000)//copies]*(1 + spread*torch.randn(9000, generator=r)))
    def watched(self, h, ban=None, k=1):
        known = self.drafts[:len(h), :9000].argmax(-1)
        before, found = self.doubts, settle(self, h, ban, k)
        seen.append((len(h), self.doubts - before, int((known != found[1][:, 0]).sum())))
        return found
    monkeypatch.setattr(Decoder, "settle", watched)
    written, plain = generate(model, images, 24, end=1, min_len=24), plain_greedy(model, images, end=-1, max_len=24)
    rows, doubts, changed = map(sum, zip(*seen))
    assert [w.ids for w in written] == plain and (doubts > rows/2) == doubted and changed > 0
    for im, w in zip(images, written):
        row = torch.tensor([[2, *w.ids]])
        with torch.no_grad(): logs = model(im[None], row, output_labels=False)["logits"][0].double().log_softmax(-1)
        assert abs(logs[:-1].gather(1, row[0, 1:, None]).sum().item() - w.logprob) < 1e-3*len(w.ids)


def test_the_draft_obeys_the_ban(monkeypatch):
    monkeypatch.setattr(decode, "_quick_bf16", lambda: True)
    packed, x = Packed(tiny(9000, 6)), torch.randn(5, 64, generator=keyed_torch(0, "states"))
    decoder = Decoder(packed, noise(5), 4)
    first, _ = decode._choose(decoder.vocabulary(x), greedy)
    for ban in first.tolist():
        (a, p), (near, b, total) = decode._choose(decoder.vocabulary(x), greedy, ban), decoder.settle(decoder.draft(x), ban)
        assert torch.equal(a, b[:, 0]) and torch.allclose(p, near[:, 0] - total, atol=5e-3) and ban not in b


@pytest.mark.parametrize("copies", [1, 30])
def test_beams_by_the_draft_are_those_of_the_whole_product(monkeypatch, copies):
    """The same captions and sums with the draft and without, also where many tokens have almost the same weights."""
    model, images, seen = tiny(9000, 6), noise(4, 6), []
    with torch.no_grad():
        w, r = model.text_decoder.text_projection, keyed_torch(0, "copies")
        w.copy_(w[:, torch.arange(9000)//copies]*(1 + .003*torch.randn(9000, generator=r)))
    for quick in (True, False):
        monkeypatch.setattr(decode, "_quick_bf16", lambda: quick)
        packed = Packed(model)
        assert bool(packed.draft) == quick
        seen.append([beam(packed, images, 14, end=1, beams=b, legacy=legacy, min_len=9) for b, legacy in ((6, True), (3, False))])
    for a, b in zip(*seen):
        assert [w.ids for w in a] == [w.ids for w in b] and all(abs(x.logprob - y.logprob) < 5e-3*len(x.ids) for x, y in zip(a, b))


def test_bfloat16_is_close_and_leaves_the_model_alone():
    model, images = tiny(500, 3), noise(8, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    half, tokens = Packed(model, torch.bfloat16), torch.randint(3, 500, (12, 8), generator=keyed_torch(0, "half"))
    one, two = Decoder(model, images, 20), Decoder(half, images, 20)
    a, b = (torch.stack([d.step(t) for t in tokens]) for d in (one, two))
    assert .001 < ((a - b).std()/a.std()).item() < .03
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pictures_of_every_kind(tmp_path):
    words = captioner_tokenizer(["a red cat on the beach", "in short:", "in full:"]*3, 300)
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size(), 20)
    c = Captioner(Loaded(make_captioner(cfg), words, dict(model_cfg=cfg), {}), device="cpu")
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    pictures = [rgb.convert(m) for m in ("1", "L", "LA", "P", "RGBA", "CMYK", "HSV", "YCbCr", "I", "F")] + [Image.fromarray(np.full((9, 7), 40_000, dtype=np.uint16))]
    file = io.BytesIO(); rgb.save(file, "PNG"); (tmp_path/"a.png").write_bytes(file.getvalue())
    same = [rgb, np.asarray(rgb), torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1), file.getvalue(), tmp_path/"a.png", str(tmp_path/"a.png")]
    assert len({r["logprob"] for r in c.caption_rows(same, batch_size=1)}) == 1
    rows = [c.caption_rows(pictures + same, batch_size=b) for b in (1, 4, 64)]
    assert [[r["caption"] for r in found] for found in rows[1:]] == [[r["caption"] for r in rows[0]]]*2 and len(rows[0]) == 17
    assert c.caption([]) == c.caption(np.zeros((0, 64, 64, 3), dtype=np.uint8)) == [] and c.styles == []
    with pytest.raises(RecapError, match="beams"): c.caption(pictures, diversity=1.)
    with pytest.raises(RecapError, match="one caption"): c.caption(pictures, beams=2, copies=2)


def test_pictures_are_prepared_as_the_configuration_says():
    words = captioner_tokenizer(["a red cat on the beach"]*3, 300)
    cfg, seen = captioner_config("tiny", words.tokenizer.get_vocab_size(), 20), []
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    for pre in ({}, dict(resize_mode="shortest", interpolation="bilinear", mean=(.4, .5, .6), std=(.2, .3, .4))):
        loaded = Loaded(make_captioner(cfg), words, dict(model_cfg=cfg, preprocess_cfg=pre), {})
        c = Captioner(loaded, device="cpu")
        hook = loaded.model.visual.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
        c.caption_rows([wide], max_len=3); hook.remove()
    from recap.captioner import as_pixels, normalise
    assert torch.equal(seen[0], normalise(as_pixels([wide], 64))) and torch.equal(seen[1], normalise(as_pixels([wide], 64, "shortest", "bilinear"), (.4, .5, .6), (.2, .3, .4)))


def test_styles_are_called_up_by_their_prefix():
    words = captioner_tokenizer(["a red cat on the beach", "in short:", "in full:"]*3, 300)
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size(), 30)
    model, x = make_captioner(cfg).eval(), [Image.new("RGB", (64, 64), "red")]
    c = Captioner(Loaded(model, words, dict(model_cfg=cfg), {"styles": {"short": "in short:", "long": "in full:"}}), device="cpu")
    for style, text in (("short", "in short:"), ("long", "in full:")):
        prefix = words.encode([text])[0, :-1]
        want = words.decode(free_run(model, c, x, prefix, words.end))
        assert c.caption(x, style) == [want]
    assert c.caption(x) == c.caption(x, "short")
    with pytest.raises(RecapError, match="'short' and 'long'"): c.caption(x, "dsc")

@torch.no_grad()
def free_run(model, captioner, pictures, prefix, end): # greedy by the full forward from given tokens
    from recap.captioner import as_pixels, normalise
    x, row = normalise(as_pixels(pictures, 64)), prefix[None]
    while row.shape[1] < 30 and int(row[0, -1]) != end: row = torch.cat([row, model(x, row, output_labels=False)["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    return row[0, len(prefix):].tolist()
