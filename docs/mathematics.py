"""Markdown extension: TeX between dollars becomes MathML while the site is built, so that a browser needs no script."""

import html
import re

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

DISPLAYED = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
INLINE = r"(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?![\w$])"


def to_mathml(tex: str, *, displayed: bool) -> str:
    """Returns TeX as a MathML element.

    Raises:
      ValueError: the TeX cannot be parsed, or has a command or an alignment mark that the converter does not know.
    """
    try:
        result = convert(tex.strip(), display="block" if displayed else "inline")
    except Exception as error:
        raise ValueError(f"cannot render {tex!r}: {type(error).__name__} {error}") from error
    unknown = re.findall(r"<m[io][^>]*>(\\[A-Za-z]+|&|&amp;)</m[io]>", result)
    if unknown:
        raise ValueError(f"cannot render {tex!r}: {', '.join(map(html.unescape, unknown))} is not known here")
    # Names of functions are set as in TeX, not with the wide spaces of an operator such as "and".
    result = re.sub(r"<mo>(?=[A-Za-z]{2,}</mo>)", '<mo lspace="0" rspace="0.15em">', result)
    # Browsers read the alignment of cells from styles alone.
    return re.sub(r'<mtd columnalign="(\w+)">', r'<mtd style="text-align: \1">', result)


class _Displayed(Preprocessor):
    """Replaces paragraphs between lines of two dollars."""

    def run(self, lines: list[str]) -> list[str]:
        def stashed(match: re.Match) -> str:
            element = f'<div class="equation">{to_mathml(match[1], displayed=True)}</div>'
            return f"\n{self.md.htmlStash.store(element)}\n"

        return DISPLAYED.sub(stashed, "\n".join(lines)).split("\n")


class _Inline(InlineProcessor):
    """Replaces what stands between single dollars in a line."""

    def handleMatch(self, m: re.Match, data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(to_mathml(m[1], displayed=False)), m.start(0), m.end(0)


class Mathematics(Extension):
    """`$x_t$` in a line, and `$$` on lines of their own around a displayed equation; code is left alone."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After fenced code (25) is set aside; after code in a line (190), before backslashes and emphasis.
        md.preprocessors.register(_Displayed(md), "displayed_mathematics", 24)
        md.inlinePatterns.register(_Inline(INLINE, md), "inline_mathematics", 185)
