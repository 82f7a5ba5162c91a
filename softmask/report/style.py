"""The style sheet of the report, for light and dark screens and for print."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf8; --card: #ffffff; --ink: #1e2024; --muted: #6a6e76; --rule: #e4e1d9; --grid: #eeebe4;
  --accent: #b5432a; --raw: #e7bdb0; --soft: #d9d5cb; --hit: #2c7a4b; --miss: #a8322f;
  --sans: "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", "Palatino", "Book Antiqua", "Georgia", "Noto Serif",
    "DejaVu Serif", serif;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --card: #1d2024; --ink: #e7e4de; --muted: #989ca5; --rule: #34383e; --grid: #272b30;
    --accent: #e9805f; --raw: #6b4338; --soft: #43474e; --hit: #6cc08b; --miss: #ec8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 1140px; margin: 0 auto; padding: 56px 40px 72px; }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.15; text-wrap: balance; }
h1 { font-size: 46px; letter-spacing: -0.015em; margin: 0; }
h1 span { color: var(--muted); font-weight: 400; }
h2 { font-size: 27px; margin: 0 0 6px; }
#facts h2 { margin-bottom: 18px; }
h3 { font-size: 18px; margin: 32px 0 12px; }
p { margin: 0; }
small { font: 12.5px/1.5 var(--sans); color: var(--muted); }
img { display: block; max-width: 100%; }
section { margin-top: 64px; padding-top: 22px; border-top: 1px solid var(--rule); }
.kicker, .name, dt, thead th, figcaption {
  font-size: 11.5px; letter-spacing: 0.06em; text-transform: uppercase; color: var(--muted); font-weight: 500;
}
.kicker { margin-bottom: 10px; }
.lead { font: 19px/1.5 var(--serif); max-width: 44em; margin-top: 16px; }
.note { color: var(--muted); max-width: 52em; margin-bottom: 22px; }
.muted { color: var(--muted); }
.hit { color: var(--hit); }
.miss { color: var(--miss); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 34px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 16px 18px 14px; }
.figure {
  font: 600 38px/1.2 var(--serif); font-variant-numeric: lining-nums; letter-spacing: -0.01em; margin: 4px 0 2px;
}
.figure span { font-size: 20px; font-weight: 400; color: var(--muted); }
.detail { color: var(--muted); font-size: 13px; }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 18px 28px; margin: 0; }
dd { margin: 3px 0 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }

figure { margin: 0; }
figcaption { margin-bottom: 6px; }
figcaption span { text-transform: none; letter-spacing: 0; margin-left: 6px; opacity: 0.8; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 26px 20px; margin-top: 30px;
}
.chart { display: block; width: 100%; height: auto; font-family: var(--sans); }
.chart path { fill: none; }
.chart .grid { stroke: var(--grid); }
.chart .axis { stroke: var(--soft); }
.chart .tick { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
.chart .raw { stroke: var(--raw); stroke-width: 1; stroke-linejoin: round; }
.chart .course { stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.chart .end { fill: var(--accent); }
.chart .value { fill: var(--ink); font-size: 11.5px; font-weight: 600; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: 9px 10px; text-align: right; white-space: nowrap; }
thead th { padding-bottom: 5px; vertical-align: bottom; }
thead th[colspan] { text-align: center; color: var(--ink); }
thead tr:last-child th { border-bottom: 1px solid var(--soft); }
thead th:first-child[rowspan] { text-align: left; border-bottom: 1px solid var(--soft); }
tbody th { text-align: left; font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
.apart { margin-top: 36px; }
.edge { padding-left: 26px; }
td.itm { font-weight: 600; }
td.chance { color: var(--muted); }
.bars { margin-top: 36px; }
.bars caption { text-align: left; color: var(--muted); padding-bottom: 10px; }
.bars th { width: 1%; padding-left: 0; }
.bars td:last-child { width: 1%; padding-right: 0; font-weight: 600; }
.track { width: 98%; }
.bar { height: 14px; border-radius: 2px; background: var(--raw); min-width: 2px; }
.bar.strong { background: var(--accent); }
.bar.faint { background: var(--soft); }

.quote { font: 16px/1.45 var(--serif); }
.quote em { font-style: normal; border-bottom: 2px solid var(--accent); }
.mark { font: 700 14px/1 var(--sans); }
.query { display: grid; grid-template-columns: 260px 1fr; gap: 24px; align-items: center; padding: 14px 0; }
.query + .query { border-top: 1px solid var(--grid); }
.thumbs { display: grid; grid-template-columns: repeat(5, 1fr); gap: 10px; }
.thumb { position: relative; }
.thumb img, .card img, .scene img { width: 100%; border-radius: 5px; }
.thumb.right img { outline: 3px solid var(--hit); outline-offset: 1px; }
.thumb .mark {
  position: absolute; right: 6px; top: 6px; width: 20px; height: 20px; border-radius: 50%; background: var(--hit);
  color: var(--paper); font-size: 12px; line-height: 20px; text-align: center;
}
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(470px, 1fr)); gap: 18px; }
.card {
  display: grid; grid-template-columns: 150px 1fr; gap: 18px; align-items: start; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; padding: 14px;
}
.card ol { margin: 0 0 8px; padding-left: 20px; font-size: 13.5px; line-height: 1.4; color: var(--muted); }
.card li { margin-bottom: 3px; }
.card li.right { color: var(--ink); font-weight: 600; }
.card li .hit { font-size: 12px; }

.reconstruction { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; padding: 18px 0; }
.reconstruction { break-inside: avoid; }
.reconstruction + .reconstruction { border-top: 1px solid var(--grid); }
.reconstruction img { width: 100%; border-radius: 5px; margin-bottom: 8px; }

.legend { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; color: var(--muted); font-size: 13px; }
.legend i { width: 130px; height: 10px; border-radius: 2px; }
.legend .mark { margin-left: 14px; }
.scene { display: grid; grid-template-columns: 256px 1fr; gap: 30px; padding: 26px 0; break-inside: avoid; }
.scene + .scene { border-top: 1px solid var(--grid); }
.whole img { height: auto; }
.whole .quote { margin: 12px 0 6px; }
.whole .name { text-transform: none; letter-spacing: 0; }
.words { display: grid; grid-template-columns: repeat(4, 1fr); gap: 20px 14px; align-content: start; }
.pair { display: grid; gap: 8px; }
.words.few .word { grid-column: span 2; }
.words.few .pair { grid-template-columns: 1fr 1fr; }
.label { display: flex; justify-content: space-between; gap: 8px; align-items: baseline; margin-bottom: 6px; }
.label span:first-child { font-weight: 600; font-size: 13.5px; overflow-wrap: anywhere; }
.layers { position: relative; }
.layers svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.layers path, .layers circle { fill: none; stroke-linecap: square; vector-effect: non-scaling-stroke; }
.layers .halo { stroke: rgb(20 22 26 / 0.55); stroke-width: 3; }
.layers .line { stroke: #ffffff; stroke-width: 1.3; }
.layers .ring { stroke: #7df3ff; stroke-width: 2; }

.shares th, .confusion th { white-space: normal; }
.shares thead th, .confusion thead th { border-bottom: 1px solid var(--soft); }
.shares thead th:first-child, .confusion th:first-child { text-align: left; }
.shares .track { width: 34%; min-width: 90px; }
.shares .group th { color: var(--muted); font-weight: 500; padding-top: 24px; }
.confusion { margin-top: 36px; width: auto; }
.confusion thead th { text-align: center; }
.confusion caption { text-align: left; color: var(--muted); padding-bottom: 10px; }
.confusion tbody td {
  min-width: 128px; text-align: center; border: 2px solid var(--paper);
  background: color-mix(in srgb, var(--accent) calc(var(--share) * 0.55), var(--card));
}
.confusion small { color: inherit; opacity: 0.75; }

.examples { margin-top: 8px; }
.example { display: grid; grid-template-columns: 190px 300px 1fr; gap: 26px; padding: 22px 0; break-inside: avoid; }
.example + .example { border-top: 1px solid var(--grid); }
.example.two { grid-template-columns: 250px 280px 1fr; }
.examples.plain { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 0 40px; }
.examples.plain .example { grid-template-columns: 130px 1fr; border-top: 1px solid var(--grid); }
.seen { display: grid; grid-template-columns: 1fr; gap: 10px; align-content: start; }
.two .seen { grid-template-columns: 1fr 1fr; }
.seen img, .map img { width: 100%; border-radius: 5px; }
.truth { margin: 6px 0 8px; font-size: 13.5px; color: var(--muted); }
.truth b { color: var(--ink); font-weight: 600; }
.guesses { font-size: 13.5px; table-layout: fixed; }
.guesses tbody tr > * { padding: 3px 6px; border: 0; }
.guesses tbody th { width: 46%; padding-left: 0; white-space: normal; overflow-wrap: anywhere; }
.guesses tr:first-child th { font-weight: 600; }
.guesses tbody .verdict { width: 22px; padding: 3px 0; text-align: left; }
.guesses .track { width: auto; }
.guesses td.percent { width: 52px; padding-right: 0; }
.guesses .bar { height: 8px; }
.said small { display: block; margin-top: 6px; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 164px)); gap: 14px; align-content: start; }
.two .maps { grid-template-columns: repeat(2, 1fr); }
.two .map div { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.map figcaption { text-transform: none; letter-spacing: 0; font-weight: 600; font-size: 13px; color: var(--ink); }

footer { margin-top: 72px; padding-top: 20px; border-top: 1px solid var(--rule); color: var(--muted); font-size: 13px; }
.attribution { margin-top: 10px; white-space: pre-line; overflow-wrap: anywhere; }

@media screen and (max-width: 760px) {
  .wide { overflow-x: auto; }
  .wide .chart { min-width: 680px; }
  main { padding: 32px 18px 48px; }
  h1 { font-size: 34px; }
  .query, .scene { grid-template-columns: 1fr; }
  .words { grid-template-columns: repeat(2, 1fr); }
  .cards { grid-template-columns: 1fr; }
  .card { grid-template-columns: 104px 1fr; }
  .example, .example.two { grid-template-columns: 1fr; }
  .examples.plain { grid-template-columns: 1fr; }
  .examples.plain .example { grid-template-columns: 104px 1fr; }
  .example .seen { max-width: 260px; }
  .example.two .seen { max-width: none; }
  .shares tr > *, .confusion tr > * { padding: 8px 4px; }
  .shares thead th, .confusion thead th { font-size: 10px; letter-spacing: 0; }
  .shares .track { display: none; }
  .confusion tbody td { min-width: 64px; }
  .confusion small { display: block; }
}
@media print {
  @page { margin: 14mm; }
  body { background: none; font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  section { margin-top: 32px; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .charts { grid-template-columns: repeat(3, 1fr); }
  .query { grid-template-columns: 170px 1fr; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card { grid-template-columns: 84px 1fr; }
  .scene { grid-template-columns: 170px 1fr; gap: 20px; padding: 18px 0; }
  .example { grid-template-columns: 110px 210px 1fr; gap: 18px; padding: 14px 0; }
  .example.two { grid-template-columns: 160px 190px 1fr; }
  h2, h3, .note, .legend { break-after: avoid; }
  .tile, .query, .card, figure, table { break-inside: avoid; }
}
"""
