"""Settings of Sphinx, for `make docs`."""

from importlib.metadata import version as version_of

from stquant_jax import Budget, Storage

project = "stquant-jax"
release = version_of(project)
copyright = "its authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3  # for links to page.md#heading

autodoc_typehints = "none"  # unions written out would hide the names
napoleon_numpy_docstring = False
napoleon_use_param = False  # "b1, b2: ..." stays one entry
napoleon_custom_sections = [("Attributes", "params_style")]  # in the same form

# `name` in a docstring is a link, and has to lead somewhere; of other libraries it is code.
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", r"(flax|jax|numpy|optax|pltpu|plgpu)\..*")]


def setup(app):
    app.connect("autodoc-process-signature", brief)
    app.connect("missing-reference", long_name)


def brief(app, what, name, obj, options, signature, returned):
    """Defaults as they stand in the source."""
    short = {Budget(5.0): "Budget(5.0)", Budget(8.0): "Budget(8.0)", Storage(): "Storage()"}
    for default, text in short.items():
        signature = signature and signature.replace(repr(default), text)
    return signature, returned


def long_name(app, env, node, content):
    """`stquant.adamw`, as docstrings call it, is `stquant_jax.adamw`."""
    head, _, name = node.get("reftarget", "").partition(".")
    if head == "stquant" and node.get("refdomain") == "py":
        target, python = f"stquant_jax.{name}", env.get_domain("py")
        return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)
