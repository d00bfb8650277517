"Text encoders in the layouts that others write, budgets that lose nothing in silence, and the shipped encoder's states."
import gzip
import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from recap.core import RecapError, foundation
from recap.text import POLICIES, TextConfig, TextEncoder, all_texts, byte_ids, join_windows, load_tower, make_t5, read_tokenizer, train_tokenizer, within_budget

TEXTS = ["A large red cat is on the left.", "", "naïve “cat” 猫 🐈‍⬛", "A SIGN that says OPEN"]


pytestmark = pytest.mark.usefixtures("one_thread")


def encoder_of(model):
    "The encoder alone, as a folder of its own keeps it."
    import transformers
    name = type(model).__name__.replace("ForConditionalGeneration", "EncoderModel")
    out = getattr(transformers, name)(model.config).eval()
    assert not out.load_state_dict(model.state_dict(), strict=False).missing_keys
    return out


def tiny_t5(kind="T5", vocab_size=400, layers=2, seed=0):
    "A v1.1 layout: gated GELU, the output matrix apart."
    import transformers
    torch.manual_seed(seed)
    return getattr(transformers, kind + "ForConditionalGeneration")(getattr(transformers, kind + "Config")(vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=48, num_layers=layers,
        num_decoder_layers=1, num_heads=4, dropout_rate=.1, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()


def unigram(size=300):
    "A T5 tokenizer of transformers with pieces learnt here."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5TokenizerFast
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
    tok.train_from_iterator(all_texts(100) + TEXTS, trainers.UnigramTrainer(vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return T5TokenizerFast(vocab=[tuple(p) for p in json.loads(tok.to_str())["model"]["vocab"]], extra_ids=50)


def alone(model, rows, **kw):
    "States of each row by transformers alone, without padding."
    with torch.no_grad(): return [model(input_ids=torch.tensor([r]), **kw).last_hidden_state[0] for r in rows]


def close(states, mask, expected, atol=1e-5):
    assert mask.sum(1).tolist() == [len(e) for e in expected]
    for s, m, e in zip(states, mask, expected):
        assert torch.allclose(s[m], e.float(), atol=atol) and not s[~m].any()


@pytest.mark.parametrize("kind, whole", [("T5", False), ("T5", True), ("UMT5", False), ("MT5", False)])
def test_t5_in_two_shards_with_its_own_tokenizer(tmp_path, kind, whole):
    "The layout of T5 v1.1 XXL: an index, numbered shards, tokenizer.json; the encoder alone, or the whole model with its decoder."
    model, words = tiny_t5(kind), unigram()
    kept = model if whole else encoder_of(model)
    kept.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in kept.parameters())*2//3)
    words.save_pretrained(tmp_path)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    encoder = TextEncoder.from_pretrained(tmp_path)
    rows = words(TEXTS).input_ids
    assert encoder.tokens(TEXTS)[0] == rows and all(r[-1] == 1 and r.count(1) == 1 for r in rows)
    close(*encoder.encode(TEXTS), alone(model.get_encoder(), rows))
    assert encoder.width == 32 and encoder.encode([])[0].shape == (0, 0, 32)
    (tmp_path/shards[1]).unlink()
    with pytest.raises(RecapError, match="model-00002-of-00002.safetensors missing"): TextEncoder.from_pretrained(tmp_path)


def byt5_folder(path, **kw):
    from transformers import ByT5Tokenizer
    model = encoder_of(tiny_t5(vocab_size=384, **kw))
    model.save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return model, ByT5Tokenizer()


def test_byt5_needs_no_tokenizer_file(tmp_path):
    model, words = byt5_folder(tmp_path)
    assert not (tmp_path/"tokenizer.json").exists() and not (tmp_path/"spiece.model").exists()
    encoder = TextEncoder.from_pretrained(tmp_path, max_tokens=200)
    rows = words(TEXTS).input_ids
    assert encoder.tokens(TEXTS)[0] == rows
    close(*encoder.encode(TEXTS), alone(model, rows))
    config = json.loads((tmp_path/"config.json").read_text()) | {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path/"tokenizer_config.json").unlink()      # the older layout says it in config.json
    with pytest.raises(RecapError, match="no tokenizer here"): TextEncoder.from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(config))
    assert TextEncoder.from_pretrained(tmp_path).tokens(TEXTS)[0] == rows


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=50, deadline=None)
def test_bytes_are_byt5s(text):
    from transformers import ByT5Tokenizer
    if "<" not in text: assert byte_ids([text])[0] + [1] == ByT5Tokenizer()(text).input_ids     # theirs reads </s> in a text as an end


def clip_folder(root, pad="<|endoftext|>"):
    "Stable Diffusion's layout: text_encoder beside tokenizer, the vocabulary that open_clip ships."
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel
    from open_clip.tokenizer import bytes_to_unicode
    merges = gzip.open(Path(open_clip.__file__).parent/"bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    pieces = [*(letters := list(bytes_to_unicode().values())), *(v + "</w>" for v in letters), *("".join(m.split()) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    (root/"tokenizer").mkdir()
    (root/"tokenizer"/"vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (root/"tokenizer"/"merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (root/"tokenizer"/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}))
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    model.save_pretrained(root/"text_encoder")
    return model


@pytest.mark.parametrize("pad, number", [("<|endoftext|>", 49407), ("!", 0)])     # Stable Diffusion 1, and 2
def test_clips_text_tower_as_stable_diffusion_keeps_it(tmp_path, pad, number):
    import open_clip
    model = clip_folder(tmp_path, pad)
    encoder = TextEncoder.from_pretrained(tmp_path/"text_encoder")
    assert (encoder.max_tokens, encoder.width) == (77, 32)
    texts = [t for t in TEXTS if "🐈" not in t]
    rows, theirs = encoder.tokens(texts)[0], open_clip.get_tokenizer("ViT-B-32")(texts)
    assert [r + [0]*(77 - len(r)) for r in rows] == theirs.tolist()
    states, mask = encoder.encode(texts)
    assert states.shape == (3, 77, 32) and mask.sum(1).tolist() == [len(r) for r in rows]
    for s, e in zip(states, alone(model, [r + [number]*(77 - len(r)) for r in rows])): assert torch.allclose(s, e, atol=1e-5)   # padding too: it is attended to
    with pytest.raises(RecapError, match="limit is 77"): encoder.encode(["a cat on a mat "*30])
    with pytest.raises(RecapError, match="knows 77 places"): TextEncoder.from_pretrained(tmp_path/"text_encoder", max_tokens=120)


def test_clip_reads_a_long_text_in_windows_of_77(tmp_path):
    model = clip_folder(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path/"text_encoder")
    long = "There is a red cat on a green mat. "*20
    rows, budget = encoder.tokens([long, "a cat"], "window")
    assert budget.owner == (0,)*(len(rows) - 1) + (1,) and len(rows) > 3 and all(r[0] == 49406 and r[-1] == 49407 and len(r) <= 77 for r in rows)
    assert sum((r[1:-1] for r in rows[:-1]), []) == encoder.tokenizer.encode([long])[0]
    with pytest.warns(UserWarning, match="1 of 2 texts"): states, mask = encoder.encode([long, "a cat"], policy="window")
    assert states.shape == (2, 77*(len(rows) - 1), 32)
    parts = alone(model, [r + [49407]*(77 - len(r)) for r in rows])
    assert torch.allclose(states[0], torch.cat(parts[:-1]), atol=1e-5) and torch.allclose(states[1, :77], parts[-1], atol=1e-5) and not mask[1, 4:].any()
    with pytest.warns(UserWarning): mean, seen = encoder.encode([long], policy="window", join="mean")
    assert mean.shape == (1, 77, 32) and torch.allclose(mean[0, 0], torch.stack(parts[:-1])[:, 0].mean(0), atol=1e-5)
    with pytest.raises(RecapError, match="concat or mean"): join_windows(states, mask, (0, 1), "sum")


def test_a_whole_clip_gives_its_text_tower(tmp_path):
    from transformers import CLIPConfig, CLIPModel
    model = clip_folder(tmp_path)
    torch.manual_seed(1)
    whole = CLIPModel(CLIPConfig(text_config=model.config.to_dict(), vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16), projection_dim=8)).eval()
    whole.save_pretrained(tmp_path/"clip")
    for f in (tmp_path/"tokenizer").iterdir(): shutil.copy(f, tmp_path/"clip")
    states, _ = TextEncoder.from_pretrained(tmp_path/"clip").encode(["a cat"])
    ids = torch.tensor([[49406, 320, 2368, *[49407]*74]])
    with torch.no_grad(): assert torch.allclose(states, whole.text_model(input_ids=ids).last_hidden_state, atol=1e-5)


