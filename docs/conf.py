"""How Sphinx builds the pages of this folder: `make docs`."""

project = "randlora"
author = "the randlora authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "randlora"

myst_heading_anchors = 3  # links to headings are written as GitHub makes them
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


def setup(app):
    """Leaves the fields of named tuples to the "Attributes" of their docstrings: autodoc would list them once more."""
    app.connect("autodoc-skip-member", lambda *event: type(event[3]).__name__ == "_tuplegetter" or None)
