"""The style sheet of a report: light and dark, wide and narrow, screen and paper. No fonts or files are loaded."""

from __future__ import annotations

_COLOURS = """
:root {
  color-scheme: light dark;
  --page: #fbfaf7; --panel: #f3f1ec; --ink: #181b20; --soft: #59606c; --rule: #dedad1; --grid: #e7e4dd;
  --good: #0b6b66; --bad: #b3263e; --heat-base: #ebe9e3; --heat: #0a5c60; --on-heat: #ffffff;
  --dense: #8b919c; --pruned: #d6812c; --retrained: #0f7d76; --merged: #4a56c4; --broken: #b3263e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131519; --panel: #1c1f25; --ink: #eceef1; --soft: #a4abb8; --rule: #2e323b; --grid: #282c34;
    --good: #56cbbf; --bad: #ff7d8f; --heat-base: #23272e; --heat: #52cfc2; --on-heat: #04211f;
    --dense: #7f8794; --pruned: #e79a4c; --retrained: #3fb9ae; --merged: #8b95f2; --broken: #ff7d8f;
  }
}
"""

_PAGE = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 Inter, "Segoe UI Variable", ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto,
    "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 40px 72px; }
header { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 20px 56px; align-items: end; }
.eyebrow { margin: 0 0 10px; font-size: 13px; font-weight: 600; letter-spacing: .09em; text-transform: uppercase;
  color: var(--good); }
h1 { margin: 0; font-size: clamp(30px, 5vw, 46px); line-height: 1.08; letter-spacing: -.025em; font-weight: 680;
  overflow-wrap: anywhere; }
.verdict { margin: 18px 0 0; max-width: 42em; font-size: 19px; line-height: 1.5; text-wrap: pretty; }
figure { margin: 0; }
figcaption, .caption { margin: 10px 0 0; max-width: 75ch; font-size: 13px; line-height: 1.5; color: var(--soft);
  overflow-wrap: anywhere; }
header figcaption { max-width: 316px; }
section { margin-top: 64px; }
h2 { margin: 0 0 4px; font-size: 23px; line-height: 1.25; letter-spacing: -.015em; font-weight: 650; }
h2 + p { margin: 0 0 22px; max-width: 70ch; color: var(--soft); text-wrap: pretty; }
.lead { margin: 0 0 16px; max-width: 75ch; font-size: 14px; color: var(--soft); }
h3 { margin: 32px 0 8px; font-size: 14px; font-weight: 650; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 28px 32px;
  margin: 44px 0 0; }
.figures div { display: flex; flex-direction: column; border-top: 2px solid var(--ink); padding-top: 12px; }
.figures dt { font-size: 13px; font-weight: 600; color: var(--soft); }
.figures dd { margin: 0; font-size: 13px; line-height: 1.45; color: var(--soft); }
.figures .big { margin: 2px 0 4px; font-size: 27px; line-height: 1.25; letter-spacing: -.025em; font-weight: 620;
  color: var(--ink); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.good { color: var(--good) !important; } .bad { color: var(--bad) !important; }
.warning { margin: 22px 0 0; padding: 12px 16px; border-left: 3px solid var(--bad); background: var(--panel); }
footer { margin-top: 72px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: 13px; color: var(--soft); }
:focus-visible { outline: 2px solid var(--good); outline-offset: 3px; border-radius: 3px; }
"""

_TABLES = """
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 8px; font-weight: 650; }
th, td { padding: 7px 0 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; font-size: 13px; line-height: 1.3; color: var(--soft); vertical-align: bottom;
  white-space: normal; }
thead th { border-bottom-color: var(--soft); }
th:first-child, td:first-child { padding-left: 0; }
th[scope=row] { font-weight: 500; font-size: 14px; color: var(--ink); }
.text { text-align: left; }
tfoot td, tfoot th[scope=row] { font-weight: 650; border-bottom: 0; color: var(--ink); }
tbody tr.group th { padding-top: 22px; font-weight: 650; text-align: left; border-bottom-color: var(--soft); }
tbody tr.best td, tbody tr.best th { font-weight: 680; }
details { margin-top: 22px; } details .scroll { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; width: fit-content; }
pre { margin: 0; padding: 16px 20px; overflow-x: auto; background: var(--panel); border-radius: 8px; user-select: all;
  white-space: pre-wrap; }
