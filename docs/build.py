"""The rendered book: pages with the outputs of their runs, and a reference of every public name. `make docs`

    python docs/build.py [--run runs/cpu] [--out _docs]

A page is shown with the outputs that are saved in it; what stands between its parameters and its end is shown as the named run's stage
made it. Nothing is executed here, and nothing is downloaded.
"""
import argparse, ast, html, importlib, inspect, json, re, shutil, sys, tempfile
from pathlib import Path

from fastcore.docments import docments, empty

ROOT = Path(__file__).resolve().parent.parent
PARTS = (("00", "The start"), ("01b", "A world of which all is known"), ("05", "Words and scorers"), ("08", "Captions"), ("13", "Pictures"), ("19", "The verdict"), ("27", "At work"))   # first page, title
URL = "https://github.com/recap/recap"


# What is public, and where
def module_of(nb) -> str:
    found = re.search(r"^#\|\s*default_exp (\w+)", "\n".join(c["source"] for c in nb["cells"] if c["cell_type"] == "code"), re.M)
    return found.group(1) if found else ""

def read_page(path) -> dict:
    nb = json.loads(path.read_text(encoding="utf8"))
    for c in nb["cells"]: c["source"] = "".join(c["source"])
    return nb

def public_names(module:str) -> dict:
    "Name -> object of a module, with the methods that pages patch in: `Server.ask`."
    m = importlib.import_module(f"recap.{module}")
    return {n: getattr(m, n) for n in getattr(m, "__all__", [])}

def methods_of(cls) -> dict:
    mine = lambda f: getattr(inspect.unwrap(f.fget if isinstance(f, property) else getattr(f, "func", f)), "__module__", "").startswith("recap.")
    found = {n: f for n, f in vars(cls).items() if not n.startswith("_") and (inspect.isfunction(f) or isinstance(f, (property, classmethod, staticmethod)) or type(f).__name__ == "cached_property")}
    return {n: f for n, f in found.items() if mine(getattr(f, "__func__", f))}


# The reference: one page a module
def _anno(a) -> str: return "" if a is inspect.Parameter.empty or a is empty else a if isinstance(a, str) else getattr(a, "__name__", str(a)).replace("typing.", "")

def signature(f) -> str:
    try: s = inspect.signature(f)
    except (ValueError, TypeError): return "()"
    one = lambda p: ("*" if p.kind == p.VAR_POSITIONAL else "**" if p.kind == p.VAR_KEYWORD else "") + p.name + ("" if p.default is p.empty else "=" + short(p.default))
    return f"({', '.join(one(p) for p in s.parameters.values() if p.name not in ('self', 'cls'))})"

def short(x) -> str:
    said = getattr(x, "__name__", None) or repr(x)
    said = re.sub(r"<[^>]*>|object at 0x\w+", "…", said)
    return said if len(said) < 40 else said[:36] + "…"

def _cell(text) -> str: return html.escape(" ".join(str(text or "").split()), quote=False).replace("|", "\\|").replace("$", "\\$").replace("*", "\\*").replace("_", "\\_")

def parameter_table(f) -> str:
    try: docs = docments(f, full=True, returns=True)
    except Exception: return ""
    rows = [(f"`{n}`", _cell(_anno(d.anno)), "" if d.default is inspect.Parameter.empty or d.default is empty else f"`{short(d.default)}`".replace("|", "&#124;"), _cell(d.docment)) for n, d in docs.items() if n not in ("self", "cls", "return")]
    columns = [i for i in range(4) if any(r[i] for r in rows)]   # a column with nothing in it is not shown
    line = lambda cells: "| " + " | ".join(cells[i] for i in columns) + " |\n"
    table = "\n" + line(("parameter", "type", "default", "what")) + "|---"*len(columns) + "|\n" + "".join(map(line, rows)) if len(columns) > 1 else ""
    back = docs.get("return")
    said = f"\nReturns {_cell(_anno(back.anno)) or 'a value'}{': ' + _cell(back.docment) if back.docment else ''}.\n" if back is not None and (back.docment or _anno(back.anno) not in ("", "None")) else ""
    return table + said

def says(x) -> str:
    said = (inspect.getdoc(x) or "").strip()
    return "" if said.startswith(f"{getattr(x, '__name__', ' ')}(") else _cell(said)