# --- fault 30: pickled, damaged, incomplete

def test_pickled_weights_are_refused(tmp_path):
    model, _ = byt5_folder(tmp_path)
    (tmp_path/"model.safetensors").unlink()
    hit = tmp_path/"hit"
    class Evil:
        def __reduce__(self): return (Path.touch, (hit,))
    torch.save({"encoder": Evil()}, tmp_path/"pytorch_model.bin")
    with pytest.raises(RecapError, match="pytorch_model.bin is pickled"): TextEncoder.from_pretrained(tmp_path)
    assert not hit.exists()


@pytest.mark.parametrize("damage, said", [("cut", "cannot be read"), ("pickled", "cannot be read"), ("lacking", "weights are in no file"), ("shape", "cannot be read")])
def test_damaged_weights_are_refused(tmp_path, damage, said):
    from safetensors.torch import load_file, save_file
    byt5_folder(tmp_path)
    path = tmp_path/"model.safetensors"
    if damage == "cut": path.write_bytes(path.read_bytes()[:-100])
    if damage == "pickled": torch.save({}, path)
    if damage == "lacking": save_file({k: v for k, v in load_file(path).items() if "block.1.layer.0.SelfAttention.q" not in k}, path, {"format": "pt"})
    if damage == "shape": (tmp_path/"config.json").write_text(json.dumps(json.loads((tmp_path/"config.json").read_text()) | {"d_ff": 64}))
    with pytest.raises(RecapError, match=said): TextEncoder.from_pretrained(tmp_path)


