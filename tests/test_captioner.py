"The captioner against open_clip: same folder, same outputs, same greedy tokens."
import json, random

import pytest
import torch

from recap.captioner import (CaptionTokenizer, Loaded, as_pixels, captioner_config, captioner_tokenizer, load_captioner,
    make_captioner, normalise, plain_greedy, save_captioner)
from recap.core import RecapError, keyed_torch
from recap.decode import Captioner, Decoder, generate, sampler
from recap.world import render, sample_scene


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words():
    texts = ["A big red cat stands on the left, on a beach.", "There is a tiny blue boat in the centre. It takes place in a meadow."]
    return captioner_tokenizer(texts*3, 330)


def noise(n, size=64, seed=0): return torch.randn(n, 3, size, size, generator=keyed_torch(seed, "noise"))


def differences(model, images, got, start, end, tie=1e-4):
    "Places where `got` leaves open_clip's own greedy path although no other token was within `tie` of the best."
    wrong = 0
    for image, w in zip(images, got, strict=True):
        ids = [start, *w.ids] + ([end] if w.finished else [])
        with torch.no_grad(): logits = model(image[None], torch.tensor([ids]))["logits"][0].float()
        best = logits.max(-1).values
        wrong += int((best - logits[range(len(ids) - 1), ids[1:]] > tie).sum())
    return wrong


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [{}, {"text": 2, "decoder": 3}])
def test_greedy_is_open_clips_full_forward_step_by_step(seed, shape):
    from recap import captioner
    captioner.SIZES["test"] = {**captioner.SIZES["tiny"], **shape}
    try: model = make_captioner(captioner_config("test", 90, context_length=32), seed).eval()
    finally: del captioner.SIZES["test"]
    images = noise(9, seed=seed)
    long = plain_greedy(model, images, end=-1, max_len=32)
    firsts = {t: {r.index(t) if t in r else 31 for r in long} for r in long for t in r}
    end = max(firsts, key=lambda t: len(firsts[t]))  # the token that would end the captions at the most different places
    slow, fast = plain_greedy(model, images, end=end, max_len=32), generate(model, images, max_len=32, end=end)
    assert differences(model, images, fast, 2, end) == 0
    assert [len(w.ids) for w in fast] == [len(s) for s in slow]
    assert len({len(s) for s in slow}) > 1, "the captions must end at different places for the test to mean something"
    whole = {tuple(w.ids) for i in range(9) for w in generate(model, images[i:i + 1], max_len=32, end=end)}
    assert whole == {tuple(w.ids) for w in fast}, "the batch must not change a caption"


def test_attentional_pooling_and_layer_scale_as_in_open_clips_configs():
    cfg = captioner_config("tiny", 70, context_length=20)
    cfg["vision_cfg"].update(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=9)
    cfg["text_cfg"]["ls_init_value"] = cfg["multimodal_cfg"]["ls_init_value"] = .5
    model = make_captioner(cfg, 4).eval()
    images = noise(4)
    assert differences(model, images, generate(model, images, max_len=20), 2, 1) == 0


def test_token_zero_hides_the_next_place_as_open_clips_mask_does():
    model = make_captioner(captioner_config("tiny", 50, context_length=24), 7).eval()
    images, r = noise(3), random.Random(0)
    tokens = torch.tensor([[2] + [r.choice([0, 0, 5, 6, 7]) for _ in range(22)] for _ in range(3)])
    with torch.no_grad():
        full = model(images, tokens, output_labels=False)["logits"]
        decoder = Decoder(model, images, 24)
        steps = torch.stack([decoder.step(t) for t in tokens.T], 1)
    assert torch.allclose(full, steps, atol=1e-4)


