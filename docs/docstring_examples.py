"""Griffe extension: the section `Example:` of our docstrings is shown as code, as `Examples:` is."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):  # type: ignore[misc]
    """Rename the section before the docstring is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every object that was read, with its docstring still unparsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
