"""One self-contained HTML page: inline style, inline figures, no script, nothing fetched."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already, for places that would escape it."""


STYLE = """
:root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#16202c;--muted:#5b6775;--line:#e1e5ea;
--first:#1f6fd1;--second:#c9600b;--third:#0f8a66;--fourth:#8a4fc4;--soft:#edf3fb;--good:#0f7a55}
@media (prefers-color-scheme:dark){:root{--paper:#0f141a;--card:#171e26;--ink:#e8edf3;--muted:#9aa7b5;--line:#2a343f;
--first:#6aaeff;--second:#f3a25b;--third:#4fcfa4;--fourth:#c39bf3;--soft:#1c2836;--good:#5fd6ad}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:860px;margin:0 auto;padding:44px 20px 64px}
header{margin-bottom:28px}
.kicker{color:var(--muted);font-size:14px;margin:0 0 8px}
h1{font-size:clamp(27px,5vw,40px);line-height:1.15;letter-spacing:-.02em;margin:0 0 12px;text-wrap:balance}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 6px;line-height:1.3}
p{margin:0 0 14px;max-width:68ch}
.lead{font-size:18px;color:var(--muted);margin:0}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 26px 22px;margin:0 0 18px}
section>p{color:var(--muted)}
section>p.note{font-size:13.5px;max-width:none;margin:14px 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0 0 18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:16px 18px}
.tile{display:flex;flex-direction:column}
.tile b{display:block;margin-top:auto;font-size:27px;line-height:1.15;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;font-weight:650}
.tile span{color:var(--muted);font-size:14px;display:block}
.tile span.label{color:var(--ink);font-weight:550;margin-bottom:4px}
.first b{color:var(--first)}.second b{color:var(--second)}
figure{margin:14px 0 4px}
figure svg{display:block;width:100%;height:auto;overflow:visible}
.narrow{display:none}
.scroll{overflow-x:auto;margin:14px 0 4px;-webkit-overflow-scrolling:touch;
background:linear-gradient(90deg,var(--card) 35%,transparent) 0 0/44px 100% no-repeat local,
linear-gradient(270deg,var(--card) 35%,transparent) 100% 0/44px 100% no-repeat local,
linear-gradient(90deg,rgba(110,120,140,.3),transparent) 0 0/14px 100% no-repeat scroll,
linear-gradient(270deg,rgba(110,120,140,.3),transparent) 100% 0/14px 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:550;font-size:13px;vertical-align:bottom;white-space:normal;min-width:5.2em}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child td{border-bottom:0}
table.texts th:last-child,table.texts td:last-child{text-align:left;white-space:normal;min-width:11em}
table.texts td{vertical-align:top}
.chip{display:inline-block;margin:0 12px 4px 0;color:var(--muted);font-size:13px;white-space:nowrap}
.chip code{color:var(--ink);background:var(--soft);border-radius:5px;padding:1px 5px;margin-right:5px;
font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{border-top:1px solid var(--line);margin-top:10px;padding-top:10px}
summary{cursor:pointer;font-weight:550}
tr.mark td{background:var(--soft);font-weight:600}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:6px 20px;margin:14px 0 0;font-size:14.5px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
pre{margin:14px 0 4px;padding:16px 18px;background:var(--paper);border:1px solid var(--line);border-radius:10px;
overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre .prompt{color:var(--first);font-weight:650}
.key{display:flex;gap:10px;align-items:center;font-size:13px;color:var(--muted);flex-wrap:wrap}
.key i{width:120px;height:11px;border-radius:6px;display:inline-block;
background:linear-gradient(90deg,#e07a1f,transparent 50%,#2e80d6);border:1px solid var(--line)}
footer{color:var(--muted);font-size:14px;margin-top:26px}
@media (max-width:640px){.wide{display:none}.narrow{display:block}main{padding:28px 12px 48px}
section{padding:20px 16px 18px;border-radius:12px}.tile b{font-size:23px}.tiles{grid-template-columns:1fr 1fr}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:9px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def page(title: str, *, kicker: str, lead: str, body: Iterable[str], footer: str) -> str:
    """The whole document. title, kicker, lead and footer are text; body is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>\n'
        + "\n".join(body)
        + f"\n<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled card of HTML parts; paragraphs come from :func:`paragraph`."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph of plain text in small type."""
    return f'<p class="note">{escape(text)}</p>'


def figure(drawing: str, *, key: str = "") -> str:
    """A drawing (HTML of training.svg) with an optional colour key (HTML)."""
    return f"<figure>{drawing}{key}</figure>"


def load_key() -> str:
    """What the colours of the expert-load figure mean."""
    return color_key("unused", "2× an equal share or more")


def color_key(low: str, high: str) -> str:
    """The colour scale from ``low``, orange, over transparent to ``high``, blue."""
    return f'<div class="key"><span>{escape(low)}</span><i></i><span>{escape(high)}</span></div>'


def fold(title: str, part: str) -> str:
    """A part of HTML that opens and closes under its title."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"


def tiles(items: Iterable[tuple[str, str, str, str]]) -> str:
    """Headline numbers: (label, number, remark, class: "first", "second" or "")."""
    cells = (
        f'<div class="tile {kind}"><span class="label">{escape(label)}</span><b>{escape(number)}</b>'
        f"<span>{escape(remark)}</span></div>"
        for label, number, remark, kind in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, mark: int | None = None, text_last: bool = False
) -> str:
    """A table that scrolls inside itself on a small screen; ``mark`` is the index of a row to bring out.

    Cells are escaped, save those that are Html. text_last: the last column is text, which wraps.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headers)
    body = "".join(
        f"<tr{' class=mark' if number == mark else ''}>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    start = f'<div class="scroll" tabindex="0"><table{" class=texts" if text_last else ""}>'
    return f"{start}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def chips(items: Iterable[tuple[str, str]]) -> Html:
    """Short pieces of code, each with a remark after it, for a cell of a table."""
    return Html(
        " ".join(f'<span class="chip"><code>{escape(code)}</code>{escape(text)}</span>' for code, text in items)
    )


def _escaped(cell: str) -> str:
    return cell if isinstance(cell, Html) else escape(cell)


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in items)}</dl>"


def sample(prompt: str, text: str) -> str:
    """Generated text after its prompt, set as code."""
    return f'<pre tabindex="0"><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>'


def count(number: float) -> str:
    """1234 → 1,234; 1.5e6 → 1.50 M; 2e9 → 2.00 G."""
    for size, suffix in ((1e9, " G"), (1e6, " M")):
        if abs(number) >= size:
            return f"{number / size:.2f}{suffix}"
    return f"{number:,.0f}"


def data_size(number: float) -> str:
    """Bytes in decimal units: 1.5e6 → 1.50 MB."""
    for size, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {suffix}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people say them: 9.5 → 9.5 s; 125 → 2 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def change(value: float, reference: float) -> str:
    """Signed relative difference: +1.2%, 0.0% without a sign."""
    percent = round(100 * (value / reference - 1), 1)
    return f"{percent:+.1f}%".replace("-", "−") if percent else "0.0%"
