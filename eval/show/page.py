"""How pages look: one HTML file that asks for nothing else, light or dark as the reader has it, on a screen or on paper."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.show.words import between as between
from eval.show.words import percent as percent


class Section(NamedTuple):
    """A part of a page. `lede` says in a sentence or two what is to be seen, `body` is HTML."""

    key: str
    title: str
    lede: str
    body: str


def page(title: str, header: str, sections: Sequence[Section], footer: str = "") -> str:
    """Returns a page with its sections, and a row of links to them. `header` and `footer` are HTML."""
    links = "".join(f'<a href="#{one.key}">{text(one.title)}</a>' for one in sections)
    parts = "\n".join(
        f'<section id="{one.key}"><div class="about"><h2>{text(one.title)}</h2>{paragraph(one.lede)}</div>'
        f'<div class="body">{one.body}</div></section>'
        for one in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Even where a page is shown within another, it may fetch nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<header>{header}<nav>{links}</nav></header>\n<main>\n{parts}\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Returns any value as HTML that says just that."""
    return html.escape(str(value))


def code(value: object) -> str:
    return f"<code>{text(value)}</code>"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>" if words else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Returns a table of cells that are HTML; the columns `numbers` are set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        marks = (
            (' class="number"' if column in numbers else "") + (' scope="col"' if tag == "th" else "")
            for column in range(len(row))
        )
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns names with their values, which are HTML."""
    return "<dl>" + "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def chart(svg: str, wide: bool = False) -> str:
    return f'<figure class="chart{" wide-chart" if wide else ""}">{svg}</figure>'


def picture(uri: str, alt: str, caption: str = "", mark: str = "") -> str:
    """Returns an image with a caption below; `mark` is right, wrong or nothing, and is said in words and shown as a frame."""
    sign = {"right": '<b class="right">✓</b> ', "wrong": '<b class="wrong">✗</b> '}.get(mark, "")
    below = f"<figcaption>{sign}{text(caption)}</figcaption>" if caption or sign else ""
    said = f"{alt}, {mark} class" if mark else alt
    return f'<figure class="picture {mark}"><img src="{uri}" alt="{text(said)}" title="{text(said)}">{below}</figure>'


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>' if words else ""


def scatter(
    at: np.ndarray,
    kinds: Sequence[int],
    titles: Sequence[str],
    names: Sequence[str],
    colours: Sequence[str],
    sheet: str,
    columns: int,
) -> str:
    """Returns pictures laid out in the plane: as such where no other lies yet, else as dots that show them when pointed at.

    `at` is [n, 2] in [0, 1]; each has a title and is of a kind, which has a name and a CSS colour. `sheet` is the URI of one
    picture that has all of them, row after row of `columns`.
    """
    rows, side, ratio = -(-len(at) // columns), 0.036, 8 / 5
    pictured: list[tuple[float, float]] = []
    marks = []
    for number, ((x, y), kind, title) in enumerate(zip(at, kinds, titles, strict=True)):
        left, top = 0.03 + 0.94 * x, 0.04 + 0.92 * y
        row, column = divmod(number, columns)
        free = all(abs(left - other) > 1.2 * side or abs(top - above) > 1.2 * side * ratio for other, above in pictured)
        if free:
            pictured.append((left, top))
        place = (
            f"{100 * column / max(columns - 1, 1):.3f}% {100 * row / max(rows - 1, 1):.3f}%"
            if free
            else f"{-_POINTED * column}px {-_POINTED * row}px"
        )
        style = f"left:{100 * left:.2f}%;top:{100 * top:.2f}%;background-position:{place}"
        tag = "b" if free else "i"
        marks.append(f'<{tag} class="k{kind}" style="{style}" title="{text(title)}"></{tag}>')
    style = (
        f".map b,.map i:hover::after{{background-image:url({sheet})}}"
        f".map b{{width:{100 * side:.2f}%;background-size:{100 * columns}% {100 * rows}%}}"
        f".map i:hover::after{{background-size:{_POINTED * columns}px {_POINTED * rows}px}}"
        + "".join(f".k{kind}{{--c:{colour}}}" for kind, colour in enumerate(colours))
    )
    legend = "".join(f'<span><i class="k{kind}"></i>{text(name)}</span>' for kind, name in enumerate(names))
    label = f"map of {len(at):,} pictures; those that lie near each other have like features"
    return (
        f'<style>{style}</style><div class="map" role="img" aria-label="{label}">{"".join(marks)}</div>'
        f'<div class="legend">{legend}</div>'
    )


def heading(words: str, columns: int = 1) -> str:
    """Returns a heading above `columns` of a grid."""
    return f'<div class="head" style="grid-column:span {columns}">{text(words)}</div>'


_POINTED = 96
"""Pixels of the picture of a dot that is pointed at."""
_STYLE = """
:root{--paper:#fff;--panel:#f5f7f9;--ink:#1f2933;--muted:#5d6974;--line:#ccd4db;--accent:#2f6db5;--good:#2a8264;
--bad:#c0392b;--warn:#a86f17;
--font:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;
--code:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#12161b;--panel:#1a2027;--ink:#e4e9ee;--muted:#94a1ae;--line:#36414c;
--accent:#6ba6ec;
--good:#4fbf98;--bad:#ee7a6c;--warn:#dba94f}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 var(--font);font-variant-numeric:tabular-nums}
header,main,footer{max-width:76rem;margin:0 auto;padding:0 2rem}
header{padding-top:3.2rem}
.eyebrow{margin:0;color:var(--muted);font-size:.87rem}
.eyebrow b{color:var(--ink);font-weight:600}
h1{margin:.35rem 0 0;font-size:4.4rem;line-height:1.05;font-weight:650;letter-spacing:-.035em}
h1 small{font-size:1.25rem;font-weight:400;letter-spacing:0;color:var(--muted);margin-left:.6rem}
h1.name{font-size:2.4rem;letter-spacing:-.02em}
.stats{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.1rem 2rem;margin:1.5rem 0 0}
.stats dt{color:var(--muted);font-size:.8rem}
.stats dd{margin:0;font-size:1.3rem;font-weight:600;line-height:1.3}
.stats dd small{display:block;font-size:.8rem;font-weight:400;color:var(--muted);line-height:1.4}
.key{display:inline-block;width:.6rem;height:.6rem;border-radius:50%;margin-right:.4rem;background:var(--accent)}
.key.control{background:var(--muted)}.key.chance{background:none;border-left:2px solid var(--line);border-radius:0;width:.3rem}
.scale{position:relative;height:2.1rem;margin:1.6rem 0 0}
.scale::before{content:"";position:absolute;inset:.55rem 0 auto;height:.5rem;border-radius:.25rem;background:var(--panel);
box-shadow:inset 0 0 0 1px var(--line)}
.scale span{position:absolute;bottom:-.15rem;font-size:.72rem;color:var(--muted);left:0}
.scale span:last-of-type{left:auto;right:0}
.scale i{position:absolute;top:.55rem;height:.5rem;background:var(--accent);opacity:.35;border-radius:.25rem}
.scale b{position:absolute;top:.4rem;width:.8rem;height:.8rem;margin-left:-.4rem;border-radius:50%;background:var(--accent);
border:2px solid var(--paper)}
.scale .control{background:var(--muted)}.scale i.control{opacity:.3}
.scale u{position:absolute;top:.35rem;width:2px;height:.9rem;background:var(--line)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:2.2rem 0 0;padding:.7rem 0;border-top:1px solid var(--line);
border-bottom:1px solid var(--line);font-size:.87rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{display:grid;grid-template-columns:15rem minmax(0,1fr);gap:1rem 2.6rem;padding:2.6rem 0;
border-bottom:1px solid var(--line)}
section:last-child{border-bottom:0}
h2{margin:0 0 .5rem;font-size:1.12rem;line-height:1.3;font-weight:650}
h3{margin:1.8rem 0 .6rem;font-size:.92rem;font-weight:650}h3:first-child{margin-top:0}
.about p{margin:0;color:var(--muted);font-size:.87rem;line-height:1.5}
.body>*:first-child{margin-top:0}
p.note{color:var(--muted);font-size:.87rem;margin:.8rem 0 0;max-width:46rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{font-weight:500;color:var(--muted);font-size:.8rem;text-align:left;vertical-align:bottom}
th,td{padding:.42rem 1.1rem .42rem 0;border-bottom:1px solid var(--line)}
td{vertical-align:baseline}tbody tr:last-child td{border-bottom:0}
td small{color:var(--muted);display:block;font-size:.78rem;line-height:1.35}
.number{text-align:right;white-space:nowrap}
.wide{overflow-x:auto}
code{font:.86em var(--code);overflow-wrap:anywhere}
dl{margin:0}
.body dl div{display:grid;grid-template-columns:11rem minmax(0,1fr);
padding:.3rem 0;border-bottom:1px solid var(--line);font-size:.9rem}
.body dl div:last-child{border-bottom:0}
.body dt{color:var(--muted)}.body dd{margin:0}
details{margin-top:1rem;font-size:.9rem}summary{cursor:pointer;color:var(--accent)}details>*:last-child{margin-top:.6rem}
figure{margin:0}
.chart{max-width:46rem;margin:0 0 1.4rem}.chart.wide-chart{max-width:none}
.chart:last-child{margin-bottom:0}
.chart svg{display:block;width:100%;height:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:2rem;align-items:start}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(4.6rem,1fr));gap:.7rem .6rem}
.picture img{display:block;width:100%;aspect-ratio:1;border-radius:5px;background:var(--panel)}
.picture figcaption{font-size:.75rem;line-height:1.3;color:var(--muted);margin-top:.28rem;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}
.picture.right img{box-shadow:0 0 0 2px var(--paper),0 0 0 4px var(--good)}
.picture.wrong img{box-shadow:0 0 0 2px var(--paper),0 0 0 4px var(--bad)}
b.right{color:var(--good)}b.wrong{color:var(--bad)}
.neighbours{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:1rem .8rem;max-width:52rem}
.neighbours .head{font-size:.78rem;color:var(--muted);align-self:end}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1.1rem 1.8rem}
.cards>div{display:grid;grid-template-columns:repeat(3,1fr);gap:.45rem}
.map{position:relative;aspect-ratio:8/5;background:var(--panel);border-radius:8px;
box-shadow:inset 0 0 0 1px var(--line);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.map i,.map b{position:absolute;transform:translate(-50%,-50%);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.map i{width:.62%;aspect-ratio:1;border-radius:50%;background:var(--c);opacity:.75}
.map b{aspect-ratio:1;border-radius:4px;border:2px solid var(--c)}
.map b{z-index:1}.map b:hover{z-index:2;width:10%}
.map i:hover{z-index:3;opacity:1}
.map i:hover::after{content:"";position:absolute;left:50%;bottom:130%;width:POINTEDpx;height:POINTEDpx;transform:translateX(-50%);
border:3px solid var(--c);border-radius:6px;background-position:inherit}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.8rem 0 0;font-size:.8rem;color:var(--muted)}
.legend i{display:inline-block;width:.65rem;height:.65rem;border-radius:50%;background:var(--c);margin-right:.35rem}
footer{padding-bottom:3rem;color:var(--muted);font-size:.8rem}
@media (max-width:60rem){section{grid-template-columns:minmax(0,1fr)}header,main,footer{padding-left:1.1rem;padding-right:1.1rem}
h1{font-size:3.2rem}h1 small{display:block;margin:.3rem 0 0}.neighbours{gap:.6rem .4rem}}
@media print{:root{--paper:#fff;--panel:#f5f7f9;--ink:#000;--muted:#444;--line:#bbb;--accent:#2f6db5;
--good:#2a8264;--bad:#c0392b;--warn:#a86f17}
nav{display:none}body{font-size:10pt}section{display:block;padding:1.2rem 0}.about{margin-bottom:.8rem;break-after:avoid}
figure,tr,.card,.cards>div{break-inside:avoid}.wide{overflow:visible}}
""".replace("\n", "").replace("POINTED", str(_POINTED))
