"The report: opens in a browser without a complaint, escapes what it is given, and never claims what was not measured."
import json, re, shutil
from pathlib import Path
import pytest
from recap import results as rs
from recap.core import RecapError, read_json, write_json

CHROMIUM = "/usr/bin/chromium"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
HOSTILE = "</p><script>window.bad=1</script><img src=x onerror=\"window.bad=1\"> {{7*7}} $\\frac{1}{2}$ & 'quoted' \u202eabc 日本語"

@pytest.fixture(scope="module")
def toy(tmp_path_factory): return rs.toy_study(tmp_path_factory.mktemp("study")/"toy", n=30)

@pytest.fixture
def study(toy, tmp_path):
    shutil.copytree(toy, tmp_path/"study")
    return tmp_path/"study"

def make(study, out, scale="cpu", **kw):
    results = rs.report(rs.ReportConfig(study=str(study), scale=scale, **kw), out)
    return (out/"report.html").read_text(encoding="utf8"), results

def change(path, f):
    d = read_json(path); f(d); write_json(path, d)

def verdicts(results): return {c["id"]: c["verdict"] for c in results["claims"]}

def judge(folder, scale="cpu"):
    "Results without drawing the report."
    study = rs.read_study(folder)
    return rs.study_results(study, scale, rs.all_claims(study, scale)[0])

def test_known_answer_is_found(study, tmp_path):
    html, results = make(study, tmp_path)
    v = verdicts(results)
    assert v["order"] == v["first_last"] == v["people"] == v["captions"] == v["rewriting"] == "holds" and v["blend"] == "not measured"
    assert html.count("data:image/png;base64,") == 3*10*5 + 12
    assert results["headline"].startswith("Better captions made a better painter") and results["headline"] in html
    assert "design of RECAP" in html

def test_results_hold_only_what_the_seed_determines(study, tmp_path):
    (tmp_path/"a").mkdir(); (tmp_path/"b").mkdir()
    html, first = make(study, tmp_path/"a")
    for run in study.glob("*/run.json"): change(run, lambda d: d.update(seconds=12345.6, machine=dict(cpu="Another", cores=64), revision="f00", finished="2031-01-01"))
    other, second = make(study, tmp_path/"b")
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert "Another, 64 cores" in other and "f00" in other
    cut = lambda h: h[:h.index('<h2 id="cost">')]  # pictures, figures and scores, without times and machine
    assert cut(html) == cut(other) and html != other

def test_small_scales_claim_nothing(study, tmp_path):
    html, results = make(study, tmp_path, "smoke")
    assert "proves wiring, claims nothing" in html and 'class="verdict holds"' not in html
    assert set(verdicts(results).values()) == {"too small to say", "not measured"} and "too small to claim" in results["headline"]

def test_equal_arms_are_not_told_apart(tmp_path):
    results = judge(rs.toy_study(tmp_path/"same", n=30, painters={"real": 1., "alt": .5, "ssc95": .5, "dsc95": .5}))
    assert "holds" not in (verdicts(results)["order"], verdicts(results)["first_last"])
    assert not results["headline"].startswith("Better captions made")

def test_a_reversed_order_is_said_plainly(tmp_path):
    results = judge(rs.toy_study(tmp_path/"back", n=30, painters={"alt": .9, "ssc95": .6, "dsc95": .3}))
    assert verdicts(results)["order"] == verdicts(results)["first_last"] == verdicts(results)["people"] == "does not hold"
    assert results["headline"].startswith("Better captions did not help") and "−" in results["headline"]

@pytest.mark.parametrize("gone", ["captions", "evaluate_real", "evaluate_vae", "evaluate_ssc95", "evaluate_alt"])
def test_a_missing_stage_is_not_measured(study, tmp_path, gone):
    shutil.rmtree(study/gone)
    html, results = make(study, tmp_path) if gone in ("captions", "evaluate_alt") else ("", judge(study))
    v = verdicts(results)
    if gone == "captions": assert v["captions"] == "not measured" and "Not measured in this run" in html
    if gone in ("evaluate_ssc95", "evaluate_alt"): assert v["order"] == "not measured"
    if gone == "evaluate_alt": assert "nothing to compare" in results["headline"]
    if gone in ("evaluate_real", "evaluate_vae"): assert v["order"] == "holds"

