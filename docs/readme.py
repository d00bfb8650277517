"Write README.md from nbs/index.ipynb: `make readme`. Pictures go to docs/readme/."
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def shown(cell) -> bool:
    "Is the cell for readers of the README?"
    return not re.search(r"^#\|\s*(hide|default_exp|export)\s*$", cell.source, re.M)


def main():
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if shown(c)]
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        if re.search(r"^#\|\s*echo:\s*false\s*$", cell.source, re.M): cell.source = ""
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:  # one copy of a picture is enough
                for kind in ("image/jpeg", "text/plain"): data.pop(kind, None)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    folder = ROOT/"docs/readme"
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in resources["outputs"].items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
        text = text.replace(f"({name})", f"(docs/readme/{name})")
    text = re.sub(r"\]\((\d\w+)\.(?:ipynb|html)\)", r"](nbs/\1.ipynb)", text)  # links between pages
    text = re.sub(r"```python\s*```\n*", "", text).replace("](../", "](")  # what lies beside nbs/
    (ROOT/"README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf8")


if __name__ == "__main__": main()