def entry(name:str, x) -> str:
    "One name as a directive of Sphinx's Python domain."
    if inspect.isclass(x):
        inner = "".join(f"\n::::{{py:{'property' if not inspect.isfunction(getattr(f, '__func__', f)) else 'method'}}} {n}{signature(getattr(f, '__func__', f)) if inspect.isfunction(getattr(f, '__func__', f)) else ''}\n{says(f)}\n{parameter_table(getattr(f, '__func__', f)) if inspect.isfunction(getattr(f, '__func__', f)) else ''}\n::::\n"
                        for n, f in methods_of(x).items())
        own = "__init__" in vars(x) or hasattr(x, "__dataclass_fields__")
        return f":::::{{py:class}} {name}{signature(x) if own and not issubclass(x, BaseException) else ''}\n{says(x)}\n{parameter_table(x if hasattr(x, '__dataclass_fields__') else x.__init__) if own else ''}{inner}\n:::::\n"
    if callable(x): return f":::::{{py:function}} {name}{signature(x)}\n{says(x)}\n{parameter_table(x)}\n:::::\n"
    return f":::::{{py:data}} {name}\n`{short(x).replace('`', '')}`\n:::::\n"

def reference(module:str, page:str, title:str) -> str:
    m = importlib.import_module(f"recap.{module}")
    return (f"# recap.{module}\n\n{_cell(m.__doc__)} Taught on the page [{title}](../{page}.ipynb).\n\n:::{{py:module}} recap.{module}\n:::\n:::{{py:currentmodule}} recap.{module}\n:::\n\n"
            + "\n".join(entry(n, x) for n, x in public_names(module).items()))


# The pages
class Names:
    "Which word of a page means which name."
    def __init__(self, homes): self.homes = homes   # name -> [(place in the book, module)]

    def of(self, nb, place:int) -> dict: # word -> full name, for what the page imports or defines, and for long names that only one page defines
        known, code = {}, "\n".join(c["source"] for c in nb["cells"] if c["cell_type"] == "code")
        for name, homes in self.homes.items():
            if len(homes) == 1 and re.search(r"_|[A-Z]", name): known[name] = f"recap.{homes[0][1]}.{name}"
            if own := [m for at, m in homes if at == place]: known[name] = f"recap.{own[0]}.{name}"
        for m, names in re.findall(r"^\s*from recap\.(\w+) import \(?([\w, \n]+)\)?", code, re.M):
            known |= {n: f"recap.{m}.{n}" for n in re.split(r"[,\s]+", names) if any(h[1] == m for h in self.homes.get(n, []))}
        local = set(re.findall(r"^\s*(?:for |with .* as )?(\w+)(?:, \w+)* (?:=|in) ", code, re.M)) | set(re.findall(r"^\s*\w+(?:, \w+)*, (\w+) (?:=|in) ", code, re.M))
        return {n: full for n, full in known.items() if n not in local or n.isupper()}

def in_prose(text:str, known:dict) -> str:
    "Names in backticks become references; code blocks stay."
    def one(m):
        word = m[1].removesuffix("()")
        head, _, rest = word.partition(".")
        if head == "recap" and rest: word = rest.split(".")[-1]
        if word in known and re.fullmatch(r"\w{3,}", word): return f"{{py:obj}}`{m[1]} <{known[word]}>`"
        return m[0]
    return "".join(part if i % 2 else re.sub(r"(?<![`{}\w])`([\w.]+(?:\(\))?)`(?!`)", one, part) for i, part in enumerate(re.split(r"(^```.*?^```)", text, flags=re.M | re.S)))

def only_checks(source:str) -> bool:
    "Is the cell nothing but assertions?"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    test = lambda n: isinstance(n, ast.Assert) or isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and getattr(n.value.func, "id", "").startswith("test_")
    return bool(body) and all(map(test, body))

def clean_outputs(outputs, scrub) -> list:
    kept = []
    for o in outputs:
        if o["output_type"] == "stream" and o.get("name") == "stderr": continue
        if data := o.get("data"):
            data = {k: v for k, v in data.items() if "widget" not in k}
            best = next((k for k in ("image/svg+xml", "image/png", "image/jpeg", "text/html", "text/markdown") if k in data), None)
            if not data: continue
            o = o | {"data": {best: data[best]} if best else data}
        kept.append(o)
    return json.loads(scrub(json.dumps(kept)))

