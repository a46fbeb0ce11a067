"""The style of the pages: light and dark, for screens of any width and for print."""

STYLE = """\
:root { color-scheme: light; --ink: #1c1f23; --paper: #ffffff; --faint: #8b929b; --panel: #f4f5f7; --link: #0b57b0;
  --good: #146c2e; --good-back: #e2f3e6; --bad: #b3261e; --bad-back: #fce8e6; --dull: #5b6169; --dull-back: #eceef1;
  --series-1: #0b62c4; --series-2: #c2410c; --series-3: #0f7a4b; --series-4: #8a2fb0; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e7eb; --paper: #14171a; --faint: #858c96; --panel: #1e2226; --link: #82b7ff;
    --good: #7fd99a; --good-back: #16341f; --bad: #ff9d94; --bad-back: #43191a; --dull: #a9b0b9; --dull-back: #2a2f35;
    --series-1: #6cb0ff; --series-2: #ff9d5c; --series-3: #63d3a0; --series-4: #d59bf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.25rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--faint); }
h2 .mark { font-size: .9rem; margin-left: .4rem; vertical-align: middle; }
p, ul, dl { margin: .5rem 0; }
a { color: var(--link); }
.note { color: var(--dull); }
.verdict { margin: 1rem 0; padding: .75rem 1rem; border: 2px solid; border-radius: .5rem; font-size: 1.15rem;
  font-weight: 600; }
.passed { color: var(--good); background: var(--good-back); }
.failed { color: var(--bad); background: var(--bad-back); }
.skipped, .informational { color: var(--dull); background: var(--dull-back); }
.mark { padding: .05rem .45rem; border: 1px solid; border-radius: .6rem; font-size: .85rem; font-weight: 600;
  white-space: nowrap; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; color: var(--dull); padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--dull-back);
  overflow-wrap: break-word; }
td:not(.number, .outcome) { min-width: 8rem; }
tbody th + td { overflow-wrap: anywhere; }
thead th { border-bottom-color: var(--faint); }
tbody th { font-weight: 500; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: .5rem 0; padding: .75rem; background: var(--panel); border-radius: .5rem; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; margin: 0 auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
details { margin-top: .5rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--link); }
details .scroll { max-height: 22rem; overflow-y: auto; }
footer { margin-top: 2.5rem; padding-top: .5rem; border-top: 1px solid var(--faint); color: var(--dull);
  font-size: .9rem; }
@media print {
  @page { margin: 1.5cm; }
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll, details .scroll { overflow: visible; max-height: none; }
  td.number { white-space: normal; }
  th, td, td:not(.number, .outcome) { min-width: 0; overflow-wrap: anywhere; }
  details:not([open]) { display: none; }
  .plots { grid-template-columns: 1fr 1fr; }
  figure, tr, .verdict { break-inside: avoid; }
  h2, figcaption, caption { break-after: avoid; }
}
"""