pre span { white-space: nowrap; }
code, pre, .mono { font: 13.5px/1.6 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono",
  monospace; }
.facts { columns: 2 400px; column-gap: 56px; margin: 0; font-size: 14px; } .facts.wide { columns: 1; }
.facts div { display: grid; grid-template-columns: 15.5em minmax(0, 1fr); gap: 16px; padding: 3px 0;
  break-inside: avoid; }
.facts.wide div { grid-template-columns: 6em minmax(0, 1fr); }
.facts dt { color: var(--soft); overflow-wrap: anywhere; } .facts dd { margin: 0; overflow-wrap: anywhere; }
"""

_PICTURES = """
.picture { overflow-x: auto; margin-left: -2px; padding: 2px; }
.picture svg { display: block; width: 100%; min-width: 720px; height: auto; }
svg.mask { display: block; width: 316px; max-width: 100%; height: auto; }
svg.mask .on { fill: var(--good); } svg.mask .off { fill: var(--heat-base); }
svg text { font-size: 13.5px; fill: var(--ink); dominant-baseline: central; font-variant-numeric: tabular-nums; }
svg .axis { font-size: 12.5px; fill: var(--soft); }
svg .role, svg .label { font-size: 14px; }
svg .group { font-weight: 650; font-size: 14px; }
svg .value { font-weight: 650; } svg .note { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .baseline { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 4; }
svg.bars text { paint-order: stroke; stroke: var(--page); stroke-width: 5px; stroke-linejoin: round; }
.cell .base { fill: var(--heat-base); } .cell .fill { fill: var(--heat); }
.cell text { font-size: 12.5px; text-anchor: middle; } .cell .strong { fill: var(--on-heat); }
.cell .alarm { fill: none; stroke: var(--bad); stroke-width: 2.5; }
.cell:hover .base { stroke: var(--ink); stroke-width: 2; }
svg rect.none { fill: none; stroke: var(--grid); stroke-dasharray: 3 3; }
.bar.dense { fill: var(--dense); } .bar.pruned { fill: var(--pruned); } .bar.retrained { fill: var(--retrained); }
.bar.merged { fill: var(--merged); } .bar.broken { fill: var(--broken); opacity: .55; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; align-items: center; margin: 14px 0 0; font-size: 13px;
  color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 8px; }
.legend i { width: 13px; height: 13px; border-radius: 3px; }
.legend .ramp { width: 190px; height: 10px; background: linear-gradient(90deg, var(--heat-base), var(--heat)); }
.legend .dense { background: var(--dense); } .legend .pruned { background: var(--pruned); }
.legend .retrained { background: var(--retrained); } .legend .merged { background: var(--merged); }
.legend .alarm { border: 2.5px solid var(--bad); }
.legend .stroke { height: 3px; width: 20px; border-radius: 2px; background: var(--hue); }
.legend .ring { border-radius: 50%; border: 2.25px solid var(--hue); }
.legend .broken { background: var(--broken); opacity: .55; }
svg .panel, svg .heading { font-weight: 600; font-size: 13px; } svg .heading { fill: var(--soft); }
.series .line { fill: none; stroke: var(--hue); stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.series .thin { fill: none; stroke: var(--hue); stroke-width: 1.25; opacity: .75; }
.series .raw { fill: none; stroke: var(--hue); stroke-width: 1; opacity: .3; }
.series .dot { fill: var(--page); stroke: var(--hue); stroke-width: 2.25; }
.series .name { fill: var(--hue); font-weight: 600; }
.s0 { --hue: var(--retrained); } .s1 { --hue: var(--pruned); } .s2 { --hue: var(--merged); }
.s3 { --hue: var(--broken); } .s4 { --hue: var(--dense); } .s5 { --hue: var(--ink); }
"""

_OTHER_MEDIA = """
@media (max-width: 760px) {
  main { padding: 32px 20px 48px; }
  header { grid-template-columns: minmax(0, 1fr); }
  section { margin-top: 48px; }
  .figures { gap: 22px 24px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
  .figures .big { font-size: 23px; }
  .facts div, .facts.wide div { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); }
}
@media print {
  main { padding: 0; max-width: none; } section { break-inside: avoid; } .picture svg { min-width: 0; }
}
"""

STYLE = _COLOURS + _PAGE + _TABLES + _PICTURES + _OTHER_MEDIA