def scrubber():
    "Folders of this machine never reach a reader."
    known = [(str(ROOT) + "/", ""), (str(ROOT), "."), (str(Path.home()) + "/", "~/")]
    def scrub(text):
        for a, b in known: text = text.replace(a, b) if len(a) > 2 else text
        return re.sub(r"/tmp/[\w./-]*", "…", text)
    return scrub

def stage_outputs(page:str, run:Path) -> tuple: # cell id -> outputs, name of the stage, its parameters
    found = sorted(p for p in run.glob("*/run.json") if json.loads(p.read_text()).get("page") == page and p.with_name("page.ipynb").exists())
    best = next((p for end in ("dsc95", "dsc", "") for p in found if p.parent.name.endswith(end)), None)
    if not best: return {}, "", {}
    nb = read_page(best.with_name("page.ipynb"))
    return {c["id"]: c["outputs"] for c in nb["cells"] if c["cell_type"] == "code"}, best.parent.name, json.loads(best.read_text())["params"]

def alt_text(cells:list, i:int) -> str:
    "The last sentence of the words above a picture."
    for c in reversed(cells[:i]):
        if c["cell_type"] == "markdown" and (text := re.sub(r"[`*_#>\[\]]|\([^)]*\)|\{[^}]*\}", "", c["source"]).strip()):
            return " ".join(re.split(r"(?<=[.:?!])\s+", text)[-1].split())[:180]
    return "picture"

def convert(path:Path, nb:dict, known:dict, run:Path, scrub) -> dict:
    "A page as the site shows it."
    made, stage, given = stage_outputs(path.stem, run)
    cells, parameters = [], False
    for c in nb["cells"]:
        source, tags = c["source"], []
        if c["cell_type"] == "markdown":
            source = re.sub(r"\]\(#([\w-]+)\)", lambda m: f"](#{m[1].lower()})", source)   # Jupyter keeps capitals, the site does not
            source = re.sub(r"\]\(\.\./(data/\S+?\.(?:png|jpg|svg))\)", r"](files/\1)", source)
            source = re.sub(r"\]\(\.\./(\S+?)\)", rf"]({URL}/blob/main/\1)", source)
            for line in re.findall(r"!\[[^\]]*\]\(files/(\S+?)\)", source): (copy := SOURCE/"files"/line).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/line, copy)
            cells.append({"cell_type": "markdown", "id": c["id"], "metadata": {}, "source": in_prose(source, known)})
            continue
        marks = {m.split(":")[0].strip() for m in re.findall(r"^#\|\s*(.+)$", source, re.M)}
        plain = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if "parameters" in c["metadata"].get("tags", []):
            parameters = True
            if stage:
                changed = [f"`{k} = {v!r}`" for k, v in given.items() if k not in ("out", "threads") and re.search(rf"^{k} = ", plain, re.M) and not re.search(rf"^{k} = {re.escape(json.dumps(v))}\s*(#|$)", plain, re.M)]
                cells.append({"cell_type": "markdown", "id": f"{c['id']}-run", "metadata": {}, "source": f":::{{note}}\nThe results below are those of the stage `{stage}` of the study at scale `{run.name}`, which set {', '.join(changed) or 'nothing otherwise'}.\n:::"})
        if "hide" in marks or any(m.startswith("default_exp") for m in marks): continue
        outputs = c["outputs"]
        if parameters and c["id"] in made: outputs = made[c["id"]]
        imports = "export" in marks and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(plain).body)
        if imports or not plain and not outputs: continue
        if "echo" in marks: tags = ["remove-input"]
        elif "export" in marks or only_checks(plain): tags = ["hide-input"]
        defined = [known[n.name] for n in ast.parse(plain).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in known] if marks & {"export", "exports"} else []
        meta = {"tags": tags} | ({"mystnb": {"image": {"alt": alt_text(cells, len(cells))}}})
        if "hide-input" in tags: meta["mystnb"] |= dict.fromkeys(("code_prompt_show", "code_prompt_hide"), "The checks" if only_checks(plain) else f"Plumbing: {', '.join(d.split('.')[-1] for d in defined) or 'code'}")
        cells.append({"cell_type": "code", "id": c["id"], "metadata": meta, "execution_count": None, "source": plain, "outputs": clean_outputs(outputs, scrub)})
        if defined: cells.append({"cell_type": "markdown", "id": f"{c['id']}-ref", "metadata": {}, "source": "{.reference}\n" + " · ".join(f"{{py:obj}}`{d.split('.')[-1]} <{d}>`" for d in defined)})
    if path.stem != "index":
        cells.insert(1, {"cell_type": "markdown", "id": "run-this", "metadata": {}, "source": f"{{.run}}\nRun this page: `make lab`, then open `nbs/{path.name}` · {{download}}`the notebook <notebooks/{path.name}>`"})
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": nb["metadata"]["kernelspec"], "language_info": {"name": "python"}}, "cells": cells}