def test_what_is_no_text_encoder_is_refused(tmp_path):
    with pytest.raises(RecapError, match="no text encoder here"): TextEncoder.from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(RecapError, match="'vit' is no text encoder"): load_tower(tmp_path)
    with pytest.raises(RecapError, match="do not belong together"):
        TextEncoder(make_t5(TextConfig(width=32, layers=1, heads=2), 300).get_encoder(), train_tokenizer(all_texts(20), 400))


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", .1), ("float16", .02)])
def test_half_precision_is_near_and_comes_out_in_float32(tmp_path, dtype, tolerance):
    byt5_folder(tmp_path)
    exact, mask = TextEncoder.from_pretrained(tmp_path).encode(TEXTS)
    half = TextEncoder.from_pretrained(tmp_path, dtype=dtype)
    states, _ = half.encode(TEXTS)
    assert str(half.model.dtype) == f"torch.{dtype}" and states.dtype == torch.float32
    assert 0 < (states - exact)[mask].abs().max() < tolerance*exact.abs().max()


def test_states_that_overflow_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    byt5_folder(tmp_path)
    w = load_file(tmp_path/"model.safetensors")
    save_file({k: v*1e5 if "SelfAttention.v" in k else v for k, v in w.items()}, tmp_path/"model.safetensors", {"format": "pt"})
    assert TextEncoder.from_pretrained(tmp_path, dtype="bfloat16").encode(["a cat"])[0].isfinite().all()
    with pytest.raises(RecapError, match="not finite.*bfloat16"): TextEncoder.from_pretrained(tmp_path, dtype="float16").encode(["a cat"])


# --- sentencepiece, where the package is installed

@pytest.mark.skipif(not importlib.util.find_spec("sentencepiece"), reason="the package sentencepiece is not installed")
def test_spiece_model_gives_the_numbers_of_sentencepiece(tmp_path):
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(all_texts(100)), model_prefix=str(tmp_path/"spiece"), vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    model = encoder_of(tiny_t5())
    model.save_pretrained(tmp_path)
    rows = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path/"spiece.model")).encode(TEXTS, add_eos=True)
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert encoder.tokens(TEXTS)[0] == rows
    close(*encoder.encode(TEXTS), alone(model, rows))


def test_spiece_model_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path/"spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(RecapError, match="package sentencepiece: install it"): read_tokenizer(tmp_path)


# --- fault 21: over the limit

@pytest.fixture(scope="module")
def bpe(): return train_tokenizer(all_texts(100), 400)


ANY = st.text(st.sampled_from(list("ab .!?\n\"') \t") + ["猫", "。", "🐈", "é"]), max_size=80)


