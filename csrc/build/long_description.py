"""README as a package index shows it, where a link to a file of the repository leads nowhere."""

from __future__ import annotations

import re

_TARGET = r"(?!#|/|[a-z][a-z0-9+.-]*:)[^)\s\"]+"  # relative
_CODE = r"(?P<code>```.*?```|~~~.*?~~~|`[^`\n]+`)"
_TEXT = r"(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*"  # of a link: words, or a picture
_LINK = rf"(?P<bang>!?)\[(?P<text>{_TEXT})\]\((?P<target>{_TARGET})(?P<title>\s+\"[^\"]*\")?\)"
_TAG = rf"(?P<tag><(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"(?P<path>{_TARGET})\"[^>]*>)"
_PIECE = re.compile(f"{_CODE}|{_LINK}|{_TAG}", re.DOTALL)


def long_description(readme: str, repository: str | None) -> str:
    """The README with links that work anywhere.

    Args:
        readme: Markdown whose relative links are paths in the repository.
        repository: where it is published, e.g. "https://github.com/OWNER/NAME": links lead there.
            None: it is not, and what they point at is named in words. A picture leaves its
            description.
    """

    def replaced(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["tag"]:
            picture = not match["tag"].startswith("<a")
            if repository is None:
                return "" if picture else "<a>"
            return match[0].replace(match["path"], _absolute(repository, match["path"], picture))
        text, target, picture = match["text"], match["target"], bool(match["bang"])
        if not picture:
            text = _PIECE.sub(replaced, text)
        if repository is None:
            named = picture or target in text
            return text if named else f"{text} ({target})"
        url = _absolute(repository, target, picture)
        return f"{match['bang']}[{text}]({url}{match['title'] or ''})"

    return _PIECE.sub(replaced, readme)


def _absolute(repository: str, path: str, picture: bool) -> str:
    return f"{repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{path.removeprefix('./')}"
