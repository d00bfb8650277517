"Recipes over caption columns as relabelling leaves them: half done, empty, hostile."
import subprocess, sys
import pytest
from scipy.stats import binom
from recap.blend import (RECIPES, Recipe, as_read, blend_captions, blend_report, blend_styles, derive, draw_style, first_sentences, parse_recipe, sources_of, sweep, write_derived)
from recap.core import RecapError
from recap.corpus import open_corpus

KEYS = [("00000", f"{i:09d}") for i in range(2000)]

def likely(seen, n, p): return binom.ppf(1e-6, n, p) <= seen <= binom.ppf(1 - 1e-6, n, p)

def test_every_recipe_draws_its_shares():
    for recipe in [*RECIPES.values(), *sweep()]:
        drawn = [draw_style(recipe, k, epoch=1, seed=7) for k in KEYS]
        for style, p in recipe.shares.items(): assert likely(drawn.count(style), len(KEYS), p), (recipe.name, style)

def test_the_published_proportions():
    "Share of the caption that came with the image, as the papers give it (DALL-E 3; RECAP; SD3; Recap-DataComp-1B)."
    originals = {"alt": 1, "ssc95": .05, "dsc65": .35, "dsc80": .2, "dsc90": .1, "dsc95": .05, "recap_short": 0, "recap_long": 0, "recap_mix": 0, "sd3": .5, "datacomp_long": .1, "datacomp_raw": .75,
                 "random_length": 0, "fused": 0}
    assert {r.name: r.shares.get("alt", 0) for r in RECIPES.values()} == originals and all(r.source for r in RECIPES.values())
    assert [1 - r.synthetic() for r in sweep((0, .3, 1))] == pytest.approx([0, .3, 1])

def test_dropout_takes_its_share_of_every_recipe_alike_and_anew_each_epoch():
    columns = {s: {k: s for k in KEYS} for s in ("alt", "ssc", "dsc")}
    gone = lambda name, epoch=0, p=.1: {k for k, s in zip(KEYS, blend_styles(RECIPES[name], columns, KEYS, epoch, 3, p)) if not s}
    assert likely(len(gone("alt")), len(KEYS), .1) and gone("alt") == gone("dsc95") == gone("recap_mix")
    assert likely(len(gone("alt") & gone("alt", 1)), len(KEYS), .01)                                      # independent of the last epoch
    kept = gone("alt")                                                                                      # and of the draw of the column
    assert likely(sum(draw_style(RECIPES["sd3"], k, 0, 3) == "alt" for k in kept), len(kept), .5)
    assert gone("alt", p=0.) == set() and gone("alt", p=1.) == set(KEYS) and gone("alt") < gone("alt", p=.3)

@pytest.mark.parametrize("text, n, head", [("One. Two. Three.", 2, "One. Two."), ("One. Two.", 5, "One. Two."), ("no stop", 1, "no stop"), ("", 1, ""), ("3.5 m tall. Old.", 1, "3.5 m tall."),
    ("What? Yes! No…", 2, "What? Yes!"), ("He said (loud.) And left.", 1, "He said (loud.)"), ("一。二。三", 2, "一。二。"), ("A.\nB. C.", 1, "A."), ("Wait... what? Go.", 1, "Wait...")])
def test_first_sentences_by_hand(text, n, head): assert first_sentences(text, n) == head

def test_random_length_cuts_by_seed_epoch_and_key():
    columns = derive({"dsc": {k: "One. Two. Three. Four." for k in KEYS}, "alt": {}}, RECIPES["random_length"].shares)
    length = lambda *a: [len(t.split()) for t in blend_captions(RECIPES["random_length"], columns, KEYS, *a)]
    drawn = length(0, 5)
    assert all(likely(drawn.count(n), len(KEYS), .25) for n in (1, 2, 3, 4)) and drawn == length(0, 5)
    assert likely(sum(a == b for a, b in zip(drawn, length(1, 5))), len(KEYS), .25)                      # another epoch, another draw
    short = derive({"dsc": {k: "One. Two." for k in KEYS}}, RECIPES["random_length"].shares)
    assert likely(sum(t == "One." for t in blend_captions(RECIPES["random_length"], short, KEYS)), len(KEYS), .25)  # two sentences or more are all of it

