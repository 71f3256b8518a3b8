"""The page's style sheet, light and dark; the page needs nothing from outside itself."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f5f1; --card: #fff; --ink: #1d2126; --soft: #646b75; --line: #e2e0d8;
  --help: #0b7a6f; --harm: #b5472f; --help-rgb: 16 150 135; --harm-rgb: 214 92 58;
  --mark: #9a6f00; --mark-back: #fff4d2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e23; --ink: #e7e6e2; --soft: #9aa1ab; --line: #2d3138;
    --help: #4cc9b8; --harm: #f0876a; --help-rgb: 45 190 170; --harm-rgb: 235 115 85;
    --mark: #e9b949; --mark-back: #332b15;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 8px; }
h2 { font-size: 17px; margin: 0; }
h2 small { font-weight: 400; font-size: 13.5px; color: var(--soft); margin-left: 10px; }
h3 { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; margin: 0 0 8px; }
.help h3 { color: var(--help); }
.harm h3 { color: var(--harm); }
p { margin: 0 0 8px; }
p:last-child { margin-bottom: 0; }
.soft { color: var(--soft); }

.facts { display: flex; flex-wrap: wrap; gap: 6px; margin: 16px 0 24px; padding: 0; list-style: none; }
.facts li {
  border: 1px solid var(--line); background: var(--card); border-radius: 99px; padding: 2px 11px; font-size: 13px;
}
.facts b { font-weight: 400; color: var(--soft); margin-right: 6px; }
.box {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; margin: 0 0 16px;
}
.intro { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 0 16px; }
.notes { border-left: 4px solid var(--help); }
.legend { font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td, th { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: left; font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; }
td:last-child, th:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px; }
td img { height: 26px; width: auto; vertical-align: middle; }
td pre { max-height: 1.5em; max-width: 36ch; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }

img { image-rendering: pixelated; border-radius: 6px; display: block; background: #000; }
pre {
  margin: 0; font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
}
.query { display: grid; gap: 16px 28px; }
.query > header { grid-column: 1 / -1; }
.images { grid-template-columns: 260px minmax(0, 1fr); }
.images .asked img { width: 148px; height: auto; }
.words .asked { display: grid; grid-template-columns: minmax(0, 1fr) 260px; gap: 24px; }
.words .asked pre { border-left: 3px solid var(--mark); padding: 2px 0 2px 12px; }
.asked p { margin: 8px 0 14px; font-size: 13.5px; }
.chart { width: 260px; max-width: 100%; display: block; }
.chart .help { fill: var(--help); }
.chart .harm { fill: var(--harm); }
.chart .zero { fill: var(--soft); opacity: .55; }
.chart .axis { stroke: var(--line); }
.chart .mark { fill: var(--mark); }

.tails { display: grid; gap: 18px; min-width: 0; }
.words .tails { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.words .row { flex-direction: column; }
figure { margin: 0; padding: 9px; border-radius: 10px; border: 1px solid var(--line); min-width: 0; }
.images figure { flex: 1 1 108px; max-width: 142px; }
.images figure img { width: 100%; height: auto; }
figure.known { border-color: var(--mark); background: var(--mark-back); }
figcaption { font-size: 12px; line-height: 1.45; margin-top: 7px; color: var(--soft); }
figcaption { font-variant-numeric: tabular-nums; }
.words figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; margin: 0 0 6px; align-items: baseline; }
.images figcaption > * { display: block; }
figcaption b { font-size: 14px; }
.help figcaption b { color: var(--help); }
.harm figcaption b { color: var(--harm); }
.tagged { color: var(--mark); font-weight: 600; }
.track { height: 3px; border-radius: 2px; background: var(--line); margin-top: 7px; }
.track i { display: block; height: 3px; border-radius: 2px; }
.help .track i { background: var(--help); }
.harm .track i { background: var(--harm); }

.p1 { background: rgb(var(--help-rgb) / .14); }
.p2 { background: rgb(var(--help-rgb) / .28); }
.p3 { background: rgb(var(--help-rgb) / .44); }
.p4 { background: rgb(var(--help-rgb) / .62); }
.n1 { background: rgb(var(--harm-rgb) / .14); }
.n2 { background: rgb(var(--harm-rgb) / .28); }
.n3 { background: rgb(var(--harm-rgb) / .44); }
.n4 { background: rgb(var(--harm-rgb) / .62); }
footer { color: var(--soft); font-size: 12.5px; margin-top: 28px; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  .images, .words .asked, .words .tails { grid-template-columns: minmax(0, 1fr); }
  .intro { grid-template-columns: minmax(0, 1fr); }
}
@media print { .box { break-inside: avoid; } body { background: none; } }
"""