def test_open_clip_loads_the_folder_and_agrees(words, tmp_path):
    import open_clip
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path, make_captioner(cfg, 1), words, cfg, {"stage": "test"})
    ours = load_captioner(tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    picture = render(sample_scene(0, 3), 64)
    x = preprocess(picture)[None]
    assert torch.allclose(x, normalise(as_pixels([picture], 64)), atol=1e-6)
    text = "A big red cat stands on the left."
    ids = words.encode([text])
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")([text])[0, :ids.shape[1]].tolist() == ids[0].tolist()
    a, b = ours.model(x, ids), theirs(x, ids)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_pretrained_by_configuration_name_and_path(words, tmp_path):
    import open_clip
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path/"w", make_captioner(cfg, 2), words, cfg, {})
    (tmp_path/"recap_tiny.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path/"recap_tiny.json")
    theirs, *_ = open_clip.create_model_and_transforms("recap_tiny", pretrained=str(tmp_path/"w"/"open_clip_model.safetensors"))
    x = noise(2)
    with torch.no_grad(): assert torch.equal(theirs.eval().encode_image(x), load_captioner(tmp_path/"w").model.encode_image(x))


def test_open_clips_own_configurations_pass_through_the_maker():
    with torch.device("meta"): model = make_captioner("coca_ViT-B-32")
    assert model.text.vocab_size == 49408 and sum(p.numel() for p in model.parameters()) > 2e8
    with pytest.raises(RecapError, match="not a CoCa"): make_captioner("ViT-B-32")


def test_clip_vocabulary_round_trip():
    from open_clip.tokenizer import SimpleTokenizer
    words = CaptionTokenizer(SimpleTokenizer())
    assert words.decode(words.encode(["a red cat, on the left."])[0]) == "a red cat , on the left ."


def test_training_from_scratch_needs_the_head_filled():
    p = make_captioner(captioner_config("tiny", 400)).text_decoder.text_projection
    assert torch.isfinite(p).all() and .1 < p.std().item() < .15  # 64 ** -.5


def test_captions_decode_cleanly(words):
    for t in ("A big red cat stands on the left, on a beach.", "There is a tiny blue boat in the centre. It takes place in a meadow."):
        assert words.decode(words.encode([t])[0]) == t


def test_captioner_takes_every_kind_of_picture(words, tmp_path):
    import numpy as np
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size(), 20)
    c = Captioner(Loaded(make_captioner(cfg), words, dict(model_cfg=cfg), {"style": "dsc"}), device="cpu")
    pictures = [render(sample_scene(0, i), 64) for i in range(5)]
    array = np.stack([np.asarray(p) for p in pictures])
    rows = c.caption_rows(pictures, batch_size=2)
    assert [r["caption"] for r in rows] == c.caption(array) == c.caption(torch.from_numpy(array).permute(0, 3, 1, 2))
    assert set(rows[0]) == {"caption", "tokens", "logprob", "flags"} and all(r["flags"] in ("", "cut") and r["logprob"] <= 0 for r in rows)
    assert c.caption([]) == []
    assert len(c.caption([pictures[0].convert("L"), pictures[1].resize((300, 90))])) == 2
    with pytest.raises(RecapError, match="writes 'dsc'"): c.caption(pictures, style="ssc")
    draws = [c.caption(pictures, pick=sampler(keyed_torch(s, "d"), top_p=.9, top_k=50)) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("damage, says", [("gone", "is missing"), ("cut", "does not fit"), ("pickle", "does not fit"), ("no decoder", "cannot write captions")])
def test_a_damaged_folder_is_refused_in_one_line(words, tmp_path, damage, says):
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path, make_captioner(cfg), words, cfg, {})
    weights = tmp_path/"open_clip_model.safetensors"
    if damage == "gone": weights.unlink()
    if damage == "cut": weights.write_bytes(weights.read_bytes()[:5000])
    if damage == "pickle": torch.save({}, weights)
    if damage == "no decoder":
        config = json.loads((tmp_path/"open_clip_config.json").read_text()); del config["model_cfg"]["multimodal_cfg"]
        (tmp_path/"open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(RecapError, match=says) as e: load_captioner(tmp_path)
    assert "\n" not in str(e.value)


def test_shipped_captioner_is_small_and_writes_sentences():
    from recap.core import foundation
    try: folder = foundation("captioner")
    except RecapError: pytest.skip("no foundation captioner here")
    assert (folder/"open_clip_model.safetensors").stat().st_size <= 8_400_000
    rows = Captioner.from_pretrained(device="cpu").caption_rows([render(sample_scene(77, i, split="test"), 64) for i in range(16)])
    assert all(r["caption"] and not r["flags"] for r in rows)
