"""How a report's page looks: on a phone, on a wide screen, in the dark and on paper."""

STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1c1e21; --soft: #595f69;
  --line: #d9dce1; --accent: #0072b2; --warn: #fff3d6; --warn-line: #b26a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1f2226; --ink: #e8eaed;
  --soft: #a9b0ba; --line: #3a3f46; --accent: #6cbcf0; --warn: #3a2c0c; --warn-line: #e0a030; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
main, header, footer { max-width: 100rem; margin: 0 auto; padding: 0 clamp(.6rem, 3vw, 2.5rem); }
header { padding-top: clamp(1.2rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.4rem 0 .8rem; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 0 0 .4rem; }
p, ul { margin: 0 0 .8rem; max-width: 52rem; }
ul { padding-left: 1.2rem; }
h1, h2, h3, p, li, td, th, dd, dt { overflow-wrap: anywhere; }
header p, footer, figcaption, .note { color: var(--soft); }
footer { padding-bottom: 2rem; font-size: .9rem; }
.warn { background: var(--warn); border-left: .35rem solid var(--warn-line); border-radius: .4rem;
  padding: .8rem 1rem; margin: 1rem 0; }
.warn p, .warn ul { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr));
  gap: .8rem; margin: 1.2rem 0; padding: 0; }
.facts div, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: clamp(.7rem, 2vw, 1rem); }
.facts dd { margin: 0; font-size: 1.7rem; line-height: 1.25; font-weight: 650; }
.facts dt { color: var(--soft); font-size: .92rem; line-height: 1.4; }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.results { list-style: none; padding: 0; margin: 1.2rem 0; max-width: none; }
.results li { padding: .55rem 0 .55rem 1.6rem; border-top: 1px solid var(--line);
  position: relative; }
.results li > p { margin: 0; }
.swatch { position: absolute; left: 0; top: 1rem; width: .9rem; height: .9rem;
  border-radius: .2rem; }
.charts { columns: 27rem; column-gap: 1.2rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; }
figure.wide { column-span: all; }
figcaption { font-size: .92rem; line-height: 1.45; max-width: 52rem; margin-top: .6rem; }
.paper { background: #fff; overflow-x: auto; border-radius: .3rem; }
@media (prefers-color-scheme: dark) { .paper { padding: .5rem; } }
svg { display: block; margin: 0 auto; height: auto; width: 100%;
  max-width: calc(var(--inches) * 140px); min-width: calc(var(--inches) * 70px); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif
  !important; }
.card { margin: 0 0 1.2rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.tables .card { flex: 1 1 auto; max-width: 100%; margin: 0; }
.tables .note { margin: .6rem 0 0; font-size: .92rem; }
.tables table { width: 100%; }
.scroll { overflow-x: auto; }
.words tr:first-child > * { border-top: 0; }
.scroll:focus-visible, .paper:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
td, th { padding: .35rem .9rem .35rem 0; text-align: right; vertical-align: top;
  border-top: 1px solid var(--line); white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; }
th:first-child { text-align: left; font-weight: 500; }
.words { width: 100%; }
.words td, .words th { text-align: left; white-space: normal; min-width: 8rem; }
.words tbody th { color: var(--soft); width: 30%; max-width: 18rem; }
.words.one td { min-width: 0; } .words.one th { min-width: 7.5rem; overflow-wrap: break-word; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem 1rem; margin: 0 0 .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
@media print {
  :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --soft: #444;
    --line: #bbb; --warn: #fff; --warn-line: #000; }
  body { font-size: 10pt; } main, header, footer { max-width: none; padding: 0; }
  .charts { columns: 2; } .card, .facts div { break-inside: avoid; padding: .6rem; }
  h2 { break-after: avoid; } .scroll, .paper { overflow: visible; }
  td, th { white-space: normal; padding-right: .5rem; } svg { min-width: 0; }
}
"""