def test_columns_are_made_once_and_only_from_what_is_there():
    assert [sources_of(s) for s in ("dsc_2", "my_dsc_12", "fused", "dsc", "two_words", "dsc_0", "dsc_-1")] == [("dsc",), ("my_dsc",), ("dsc", "alt"), (), (), (), ()]
    made = derive({"dsc": {KEYS[0]: None, KEYS[1]: "A. B."}}, ["dsc_1", "fused", "ssc_1", "dsc_1"])
    assert made["dsc_1"] == {KEYS[0]: "", KEYS[1]: "A."} and set(made) == {"dsc", "dsc_1"}
    with pytest.raises(RecapError, match="needs the caption column 'fused'.*write_derived"): blend_styles(RECIPES["fused"], made, KEYS[:1])

def test_fusing_keeps_the_caption_and_takes_the_name():
    alt, dsc = {KEYS[0]: "Owl, from $9.99", KEYS[1]: "IMG_1.jpg", KEYS[2]: "a red cat"}, {KEYS[0]: "A large bird is on the left.", KEYS[1]: "A bird.", KEYS[2]: "A blue cat is there."}
    columns = {"alt": alt, "dsc": dsc}
    assert derive(columns, ["fused"])["fused"] == {KEYS[0]: "A large owl is on the left.", KEYS[1]: "A bird.", KEYS[2]: "A blue cat is there."}
    asked = []
    derive(columns, ["fused"], believe=lambda key, fact: asked.append(key) or 0.)
    assert set(asked) <= set(KEYS[:3]) and KEYS[0] in asked                                                # the judge is told which picture

def test_derived_columns_on_disk_follow_their_sources(tmp_path):
    toy = open_corpus("toy")
    corpus = open_corpus(toy.path, captions_dir=tmp_path)
    def tell(text):
        for shard in corpus.shards: corpus.write_captions("dsc", shard, [{"key": k, "caption": text} for (_, k) in toy.captions("dsc", shard)])
    tell("First one. And more.")
    assert write_derived(corpus, ["dsc", "dsc_1", "alt"]) == {"dsc_1": toy.size} and set(corpus.captions("dsc_1").values()) == {"First one."}
    tell("Another. And more.")
    write_derived(corpus, ["dsc_1"])
    assert set(corpus.captions("dsc_1").values()) == {"Another."} and set(corpus.captions("dsc_1")) == set(corpus.captions("dsc")) and corpus.manifest("dsc_1")["complete"]

def test_what_an_encoder_reads_within_its_limit():
    import open_clip
    tok, text = open_clip.tokenizer.SimpleTokenizer(), "A cat sleeps here. A dog runs after it. The sun is red."
    sizes = [len(tok.encode(t)) + 2 for t in ("A cat sleeps here.", "A cat sleeps here. A dog runs after it.", text)]
    for limit, want in ((sizes[2], text), (sizes[2] - 1, "A cat sleeps here. A dog runs after it."), (sizes[1] - 1, "A cat sleeps here.")):
        read, budget = as_read([text, ""], limit=limit)
        assert read == [want, ""] and budget.over == (want != text) and budget.texts == 2 and budget.longest == sizes[2]
    read, budget = as_read([text], limit=sizes[0], policy="window")
    assert read == [text] and len(budget.owner) >= 3 and not any(c["lost"] for c in budget.cuts)
    with pytest.raises(RecapError, match=f"has {sizes[2]} tokens, the limit is {sizes[2] - 1}"): as_read([text], limit=sizes[2] - 1, policy="refuse")
    assert as_read(["cat "*75])[1].over == 0 and as_read(["cat "*76])[1].limit == 77                          # CLIP's own limit, start and end counted

