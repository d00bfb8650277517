"The rendered book: built without a warning, whole, and readable in a browser."
import html.parser, http.server, importlib, importlib.util, json, re, subprocess, sys, threading
from pathlib import Path
import pytest
from conftest import ROOT

pytest.importorskip("sphinx", reason="the docs packages are not installed")
CHROMIUM = "/usr/bin/chromium"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()

@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT/"docs/build.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def page(*cells): # (type, source, outputs) each
    return {"metadata": {"kernelspec": {"name": "python3"}}, "cells": [dict(cell_type=k, id=f"c{i}", metadata={}, source=s, **({"outputs": o[0] if o else []} if k == "code" else {})) for i, (k, s, *o) in enumerate(cells)]}

def test_a_page_shows_what_a_reader_needs(build):
    out = [{"output_type": "stream", "name": "stderr", "text": "100%|███"}, {"output_type": "stream", "name": "stdout", "text": f"saved in {ROOT}/runs/x and /tmp/abc/y"},
           {"output_type": "display_data", "metadata": {}, "data": {"image/png": "AA", "text/plain": "<Figure>", "application/vnd.jupyter.widget-view+json": {}}}]
    nb = page(("markdown", "# T\n> q"), ("code", "#| hide\nimport os"), ("code", "#| export\nimport re"), ("code", "#| exports\ndef clip_score(): pass"), ("markdown", "`clip_score` and `other`; `clip_score()` too. A red cat."),
              ("code", "x = clip_score()", out), ("code", "assert x\ntest_eq(x, 1)"))
    made = build.convert(ROOT/"nbs/20_metrics.ipynb", nb, {"clip_score": "recap.metrics.clip_score"}, ROOT/"runs/none", build.scrubber())
    sources = [c["source"] for c in made["cells"]]
    assert not any("import" in s for s in sources) and "#|" not in "".join(sources)
    assert "{py:obj}`clip_score <recap.metrics.clip_score>` and `other`; {py:obj}`clip_score() <recap.metrics.clip_score>`" in "".join(sources)
    shown = next(c for c in made["cells"] if c["source"] == "x = clip_score()")
    assert [list(o.get("data", o)) for o in shown["outputs"]][1:] == [["image/png"]] and "100%" not in json.dumps(shown) and str(ROOT) not in json.dumps(shown) and "/tmp" not in json.dumps(shown)
    assert shown["metadata"]["mystnb"]["image"]["alt"] == "A red cat."
    assert made["cells"][-1]["metadata"]["tags"] == ["hide-input"]

def test_a_local_variable_is_not_taken_for_a_name_of_the_library(build):
    names = build.Names({"draw": [(3, "text")], "fit_square": [(2, "pictures")]})
    assert names.of(page(("code", "draw = fit_square(x)")), 5) == {"fit_square": "recap.pictures.fit_square"}
    assert names.of(page(("code", "from recap.text import draw")), 5)["draw"] == "recap.text.draw"

def test_every_page_has_its_place_in_the_book(build):
    stems = [p.stem for p in sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))]
    tree = build.toctree(stems)
    assert all(tree.count(f"\n{s}\n") == 1 for s in stems)

class Tags(html.parser.HTMLParser):
    "The ids of a page and where its links go; code that speaks of HTML is text."
    def __init__(self): super().__init__(); self.ids, self.links = set(), []
    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id": self.ids.add(value)
            elif name in ("href", "src"): self.links.append(value)

    @classmethod
    def of(cls, text): tags = cls(); tags.feed(text); return tags

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")/"book"
    done = subprocess.run([sys.executable, str(ROOT/"docs/build.py"), "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out

@pytest.mark.slow
def test_no_link_inside_is_broken_and_every_public_name_has_its_entry(site, build):
    read = {p.relative_to(site).as_posix(): Tags.of(p.read_text(encoding="utf8")) for p in site.rglob("*.html")}
    ids, broken = {name: tags.ids for name, tags in read.items()}, []
    for name, tags in read.items():
        for link in tags.links:
            if re.match(r"[a-z]+:|//", link): continue
            path, _, anchor = link.partition("#")
            to = ((site/name).parent/path.split("?")[0]).resolve() if path else site/name
            if not to.exists(): broken.append((name, link))
            elif anchor and to.suffix == ".html" and anchor not in ids[to.relative_to(site).as_posix()]: broken.append((name, link))
    assert broken == []
    missing = [f"recap.{m}.{n}" for p in (ROOT/"nbs").glob("[0-9]*.ipynb") if (m := build.module_of(build.read_page(p))) for n in build.public_names(m) if f"recap.{m}.{n}" not in ids[f"reference/{m}.html"]]
    assert missing == []
    assert [p.name for p in site.rglob("*.html") if re.search(rf"{re.escape(str(ROOT))}|/tmp/tmp|/tmp/ipykernel", p.read_text(encoding="utf8"))] == []   # folders of the machine that ran it

@pytest.mark.slow
def test_it_reads_well_in_a_browser(site):
    if not Path(CHROMIUM).exists(): pytest.skip(f"no browser at {CHROMIUM}")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(site))
        def log_message(self, *said): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
            tab, said, asked = context.new_page(), [], []
            tab.on("console", lambda m: said.append(m.text)); tab.on("pageerror", lambda e: said.append(str(e))); tab.on("request", lambda r: asked.append(r.url))
            for name in ("index", "11_caption_eval", "17_train", "reference/servers"):
                tab.goto(f"{base}/{name}.html")
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width} pixels"
                assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"), f"a picture of {name} is broken or has no words"
                assert (tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]") < 128) == (scheme == "dark")
            tab.goto(f"{base}/search.html?q=hallucination")
            tab.wait_for_selector("#search-results li a", timeout=20_000)
            found = tab.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
            assert any("11_caption_eval" in x for x in found)
            assert said == [] and [u for u in asked if not u.startswith((base, "data:"))] == []
            context.close()
        browser.close()
    server.shutdown()