def test_missing_pictures_and_records_and_an_own_recipe_do_not_stop_the_report(study, tmp_path):
    for run in study.glob("*/run.json"): run.unlink()
    shutil.rmtree(study/"evaluate_alt"/"images")
    shutil.copytree(study/"evaluate_dsc95", study/"evaluate_dsc:0.9,alt:0.1")
    html, results = make(study, tmp_path)
    assert "not recorded" in html and "dsc:0.9,alt:0.1" in html and "dsc:0.9,alt:0.1" in results["scores"]

def test_a_detector_that_reads_nothing_measures_nothing(study, tmp_path):
    def f(d):
        for t in d["texts"].values():
            for r in t["rows"]: r["right"] = [0]*len(r["right"])
    change(study/"evaluate_real"/"results.json", f)
    html, results = make(study, tmp_path)
    assert "nothing to compare" in results["headline"] and verdicts(results)["order"] == "not measured" and "left out of all scores" in html

def test_an_arm_with_other_prompts_is_refused(study, tmp_path):
    def f(d): d["texts"]["descriptive"]["rows"][0]["prompt"] = "something else"
    change(study/"evaluate_alt"/"results.json", f)
    with pytest.raises(RecapError, match="different descriptive prompts"): judge(study)

def test_unreadable_kinds_are_left_out_for_all(study):
    def f(d):
        for t in d["texts"].values():
            for r in t["rows"]: r["right"] = [0 if x[0] == "size" else y for x, y in zip(r["facts"], r["right"])]
    change(study/"evaluate_real"/"results.json", f)
    results = judge(study)
    assert "size" not in results["kinds"] and {"object", "colour"} <= set(results["kinds"])
    before, after = (rs.accuracy(rs.read_study(study), "dsc95", "descriptive", k).mean for k in (rs.KINDS, results["kinds"]))
    assert before != after and abs(after - results["scores"]["dsc95"]["descriptive"]["facts"]["mean"]) < 1e-4

def test_the_design_is_told_from_what_was_run():
    tune = {f"train_{a}": dict(run=dict(params=dict(base="foundation", steps=260, batch_size=64))) for a in ("alt", "dsc95")}
    scratch = {f"train_{a}": dict(run=dict(params=dict(base="", steps=n, batch_size=64))) for a, n in (("alt", 10), ("dsc95", 20))}
    assert "design of RECAP" in rs.design_sentence(tune) and "260 steps of 64" in rs.design_sentence(tune)
    assert "from scratch, which is the design of DALL-E 3" in rs.design_sentence(scratch) and "steps of" not in rs.design_sentence(scratch)

@pytest.mark.parametrize("folder, told", [("nothing", "does not exist"), (".", "holds no evaluation")])
def test_no_study_no_report(tmp_path, folder, told):
    with pytest.raises(RecapError, match=told): make(tmp_path/folder, tmp_path)

@pytest.fixture(scope="module")
def hostile(toy, tmp_path_factory):
    "A report of a study in which whatever can be text is an attack."
    study, out = tmp_path_factory.mktemp("hostile")/"study", tmp_path_factory.mktemp("report")
    shutil.copytree(toy, study)
    def rows(d):
        for t in d["texts"].values(): t["rows"][0]["prompt"] = HOSTILE
    for e in study.glob("evaluate_*/results.json"): change(e, rows)
    shutil.copytree(study/"evaluate_dsc95", study/"evaluate_<b onclick=x>$x_1$")
    def captions(d): d["examples"][0]["styles"]["alt"].update(caption=HOSTILE, invented=[["object", HOSTILE]])
    change(study/"captions"/"results.json", captions)
    change(study/"evaluate_alt"/"run.json", lambda d: d.update(revision=HOSTILE))
    make(study, out)
    return out/"report.html"

def test_everything_is_escaped(hostile):
    html = hostile.read_text(encoding="utf8")
    assert "<script" not in html and "<img src=x" not in html and "<b onclick" not in html and "{{7*7}}" in html
    assert not re.search(r'(?:src|href|action|poster)="(?!data:|#)', html) and "url(http" not in html and "@import" not in html

@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists(): pytest.skip(f"no browser at {CHROMIUM}")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (360, "light")])
def test_it_opens_in_a_browser(browser, hostile, width, scheme):
    said, asked = [], []
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda m: said.append(m.text)); page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(hostile.as_uri())
    for d in page.query_selector_all("details > summary"): d.click()
    assert said == [] and [u for u in asked if not u.startswith(("data:", "file:"))] == [] and sum(u.startswith("file:") for u in asked) == 1
    assert page.evaluate("window.bad") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size == document.querySelectorAll('[id]').length"), "ids repeat"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 128")
    assert dark == (scheme == "dark")
    context.close()
