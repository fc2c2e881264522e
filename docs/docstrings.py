"""Docstrings are written to be read in an editor; this makes Markdown of them for the reference pages."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^(?![ ]*$|Raises:).*\n?)*)+", re.MULTILINE)
PARAGRAPH = re.compile(r"(?<!\n)\n(?=Raises:|Defaults:|\w+(?:, \w+)*(?: \[[^\]]*\])?: )")


def as_markdown(text: str) -> str:
    """Roles as code, examples fenced, and a paragraph of its own for each argument and for what is raised.

    >>> as_markdown("See :func:`f`.\\nRaises: ValueError")
    'See `f`.\\n\\nRaises: ValueError'
    """
    text = ROLE.sub(r"`\1`", text)
    parts = []
    end = 0
    for found in EXAMPLE.finditer(text):
        parts += [PARAGRAPH.sub("\n\n", text[end : found.start()]), f"\n```pycon\n{found.group().rstrip()}\n```\n\n"]
        end = found.end()
    return "".join([*parts, PARAGRAPH.sub("\n\n", text[end:])])


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe once an object is complete."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
