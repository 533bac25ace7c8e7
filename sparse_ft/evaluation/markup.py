"""HTML and SVG text, escaped by construction.

    tag("td", user_text, class_="name", title=user_text)

Every child that is not `Markup` is escaped, and so is every attribute value, so a model named `<script>` is only a
strange name.
"""

from __future__ import annotations

import html
from typing import Any

_VOID = ("meta", "link", "br", "line", "rect", "circle", "path")


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element. Children that are None are left out, and so are attributes that are None or False.

    Args:
        name: element name, `"td"`, `"rect"`.
        children: `Markup` as it is, anything else as escaped text.
        attributes: a trailing underscore is dropped and others become hyphens: `class_`, `aria_label`, `stroke_width`.

    Example:
        >>> tag("b", "<i>", class_="x")
        '<b class="x">&lt;i&gt;</b>'
    """
    written = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Children one after the other, escaped unless they are `Markup`; None is left out."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None))


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    if isinstance(value, float):
        value = f"{value:.6g}" if name != "data-value" and name != "value" else repr(value)
    return f' {name}="{html.escape(str(value), quote=True)}"'
