"The project holds together: pages, exports, dependencies, scales."
import ast
import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

NBS = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))
SCALES = sorted(p.name for p in (ROOT/"scales").iterdir() if p.is_dir())


def code(page, tagged=None):
    cells = [c for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]
    if tagged: cells = [c for c in cells if tagged in c["metadata"].get("tags", [])]
    return ["".join(c["source"]) for c in cells]


def module_of(page):
    found = re.search(r"^#\| default_exp (\w+)", "\n".join(code(page)), re.M)
    return found.group(1) if found else None


@pytest.mark.parametrize("page", NBS, ids=lambda p: p.stem)
def test_stage_has_one_parameters_cell(page):
    text, tagged = "\n".join(code(page)), code(page, "parameters")
    begins = re.findall(r'^\s*run = begin\("([^"]+)", globals\(\)\)', text, re.M)
    stage = any(re.search(r"^## Run it", "".join(c["source"]), re.M) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown")
    assert len(tagged) == int(stage)
    if not stage: return
    assert begins[-1:] == [page.stem], "a stage begins under its own name"
    from recap.runs import COMMON, page_parameters
    declared = page_parameters(page.stem)
    assert set(COMMON) <= set(declared)
    assert [n for n, p in declared.items() if not p.comment] == [], "each parameter has a comment"
    assert declared["out"].default == f"runs/page/{page.stem}"


@pytest.mark.parametrize("page", NBS, ids=lambda p: p.stem)
def test_what_a_study_launches_needs_nothing_else_of_the_page(page, tmp_path):
    if not code(page, "parameters"): return
    from recap.runs import stage_part
    source = [c["source"] for c in stage_part(page.stem)["cells"]]
    assert "run.finish(" in source[-1]
    (tmp_path/"part.py").write_text("\n".join(source))
    done = subprocess.run([sys.executable, "-m", "pyflakes", str(tmp_path/"part.py")], capture_output=True, text=True)
    assert [line for line in done.stdout.split("\n") if "undefined name" in line] == []


def test_pages_import_only_downwards():
    from recap.runs import _imports
    order = {module_of(p): i for i, p in enumerate(NBS)}
    wrong = [f"{page.stem} imports {m}" for i, page in enumerate(NBS) for cell in code(page) if "#| export" in cell
             for m in _imports(cell) if order.get(m, -1) >= i]
    assert wrong == []


@pytest.mark.parametrize("page", sorted((ROOT/"nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_page_is_small_and_clean(page):
    assert page.stat().st_size < 200*1024
    nb = json.loads(page.read_text())
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    outputs = json.dumps([c.get("outputs") for c in nb["cells"] if c["cell_type"] == "code"])
    assert str(ROOT) not in outputs and "/tmp/" not in outputs and "/home/" not in outputs, "a stored output names a folder of a machine"
    assert '"output_type": "error"' not in outputs


def test_export_and_clean_leave_no_difference(tmp_path):
    shutil.copytree(ROOT, tmp_path/"copy", ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__", ".pytest_cache", "*.egg-info", "_proc"))
    copy = tmp_path/"copy"
    tools = "from nbdev.doclinks import nbdev_export; nbdev_export(); from nbdev.clean import nbdev_clean; nbdev_clean()"
    done = subprocess.run([sys.executable, "-c", tools], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = lambda root: {p.relative_to(root).as_posix(): p.read_bytes() for d in ("nbs", "recap") for p in (root/d).rglob("*")
                          if p.suffix in (".py", ".ipynb") and "checkpoint" not in str(p)}
    before, after = files(ROOT), files(copy)
    assert sorted(before.keys() ^ after.keys()) == []
    assert [n for n in before if before[n] != after[n]] == []


def test_pyflakes_is_silent():
    done = subprocess.run([sys.executable, "-m", "pyflakes", str(ROOT/"recap")], capture_output=True, text=True)
    assert done.stdout == ""


def settings():
    c = configparser.ConfigParser()
    c.read(ROOT/"settings.ini")
    return c["DEFAULT"]


def test_dependencies_agree():
    s, project = settings(), tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    assert project["dependencies"] == s["requirements"].split()
    extras = {k.removesuffix("_requirements"): v.split() for k, v in s.items() if k.endswith("_requirements")}
    given = dict(project["optional-dependencies"])
    assert given.pop("all") == [f"recap[{','.join(extras)}]"]
    assert given == extras
    assert (project["name"], project["version"], project["requires-python"]) == (s["lib_name"], s["version"], f">={s['min_python']}")
    assert s["allowed_cell_metadata_keys"] == "tags" and s["clear_all"] == "False" and s["update_pyproject"] == "False"
    import recap
    assert recap.__version__ == s["version"]
    conda = yaml.safe_load((ROOT/"environment.yml").read_text())
    assert f"python>={s['min_python']}" in conda["dependencies"] and {"pip": ["-e .[all]"]} in conda["dependencies"]


def test_the_library_imports_only_what_the_core_installs():
    name = lambda r: re.split(r"[<>=~!\[]", r)[0].lower().replace("_", "-")
    core = {name(r) for r in settings()["requirements"].split()}
    optional = {name(r) for extra in ("servers", "vote") for r in settings()[f"{extra}_requirements"].split()}
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for path in sorted((ROOT/"recap").glob("*.py")):
        tree = ast.parse(path.read_text())
        tried = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) and any("ImportError" in ast.dump(h) for h in t.handlers) for n in t.body}   # what says what to install
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"recap"}:
                if not {o.lower().replace("_", "-") for o in owners.get(top, [])} & (core | optional if id(node) in tried else core): missing.add(f"{path.name}: {top}")
    assert sorted(missing) == []


@pytest.mark.parametrize("scale", SCALES)
def test_scale_names_only_what_its_pages_declare(scale):
    from recap.runs import check_parameters
    from recap.study import read_stage, study_graph
    graph = study_graph(scale)
    for stage in graph:
        page, params = read_stage(scale, stage)
        check_parameters(page, params, complete=True)
        assert params["out"] == f"runs/{scale}/{stage}", stage
    extra = {p.stem for p in (ROOT/"scales"/scale).glob("*.yaml")} - set(graph) - {"budget"}
    assert extra == set()
    budget = yaml.safe_load((ROOT/"scales"/scale/"budget.yaml").read_text())
    assert set(budget) == set(graph)
    for name, todo in graph.items(): assert set(todo.get("needs", [])) <= set(graph), name


def test_ci_runs_the_readmes_test_command():
    assert "exec make test" in (ROOT/".ci/run").read_text()
    assert "make test" in (ROOT/"README.md").read_text()
