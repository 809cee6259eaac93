"""The OpenAPI document as a page that needs no other server and no script."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem;color:#222}
code,pre{font:14px/1.4 ui-monospace,monospace;background:#f4f4f2;border-radius:4px;
padding:.1em .3em}
pre{padding:1em;overflow:auto}table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}
h2{margin-top:2.5rem}.verb{color:#fff;background:#2a6;padding:.1em .5em;border-radius:4px}
.post{background:#26a}details{margin:.5rem 0}
"""


def render(document: Mapping[str, Any]) -> str:
    """An OpenAPI 3.1 document as HTML: operations, form fields, answers and schemas."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        _prose(info.get("description", "")),
        '<p>The same for machines: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, operations in document["paths"].items():
        parts += [_operation(path, verb, operation) for verb, operation in operations.items()]
    parts.append("<h2>Schemas</h2>")
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        parts.append(
            f'<details id="{escape(name)}"><summary>{escape(name)}</summary>'
            f"<pre>{text}</pre></details>"
        )
    return "\n".join(parts)


def _operation(path: str, verb: str, operation: Mapping[str, Any]) -> str:
    parts = [
        f'<h2><span class="verb {verb}">{verb.upper()}</span> <code>{escape(path)}</code></h2>',
        f"<p><b>{escape(operation.get('summary', ''))}</b></p>",
        _prose(operation.get("description", "")),
    ]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        rows = [
            (f"<code>{escape(name)}</code>", _type(field), _words(field.get("description", "")))
            for name, field in body["schema"]["properties"].items()
        ]
        parts.append(f"<p>Body: <code>{escape(media)}</code></p>" + _table(rows))
    rows = [
        (
            escape(status),
            "<br>".join(
                f"<code>{escape(media)}</code> {_reference(content.get('schema', {}))}"
                for media, content in answer.get("content", {}).items()
            ),
            _words(answer["description"]),
        )
        for status, answer in operation["responses"].items()
    ]
    return "\n".join([*parts, "<p>Answers</p>", _table(rows)])


def _type(schema: Mapping[str, Any]) -> str:
    items = schema.get("items", schema)
    kind = "file" if items.get("contentMediaType") else str(items.get("type", ""))
    if items is not schema:
        kind += ", repeatable"
    limits = [f"{k} {schema[k]}" for k in ("minimum", "maximum", "default") if k in schema]
    return escape(", ".join([kind, *limits]))


def _reference(schema: Mapping[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f'<a href="#{escape(name)}">{escape(name)}</a>' if name else ""


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table>" + "".join(cells) + "</table>"


def _prose(text: str) -> str:
    """Paragraphs; indented ones are shown as they stand."""
    blocks = (block for block in text.split("\n\n") if block.strip())
    return "".join(
        f"<pre>{escape(block)}</pre>" if block.startswith("    ") else f"<p>{_words(block)}</p>"
        for block in blocks
    )


def _words(text: str) -> str:
    """Text whose `code` is set as such."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
