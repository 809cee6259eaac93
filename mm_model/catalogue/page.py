"""The data card and patches to look at, as one HTML page that needs nothing but itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape

from markdown_it import MarkdownIt

# Nothing is fetched and nothing runs, whatever a name in the data may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:2.2rem}img{max-width:100%}code,pre{font:13px/1.4 ui-monospace,monospace;
background:#f4f4f2;border-radius:4px;padding:.1em .3em}pre{padding:1em;overflow:auto}
pre code{padding:0;background:none}
table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;
padding:.25rem .6rem;text-align:left;vertical-align:top}.wide{overflow-x:auto}
.sheet td,.sheet th{padding:.3rem;font-weight:400}.sheet th[colspan]{font-weight:600;
background:#f4f4f2}.sheet img{width:120px;height:auto;image-rendering:pixelated;
border:1px solid #bbb}
.sheet td{font-size:12px;color:#555}.legend dt{font-weight:600;float:left;width:5rem}
.legend dd{margin:0 0 .3rem 5rem}.legend img{vertical-align:middle}
.class{white-space:nowrap;margin-right:.8rem}.class i{display:inline-block;width:.9em;height:.9em;
border:1px solid #999;margin-right:.3em;vertical-align:-.1em}
"""


def page(title: str, card: str, pictures: Mapping[str, bytes], sheets: str) -> str:
    """HTML.

    Args:
        title: of the page.
        card: Markdown, as `data_card` gives it; HTML in it is shown, not used.
        pictures: PNGs that the card names; each is put into the page itself.
        sheets: HTML, as `sheets.sheets` gives it.
    """
    text = MarkdownIt("commonmark", {"html": False}).enable("table").render(card)
    for name, content in pictures.items():
        text = text.replace(
            f'src="{escape(name)}"', f'src="data:image/png;base64,{b64encode(content).decode()}"'
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<body><p><a href="#patches">patches to look at</a></p>{text}'
        f'<h2 id="patches">Patches</h2>{sheets}</body></html>\n'
    )
