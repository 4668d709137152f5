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


def places(target: str) -> list[str]:
    """Return the full names under which a thing of the library may be documented, best first.

    It is found at the top, or where it is defined; a room's page documents it under the name of the room.
    """
    parts = target.split(".")
    public = getattr(invlib, parts[1], None) if len(parts) == 2 else None
    if hasattr(public, "__qualname__"):
        parts = [*public.__module__.split("."), public.__qualname__]
    names = [".".join(parts)]
    if len(parts) > 3:
        names.append(".".join([*parts[:2], *parts[3:]]))
    return [name for name in names if name != target]


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Link a public name to the page that documents it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("invlib."):
        return None
    python = env.get_domain("py")
    for name in places(target):
        found = python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, content)
        if found is not None:
            return found
    return None


def plain_defaults(
    app: Sphinx,
    what: str,
    name: str,
    thing: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Name functions that are defaults, and leave out how a field's default is made and what its rule is."""
    if signature is not None:
        signature = re.sub(r"<function (\w+)[^>]*>", r"\1", signature).replace("<factory>", "...")
    return without_rules(signature), without_rules(returns)


RULE = re.compile(
    r"~?[\w.]*Annotated\[((?:(?!Annotated\[).)+?), ~?invlib\.settings\.Rule\(words=.*?, holds=[^)]*\)\]"
)


def without_rules(text: str | None) -> str | None:
    """Return types as a caller reads them: without the rules by which settings are checked."""
    while text is not None and (plain := RULE.sub(r"\1", text)) != text:
        text = plain
    return text


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", plain_defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
