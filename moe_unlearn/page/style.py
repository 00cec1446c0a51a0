"""Style and script of a page, and the style of a drawing that is a file of its own."""

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1b1b; --faint: #5f5f5f; --line: #ddd; --soft: #f5f5f5;
  --band: #009e73; --bad: #b84a00; --warn: #8f6a00; --good: #00795a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0508c; --c4: #8f6a00; --c5: #3a93c9; --c6: #1b1b1b; --c7: #777 }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --ink: #e8e8e8; --faint: #a6a6a6; --line: #3a3d42;
  --soft: #1f2226; --band: #00c890; --bad: #ff8c42; --warn: #e6c04a; --good: #3ddc9f;
  --c0: #56b4e9; --c1: #ff8c42; --c2: #3ddc9f; --c3: #e79ac6; --c4: #e6c04a; --c5: #9ad4f5; --c6: #fff; --c7: #aaa } }
"""
_DASHES = ("none", "6 3", "2 3", "8 3 2 3", "none", "6 3", "none", "4 4")  # of a line whose colour is like another's
DRAWING = """
svg { font: 12px system-ui, sans-serif }
svg text { fill: var(--ink); stroke: none } svg .tick { fill: var(--faint) }
.grid { stroke: var(--line) } .band { fill: var(--band); fill-opacity: .18; stroke: none } .bar { stroke-width: 2 }
.goal { stroke: var(--ink); stroke-dasharray: 5 4 } .lead { stroke: var(--faint); stroke-width: .7 }
.cell, .more { fill: var(--c0); stroke: none } .less { fill: var(--c1); stroke: none }
.empty { fill: none; stroke: var(--line); stroke-dasharray: 2 2 }
.chosen { fill: none; stroke: var(--bad); stroke-width: 2 }
polyline { fill: none; stroke-width: 2 } .point { fill: var(--back); fill-opacity: .6; stroke-width: 2 }
g.present, g.hidden { stroke: var(--bad); fill: var(--bad) } g.gone { stroke: var(--good); fill: var(--good) }
g.overshot, g.undecided { stroke: var(--warn); fill: var(--warn) }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}); fill: var(--c{i}) }} .s{i} polyline {{ stroke-dasharray: {dash} }}\n"
    for i, dash in enumerate(_DASHES)
)
PAGE = """
* { box-sizing: border-box }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.25rem; margin-top: 2.2rem;
  border-bottom: 1px solid var(--line) }
h1, h2, h3, p, ul, summary { max-width: 60rem }
h4 { margin: .4rem 0 .2rem; font-size: .8rem; color: var(--faint) }
a { color: var(--c0) }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top }
td { min-width: 4rem; max-width: min(40rem, 62vw); overflow-wrap: break-word }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.n { white-space: normal }
th[tabindex] { cursor: pointer } th[aria-sort=ascending]::after { content: " \\25B2" }
th[aria-sort=descending]::after { content: " \\25BC" }
.wide { overflow-x: auto; margin: 1rem 0 } tbody tr:hover { background: var(--soft) }
figure { margin: 1.2rem 0 } figcaption { color: var(--faint); font-size: .875rem; max-width: 60rem }
.panels { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 2rem }
.panels svg { display: block; width: 100%; height: auto }
summary { cursor: pointer; margin: 1rem 0; font-weight: bold }
code, pre { background: var(--soft); font-size: .875em } pre { padding: .6rem; white-space: pre-wrap }
.compared { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem .9rem; margin: 1rem 0 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .3rem 1rem }
.text { background: var(--soft); padding: .4rem .6rem; white-space: pre-wrap; font-size: .875rem;
  unicode-bidi: isolate }
.mark { font-weight: bold } .present, .hidden, .not-reached, .hurts { color: var(--bad) }
.overshot, .undecided { color: var(--warn) } .gone, .reached, .helps { color: var(--good) }
.not-tested { color: var(--faint) }
@media print { :root { --back: #fff; --ink: #000; --faint: #444; --line: #bbb; --soft: #f5f5f5 }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0 } .wide { overflow: visible }
  table { font-size: 8pt } td, th { min-width: 0; padding: .2rem .3rem } h2, h3, h4 { break-after: avoid }
  figure, tr, .compared { break-inside: avoid } tbody tr:hover { background: none } }
"""
# a click, or Enter, on a heading sorts a table by that column, numbers as numbers; paper shows all there is
SCRIPT = """
addEventListener("DOMContentLoaded", () => {
  const value = row => column => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, "").replace("\\u2212", "-"));
    return Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  for (const table of document.querySelectorAll("table")) {
    const head = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    if (body.rows.length < 2) continue;
    head.forEach((cell, column) => {
      const sort = () => {
        const up = cell.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        head.forEach(other => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
        const rows = [...body.rows];
        body.append(...rows.sort((a, b) => up * order(value(a)(column), value(b)(column))));
      };
      cell.tabIndex = 0;
      cell.addEventListener("click", sort);
      cell.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(own => { own.open = true; }));
});
"""
