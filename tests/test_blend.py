"Recipes over caption columns as relabelling leaves them: half done, empty, hostile."
import subprocess, sys
import pytest
from recap.blend import RECIPES, Recipe, blend_captions, blend_report, blend_styles, draw_style, parse_recipe
from recap.core import RecapError

KEYS = [("00000", f"{i:09d}") for i in range(2000)]

def test_every_recipe_draws_its_shares():
    for recipe in RECIPES.values():
        drawn = [draw_style(recipe, k, epoch=1, seed=7) for k in KEYS]
        for style, p in recipe.shares.items(): assert abs(drawn.count(style)/len(KEYS) - p) < 0.04, (recipe.name, style)

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