def part_of(stem:str) -> str: return [title for first, title in PARTS if first <= stem][-1]

def toctree(stems:list) -> str:
    groups = {}
    for s in stems: groups.setdefault(part_of(s), []).append(s)
    tree = lambda caption, lines: f"```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n" + "\n".join(lines) + "\n```\n"
    return "\n".join(tree(name, [s for s in groups[name]]) for _, name in PARTS if name in groups) + "\n" + tree("Reference", ["reference/index"])

def write_source(run:Path):
    "All that Sphinx reads."
    source = SOURCE
    for name in ("reference", "notebooks"): (source/name).mkdir(parents=True)
    paths = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))
    pages = {p: read_page(p) for p in paths}
    titles = {p.stem: next(re.match(r"# (.+)", c["source"])[1] for c in nb["cells"] if c["cell_type"] == "markdown") for p, nb in pages.items()}
    modules, homes = {m: p.stem for p, nb in pages.items() if (m := module_of(nb))}, {}
    for m, stem in modules.items():
        for n in public_names(m): homes.setdefault(n, []).append((paths.index(ROOT/"nbs"/f"{stem}.ipynb"), m))
        (source/"reference"/f"{m}.md").write_text(reference(m, stem, titles[stem]), encoding="utf8")
    lines = "\n".join(f"- [recap.{m}]({m}.md): {_cell(importlib.import_module(f'recap.{m}').__doc__)}" for m in modules)
    (source/"reference/index.md").write_text(f"# Reference\n\nEvery public name of the library, module by module; each module is exported from the page of the book that teaches it.\n\n{lines}\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(modules) + "\n```\n", encoding="utf8")
    names, scrub = Names(homes), scrubber()
    known = {}
    for i, (p, nb) in enumerate(pages.items()):
        known[p.stem] = names.of(nb, i)
        (source/p.name).write_text(json.dumps(convert(p, nb, known[p.stem], run, scrub)), encoding="utf8")
        shutil.copy(p, source/"notebooks"/p.name)
    index = read_page(ROOT/"nbs/index.ipynb")
    front = convert(ROOT/"nbs/index.ipynb", index, {}, run, scrub)
    front["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": toctree([p.stem for p in paths])})
    (source/"index.ipynb").write_text(json.dumps(front), encoding="utf8")
    for name in ("conf.py", "static"): (shutil.copytree if name == "static" else shutil.copy)(ROOT/"docs"/name, source/name)
    return known

def link_code(known:dict, site:Path):
    "Names in the code of a page lead to the reference."
    for stem, names in known.items():
        path = site/f"{stem}.html"
        text = path.read_text(encoding="utf8")
        def one(m):
            full = names.get(m[2])
            return f'<a class="name" href="reference/{full.split(".")[1]}.html#{full}">{m[0]}</a>' if full else m[0]
        block = lambda m: re.sub(r'<span class="(n|nf|nc)">(\w{3,})</span>', one, m[0])
        path.write_text(re.sub(r'<div class="highlight"><pre>.*?</pre></div>', block, text, flags=re.S), encoding="utf8")

def main(args=None):
    global SOURCE
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--run", default="runs/cpu", help="the study whose stages the pages show")
    ask.add_argument("--out", default="_docs", help="where the site goes")
    given = ask.parse_args(args)
    out = (ROOT/given.out).resolve()
    with tempfile.TemporaryDirectory() as box:
        SOURCE = Path(box)/"source"
        known = write_source(ROOT/given.run)
        from sphinx.cmd.build import build_main
        made = Path(box)/"made/html"
        if code := build_main(["-q", "-W", "--keep-going", "-j", "auto", "-b", "html", "-d", f"{box}/doctrees", str(SOURCE), str(made)]): sys.exit(code)
        link_code(known, made)
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)   # the old book stays until the new one is whole
    print(out/"index.html")

if __name__ == "__main__": main()
