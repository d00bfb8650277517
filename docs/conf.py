"Settings of Sphinx for the book; docs/build.py writes what it reads."
project, author, copyright = "recap", "recap contributors", "2026 onwards, recap contributors"
extensions = ["myst_nb", "sphinx_copybutton"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
exclude_patterns = ["notebooks", "files"]
nb_execution_mode = "off"          # outputs are those of the runs
nb_merge_streams = True
nb_render_markdown_format = "myst"   # tables in outputs
nb_code_prompt_show = "{type}"
myst_enable_extensions = ["colon_fence", "dollarmath", "attrs_block"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "recap"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["recap.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"source_repository": "https://github.com/recap/recap", "source_branch": "main", "source_directory": "nbs/"}
copybutton_exclude = ".linenos, .gp"
python_use_unqualified_type_names = True
html_math_renderer = "mathml"


def _math(self, node):
    from latex2mathml.converter import convert
    block = node.__class__.__name__ == "math_block"
    self.body.append(convert(node.astext(), display="block" if block else "inline"))
    from docutils.nodes import SkipNode
    raise SkipNode


def setup(app): app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
