"Each page runs from top to bottom with its default parameters."
import re
import time

import nbformat
import pytest
from conftest import ROOT, borrow, environment

PAGES = sorted((ROOT/"nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return borrow(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page(page, folder):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb = nbformat.read(page, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(eval:\s*false|slow)", c.source, re.M)]
    began = time.time()
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(page.parent)}})
    try: client.execute(env=environment(folder))
    except CellExecutionError as e: pytest.fail(f"{page.name}: {str(e)[-3000:]}", pytrace=False)
    print(f"{page.stem}: {time.time() - began:.0f} s")
