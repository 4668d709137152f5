"""Let pages refer to the library by its public names: {func}`invlib.observe` for invlib.federated.observe.

And show signatures as they are written: a default such as <function cosine> is no Python, and a signature
with one would be shown with the full path of every type.
"""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import invlib


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Find where a name of the top level is defined, and link there."""
    package, _, name = node.get("reftarget", "").partition(".")
    public = getattr(invlib, name, None) if package == "invlib" and node.get("refdomain") == "py" else None
    if not hasattr(public, "__qualname__"):
        return None
    full_name = f"{public.__module__}.{public.__qualname__}"
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], full_name, node, content)


def plain_defaults(
    app: Sphinx,
    what: str,
    name: str,
    thing: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Name functions that are defaults, and leave out how a field's default is made."""
    if signature is not None:
        signature = re.sub(r"<function (\w+)[^>]*>", r"\1", signature).replace("<factory>", "...")
    return signature, returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", plain_defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