def test_the_manner_of_a_mix_is_the_weighted_manner_of_its_columns():
    columns = {"alt": {k: "red cat" for k in KEYS}, "dsc": {k: "A red cat." for k in KEYS}}
    for name in ("dsc65", "dsc80", "dsc90", "dsc95", "recap_long"):
        rep, p = blend_report(RECIPES[name], columns, KEYS), RECIPES[name].shares.get("alt", 0)
        count = lambda k: round(rep["manner"][k]["mean"]*len(KEYS))
        assert likely(count("all lower case"), len(KEYS), p) and count("full stop") == count("opens with a/an") == len(KEYS) - count("all lower case")
        assert rep["words"]*len(KEYS) == 3*len(KEYS) - count("all lower case") and rep["tokens"]["clip"]*len(KEYS) == 6*len(KEYS) - 2*count("all lower case")

def test_draws_do_not_depend_on_the_process_the_order_or_the_company():
    code = ("from recap.blend import *; print([draw_style(RECIPES['dsc65'], ('00000', f'{i:09d}'), 3, 5) for i in range(60, 20, -1)])")
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "99", **__import__("os").environ}).stdout.strip()
    assert alone == repr([draw_style(RECIPES["dsc65"], KEYS[i], 3, 5) for i in range(60, 20, -1)])

def test_same_key_in_two_shards_is_two_samples():
    a, b = ([draw_style(RECIPES["sd3"], (s, k)) for _, k in KEYS] for s in ("00000", "00001"))
    assert 0.4 < sum(x == y for x, y in zip(a, b))/len(KEYS) < 0.6

def test_the_alt_text_arm_never_reads_a_synthetic_caption():
    columns = {"alt": {k: "" for k in KEYS[:50]}, "ssc": {k: "A cat." for k in KEYS[:50]}, "dsc": {k: "A red cat." for k in KEYS[:50]}}
    assert set(blend_captions(RECIPES["alt"], columns, KEYS[:50])) == {""}
    assert set(blend_captions(RECIPES["ssc95"], columns, KEYS[:50])) == {"A cat."}  # its 5 % of originals are missing

def test_a_relabelling_that_stopped_half_way_is_counted():
    half = {"alt": {k: "IMG" for k in KEYS}, "dsc": {k: "A red cat." for k in KEYS[:1000]}}
    seen = blend_report(RECIPES["recap_long"], half, KEYS)
    assert seen["replaced"] == 1000 and seen["empty"] == 0 and seen["shares"] == {"alt": 0.5, "dsc": 0.5}
    with pytest.raises(RecapError, match="00000/000001000 has no 'dsc' caption"):
        blend_styles(Recipe("strict", {"dsc": 1.0}, missing="error"), half, KEYS)

@pytest.mark.parametrize("caption", ["<script>alert(1)</script>", "a\nb", "\ud83d\ude80 ﷽ a\u0000b", "', DROP TABLE", "x"*5000, "  spaces  "])
def test_captions_pass_through_byte_equal(caption):
    columns = {"alt": {KEYS[0]: caption}}
    assert blend_captions(RECIPES["alt"], columns, KEYS[:1]) == [caption]

def test_none_and_absent_captions_are_missing():
    columns = {"alt": {KEYS[0]: None}}
    assert blend_captions(RECIPES["alt"], columns, KEYS[:2]) == ["", ""]

@pytest.mark.parametrize("text, told", [("dcs95", "did you mean 'dsc95'"), ("", "unknown recipe"), ("dsc:0.5", "add up to 1"), ("dsc:x,alt:1", "'x' is not a share"),
                                        ("dsc:1.5,alt:-0.5", "between 0 and 1"), ("dsc:nan,alt:1", "between 0 and 1"), (":1", "between 0 and 1"), ("dsc:.5,dsc:.5", "given twice"), ("dsc:1,", "not a share")])
def test_recipes_that_cannot_be_read_say_so_in_one_line(text, told):
    with pytest.raises(RecapError) as e: parse_recipe(text)
    assert told in str(e.value) and "\n" not in str(e.value)

def test_a_column_that_the_corpus_lacks_is_named_with_the_way_out():
    with pytest.raises(RecapError, match="needs the caption column 'dsc'.*relabel"): blend_styles(RECIPES["dsc95"], {"alt": {}}, KEYS[:1])
