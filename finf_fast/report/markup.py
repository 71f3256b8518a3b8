"""HTML that cannot be injected into: text becomes markup only through ``tag``, which escapes it."""

from __future__ import annotations

from html import escape

VOID = {"img", "meta"}  # elements without a closing tag


class Html(str):
    """Markup that is safe to place as it is."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``; children that are not :class:`Html` are escaped, None is left out.

    ``class_`` is written ``class``; underscores become hyphens; an attribute that is None or False is left out.
    """
    given = {key.rstrip("_").replace("_", "-"): v for key, v in attributes.items() if v is not None and v is not False}
    head = "".join(f" {key}" if v is True else f' {key}="{escape(str(v))}"' for key, v in given.items())
    return Html(f"<{name}{head}>" if name in VOID else f"<{name}{head}>{join(children)}</{name}>")


def join(children: object, between: str = "") -> Html:
    """The children one after the other, each escaped unless it is markup."""
    return Html(between.join(c if isinstance(c, Html) else escape(str(c)) for c in children if c is not None))
