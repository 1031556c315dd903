"""A batch as HTML: the page that `amt preview --html` writes, and the same rows as a part of a notebook.

The page has a dark and a light theme. Neither loads anything from the network, and all text is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from automodel_trainer.data.preview_rows import Document, PreviewCounts, Row, Token, runs

COLOURS = {"trained": "var(--trained)", "masked": "var(--masked)", "padding": "var(--padding)"}
BLANK = re.compile("[·↵⇥␍⍽⋯]")
THUMBNAIL = 160  # pixels on the longer side

PicturesOf = Callable[[int], Sequence[Any]]
"""The pictures (PIL) of a row of the data, in order."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>First batch</title>
<style>{style}</style>
</head>
<body>
<header>
<div class="head"><h1>First batch</h1><button id="theme" type="button">dark / light</button></div>
<div class="cards">{cards}</div>
{legend}
</header>
<main>{rows}</main>
<div id="tip" hidden></div>
<script>{script}</script>
</body>
</html>
"""

LEGEND = """<p class="legend"><span class="t trained">trained</span><span class="t masked">masked</span>
<span class="t trained special">special, trained</span><span class="t masked special">special, masked</span>
<span class="note"><b>·</b> space &nbsp; <b>↵</b> line feed &nbsp; <b>⋯</b> part of a character
&nbsp; the label of a token is the token itself, predicted from the tokens before it</span></p>"""

PAGE_STYLE = """
:root{color-scheme:light;--bg:#f6f7f9;--card:#fff;--ink:#1b1f26;--soft:#667085;--line:#e3e6eb;
--trained:#2da160;--trained-bg:#d3f3df;--trained-ink:#0c4a26;--masked:#b6bdc9;--masked-bg:#eef0f4;--masked-ink:#5b6472;
--special-bg:#f7b538;--special-ink:#432c00;--special-masked-bg:#fdecc4;--special-masked-ink:#8a5a00;--padding:#e3e6eb}
:root.dark{color-scheme:dark;--bg:#0f1216;--card:#171b21;--ink:#e6e9ee;--soft:#8b94a3;--line:#272d36;
--trained:#2ea862;--trained-bg:#14452a;--trained-ink:#c9f5da;--masked:#4a5260;--masked-bg:#222831;--masked-ink:#97a1b0;
--special-bg:#c98a12;--special-ink:#1d1300;--special-masked-bg:#3b2e12;--special-masked-ink:#d9a946;--padding:#272d36}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
.head{display:flex;justify-content:space-between;align-items:center}
h1{font-size:22px;margin:0}
button{font:inherit;font-size:13px;color:var(--soft);background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:4px 12px;cursor:pointer}
#tip{position:fixed;z-index:2;background:var(--ink);color:var(--bg);border-radius:8px;padding:8px 12px;max-width:340px;
font:12px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;pointer-events:none;white-space:pre;
box-shadow:0 6px 20px #0004}
"""

# Inside of other pages: colours that let light and dark ones through, and the numbers of a token without a script.
PART_STYLE = """
--card:transparent;--ink:currentColor;--soft:#888;--line:#8885;--trained:#2da160;--trained-bg:#2da16048;
--trained-ink:inherit;--masked:#8889;--masked-bg:#8882;--masked-ink:#888;--special-bg:#f7b538a0;--special-ink:inherit;
--special-masked-bg:#f7b53838;--special-masked-ink:#b07f1c;--padding:#8883;max-width:1080px;
.tokens .t{position:relative}
.tokens .t:hover::after{content:"index, id, position, label: " attr(data-t);position:absolute;left:0;top:100%;z-index:2;
background:#1b1f26;color:#e6e9ee;border-radius:6px;padding:2px 8px;font-size:12px;white-space:nowrap}
"""

ROWS_STYLE = """
h2{font-size:15px;margin:0}
h2 small,h3 small{font-weight:400;color:var(--soft);margin-left:8px;font-size:13px}
h3{font-size:13px;margin:0 0 8px;color:var(--soft);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin:18px 0 12px}
.cards div,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.cards div{padding:12px 16px}
.cards b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}
.cards span{color:var(--soft);font-size:13px}
.legend{margin:0 0 18px;display:flex;flex-wrap:wrap;gap:8px;align-items:center}
.legend .t{padding:1px 8px}
.note{color:var(--soft);font-size:13px;margin-left:6px}
section{padding:18px 20px;margin-bottom:18px}
.stripe{display:flex;height:10px;border-radius:5px;overflow:hidden;margin:12px 0 4px;background:var(--padding)}
.stripe i{display:block;height:100%}
.stripe i.start{border-left:2px solid var(--card)}
article{border-top:1px dashed var(--line);padding:14px 0 4px;margin-top:12px}
.tokens{font:13.5px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:0;
white-space:pre-wrap;overflow-wrap:anywhere}
.t{border-radius:4px;padding:2px 0;box-decoration-break:clone;-webkit-box-decoration-break:clone}
.tokens .t{box-shadow:inset -1px 0 0 var(--card)}
.t:hover{outline:2px solid var(--ink);outline-offset:-1px;cursor:default}
.trained{background:var(--trained-bg);color:var(--trained-ink)}
.masked{background:var(--masked-bg);color:var(--masked-ink)}
.special.trained{background:var(--special-bg);color:var(--special-ink)}
.special.masked{background:var(--special-masked-bg);color:var(--special-masked-ink)}
.t s{text-decoration:none;opacity:.42}
.pictures{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 10px}
figure{margin:0}
figure img{display:block;max-width:100%;border-radius:6px;border:1px solid var(--line)}
figcaption{color:var(--soft);font-size:12px}
.pad{color:var(--soft);font-size:13px;margin:0}
"""

SCRIPT = """
const root=document.documentElement,tip=document.getElementById('tip');
const dark=location.hash?location.hash=='#dark':matchMedia('(prefers-color-scheme: dark)').matches;
root.classList.toggle('dark',dark);
document.getElementById('theme').onclick=()=>root.classList.toggle('dark');
document.addEventListener('mouseover',event=>{
  const token=event.target.closest('.tokens .t');
  tip.hidden=!token;
  if(!token)return;
  const [index,id,position,label]=token.dataset.t.split(' ');
  tip.textContent=`${token.textContent.replace(/\\n/g,'')}\\nid        ${id}\\nindex     ${index}\\n`+
    `position  ${position}\\nlabel     ${label}${label=='-100'?'  (not in the loss)':''}`;
  const box=token.getBoundingClientRect(),height=tip.offsetHeight;
  tip.style.left=Math.min(box.left,innerWidth-tip.offsetWidth-12)+'px';
  tip.style.top=(box.top>height+10?box.top-height-6:box.bottom+6)+'px';
});
"""


def render_page(rows: list[Row], counts: PreviewCounts, pictures_of: PicturesOf | None = None) -> str:
    """The page for rows from `read_rows`, with small copies of their pictures. All text is escaped."""
    shown = "".join(_row(row, pictures_of) for row in rows)
    style = PAGE_STYLE + ROWS_STYLE
    return PAGE.format(style=style, script=SCRIPT, legend=LEGEND, cards=_cards(counts), rows=shown)


def render_part(rows: list[Row], counts: PreviewCounts, pictures_of: PicturesOf | None = None) -> str:
    """The same for a notebook: without a script, and with a style that stays inside."""
    shown = "".join(_row(row, pictures_of) for row in rows)
    style = f"<style>.amt-preview{{{PART_STYLE}{ROWS_STYLE}}}</style>"
    return f'{style}<div class="amt-preview"><div class="cards">{_cards(counts)}</div>{LEGEND}{shown}</div>'


def _cards(counts: PreviewCounts) -> str:
    cards = [
        (f"{counts.rows:,}", f"rows in {counts.micro_batches} micro-batch{'es' if counts.micro_batches != 1 else ''}"),
        (f"{counts.documents:,}", "documents"),
        (f"{counts.tokens:,}", "tokens"),
        (f"{counts.supervised:,}", "trained tokens"),
        (f"{counts.supervised_share:.1%}", "of the text is trained"),
        (f"{counts.padding_share:.1%}", "is padding"),
    ]
    return "".join(f"<div><b>{figure}</b><span>{escape(name)}</span></div>" for figure, name in cards)


def _row(row: Row, pictures_of: PicturesOf | None) -> str:
    tokens = row.tokens
    trained = sum(token.kind == "trained" for token in tokens)
    title = f"micro-batch {row.micro_batch}, row {row.index}<small>{len(tokens):,} tokens, {trained:,} trained</small>"
    documents = "".join(_document(number, document, pictures_of) for number, document in enumerate(row.documents, 1))
    return f'<section><h2>{title}</h2><div class="stripe">{_stripe(row)}</div>{documents}</section>\n'


def _stripe(row: Row) -> str:
    """The row as a bar, to scale: where documents begin, and which parts of them are trained."""
    total, parts = len(row.tokens), []
    for document in row.documents:
        runs = [(kind, len(list(run))) for kind, run in groupby(document.tokens, key=lambda token: token.kind)]
        for number, (kind, size) in enumerate(runs):
            start = ' class="start"' if number == 0 and document is not row.documents[0] else ""
            parts.append(f'<i{start} style="width:{size / total:.4%};background:{COLOURS[kind]}"></i>')
    return "".join(parts)


def _document(number: int, document: Document, pictures_of: PicturesOf | None) -> str:
    size = len(document.tokens)
    if document.is_padding:
        text = escape(document.tokens[0].visible)
        return f'<article><p class="pad">padding: {size:,} × {text} (id {document.tokens[0].id})</p></article>'
    heading = f"document {number}<small>{size:,} tokens, {document.trained:,} trained</small>"
    pictures = _pictures(pictures_of(document.sample_id)) if pictures_of and document.sample_id is not None else ""
    tokens = "".join(_token(token, count) for token, count in runs(document.tokens))
    return f'<article><h3>{heading}</h3>{pictures}<p class="tokens">{tokens}</p></article>'


def _pictures(pictures: Sequence[Any]) -> str:
    return f'<div class="pictures">{"".join(map(_picture, pictures))}</div>' if pictures else ""


def _picture(picture: Any) -> str:
    width, height = picture.size
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.convert("RGB").save(file, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt=""><figcaption>{width} × {height}</figcaption></figure>'


def _token(token: Token, count: int) -> str:
    css = f"t {token.kind} special" if token.special else f"t {token.kind}"
    text = BLANK.sub(r"<s>\g<0></s>", escape(token.visible))
    text = f"{count:,} × {text}" if count > 1 else text
    return f'<span class="{css}" data-t="{token.index} {token.id} {token.position} {token.label}">{text}</span>'