@given(st.lists(ANY, max_size=4), st.integers(3, 30), st.sampled_from(POLICIES))
@settings(max_examples=300, deadline=None)
def test_rows_stay_within_the_limit_and_keep_their_ends(texts, limit, policy):
    try: rows, budget = within_budget(texts, byte_ids, limit, policy, (300,), (1,))
    except RecapError as e:
        assert policy == "refuse" and any(len(b) + 2 > limit for b in byte_ids(texts)) or policy == "window" and limit < 6 and "does not hold one letter" in str(e)
        return
    read = lambda r: bytes(i - 3 for i in r[1:-1]).decode()
    assert all(r[0] == 300 and r[-1] == 1 and len(r) <= limit for r in rows)
    over = [i for i, b in enumerate(byte_ids(texts)) if len(b) + 2 > limit]
    assert [c["text"] for c in budget.cuts] == over and budget.share == len(over)/max(1, len(texts))
    for i, text in enumerate(texts):
        parts = [read(r) for r, o in zip(rows, budget.owner) if o == i]
        lost = next((c["lost"] for c in budget.cuts if c["text"] == i), "")
        assert "".join(parts) + lost == text and (not lost or policy == "truncate")      # every letter is read, or is told to be lost
        if policy != "window": assert len(parts) == 1


@pytest.mark.parametrize("text, limit, kept", [
    ("One cat. Two cats. Three", 20, "One cat. Two cats."),       # the last sentence that fits
    ("One cat. Two cats. Three", 19, "One cat. Two cats."),       # 18 letters and the end
    ("One cat. Two cats. Three", 18, "One cat."),
    ("One cat, two cats", 10, "One cat,"),                        # no sentence ends in time: a word
    ("It costs 3.50 a cat", 12, "It costs"),                      # a point within a number ends no sentence
    ('He said "no." Then left', 15, 'He said "no."'),             # the closing quotation mark belongs to the sentence
    ("A cat\nsat on a mat", 12, "A cat"),                         # a line's end
    ("猫がいる。犬もいる。", 17, "猫がいる。"),                       # 15 bytes, and no blank behind the stop
    ("abcdefgh", 6, "abcde"),                                     # one long word
])
def test_truncation_ends_where_a_sentence_or_a_word_does(text, limit, kept):
    rows, budget = within_budget([text], byte_ids, limit, "truncate", end=(1,))
    assert bytes(i - 3 for i in rows[0][:-1]).decode() == kept and rows[0][-1] == 1
    assert budget.cuts[0]["lost"] == text[len(kept):] and budget.cuts[0]["kept"] == len(rows[0])


def test_a_cut_text_reads_as_its_beginning(bpe):
    encoder = TextEncoder(make_t5(TextConfig(width=32, layers=1, heads=2), 400).get_encoder(), bpe, max_tokens=12)
    text = "A red cat. A very large blue car is in the middle of a street in the snow."
    with pytest.warns(UserWarning, match=r"1 of 2 texts \(50.0%\) are over 12 tokens"): states, mask = encoder.encode([text, "a cat"], policy="truncate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, seen = encoder.encode(["A red cat.", "a cat"])
    assert torch.equal(mask, seen) and torch.allclose(states, whole, atol=1e-6)
    with pytest.raises(RecapError, match="text 0 has .* the limit is 12"): encoder.encode([text])


# --- the shipped encoder

def test_the_shipped_encoder_gives_the_states_of_transformers():
    "The class adds nothing: the file's tokenizer, the end token, transformers' forward of one text at a time."
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel
    folder = foundation("text")
    words, model = Tokenizer.from_file(str(folder/"tokenizer.json")), T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = all_texts(6, 5, "easy+whole", "test")
    rows = [e.ids + [1] for e in words.encode_batch(texts)]
    encoder = TextEncoder.from_pretrained()
    assert encoder.tokens(texts)[0] == rows and encoder.max_tokens == 120
    states, mask = encoder.encode(texts, batch_size=7)
    close(states, mask, alone(model, rows), 1e-4)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in range(0, len(order), 7):        # and batch by batch, padded alike, to 1e-6
        part = order[i:i+7]
        ids = torch.zeros(len(part), max(len(rows[j]) for j in part), dtype=torch.long)
        for k, j in enumerate(part): ids[k, :len(rows[j])] = torch.tensor(rows[j])
        with torch.no_grad(): theirs = model(input_ids=ids, attention_mask=ids != 0).last_hidden_state*(ids != 0)[..., None]
        assert (states[part, :ids.shape[1]] - theirs).abs().max() < 1e-6
