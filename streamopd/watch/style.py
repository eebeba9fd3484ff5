"""How the report looks, in light and in dark."""

CSS = """
:root { --paper: #fcfcfb; --card: #ffffff; --ink: #1b1b1a; --dim: #6b6a66; --grid: #e7e6e2; --edge: #dddbd5;
  --s0: #2a6fdb; --s1: #d9622b; --s2: #14866d; --s3: #8a5cd0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161615; --card: #1f1f1d; --ink: #f0efeb; --dim: #a3a19a; --grid: #34332f; --edge: #3a3935;
    --s0: #6ea8ff; --s1: #ff9a63; --s2: #4fcbab; --s3: #bd9bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 34px 0 10px; }
header p { color: var(--dim); margin: 4px 0 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-bottom: 12px; }
.tile, figure { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 12px 14px; display: flex; flex-direction: column; gap: 3px; }
.tile span, .tile small { color: var(--dim); font-size: 12.5px; }
.tile strong { font-size: 19px; font-weight: 600; margin-top: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 16px 8px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.chart .title { fill: var(--ink); font-size: 15px; font-weight: 600; } .chart .label { font-size: 12px; }
.chart .grid { stroke: var(--grid); } .chart .axis { stroke: var(--dim); }
.chart .mark { stroke: var(--ink); stroke-dasharray: 4 4; } .chart .track { fill: var(--grid); }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; } .chart .dashed { stroke-dasharray: 7 5; }
.chart .line.s0 { stroke: var(--s0); } .chart .line.s1 { stroke: var(--s1); }
.chart .line.s2 { stroke: var(--s2); } .chart .line.s3 { stroke: var(--s3); }
.chart .fill.s0 { fill: var(--s0); } .chart .fill.s1 { fill: var(--s1); }
.chart .fill.s2 { fill: var(--s2); } .chart .fill.s3 { fill: var(--s3); }
.scroll { overflow-x: auto; } .side { display: flex; flex-wrap: wrap; gap: 12px 48px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--dim); font-weight: 500; } th, td { padding: 5px 18px 5px 0; vertical-align: top; }
tr + tr td, tbody tr:first-child td { border-top: 1px solid var(--grid); }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 70px; max-width: 520px; }
"""
