"""How a report looks, light and dark, on screen and paper: a style sheet, kept as text so that it can be hashed."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  --paper: #fdfdfc; --sheet: #fff; --ink: #1c1e21; --quiet: #63676e; --line: #e2e2de;
  --good: #1a7f4b; --warn: #9a6200; --bad: #b3261e; --idle: #6b7280;
  --good-wash: #e9f5ee; --warn-wash: #fcf3df; --bad-wash: #fbeceb; --idle-wash: #f1f2f3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --sheet: #1c1f23; --ink: #e7e8ea; --quiet: #9aa0a8; --line: #31353b;
    --good: #5fcf94; --warn: #e5b454; --bad: #f28b82; --idle: #9aa0a8;
    --good-wash: #16291f; --warn-wash: #2d2614; --bad-wash: #301b1a; --idle-wash: #23262b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main, footer { max-width: 62rem; margin: 0 auto; }
h1 { margin: 0; font-size: 2rem; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 3rem 0 0.9rem; font-size: 1.15rem; }
h3 { margin: 0; font-size: 1rem; }
p { margin: 0.35rem 0; }
ul { margin: 0.35rem 0; padding-left: 1.1rem; }
.quiet { color: var(--quiet); font-size: 0.875rem; }
.reason { font-size: 1.05rem; }
code, dd { overflow-wrap: anywhere; }
code { font: 0.8rem/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, monospace; }
.affirming { --tone: var(--good); --wash: var(--good-wash); }
.warning { --tone: var(--warn); --wash: var(--warn-wash); }
.contraindicated { --tone: var(--bad); --wash: var(--bad-wash); }
.none { --tone: var(--idle); --wash: var(--idle-wash); }
.verdict {
  display: flex; gap: 1.25rem; align-items: flex-start; padding: 1.6rem 1.75rem; overflow-wrap: anywhere;
  background: var(--wash); border: 1px solid var(--line); border-left: 0.4rem solid var(--tone);
  border-radius: 0.6rem;
}
.verdict h1 { color: var(--tone); }
.mark {
  flex: none; width: 2.75rem; height: 2.75rem; border-radius: 50%; background: var(--tone); color: var(--paper);
  font-size: 1.5rem; font-weight: 700; line-height: 2.75rem; text-align: center;
}
.cards { display: flex; flex-wrap: wrap; gap: 0.9rem; }
.card {
  flex: 1 1 17rem;
  padding: 1rem 1.1rem; background: var(--sheet); border: 1px solid var(--line); border-top: 3px solid var(--tone);
  border-radius: 0.5rem; font-size: 0.925rem;
}
.card h3 { display: flex; justify-content: space-between; align-items: baseline; margin-bottom: 0.4rem; }
.card h3 .quiet { font-weight: 400; }
.badge {
  display: inline-block; padding: 0.05rem 0.55rem; border-radius: 1rem; background: var(--wash); color: var(--tone);
  font-size: 0.8rem; font-weight: 600; white-space: nowrap;
}
dl {
  display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; margin: 0; border-top: 1px solid var(--line);
}
dt, dd { margin: 0; padding: 0.45rem 0; border-bottom: 1px solid var(--line); font-size: 0.925rem; }
dt { padding-right: 1.5rem; color: var(--quiet); }
.timeline { margin: 1rem 0 0; padding: 0 0 0 1.5rem; list-style: none; border-left: 2px solid var(--line); }
.timeline > li { position: relative; margin-bottom: 1.4rem; }
.timeline > li::before {
  content: ""; position: absolute; left: -1.95rem; top: 0.4rem; width: 0.7rem; height: 0.7rem; border-radius: 50%;
  background: var(--paper); border: 2px solid var(--quiet);
}
.timeline ul { padding: 0; list-style: none; }
.timeline ul li { padding-left: 1.15rem; text-indent: -1.15rem; font-size: 0.9rem; overflow-wrap: anywhere; }
.dot {
  display: inline-block; width: 0.55rem; height: 0.55rem; margin-right: 0.6rem; border-radius: 50%; text-indent: 0;
  border: 1.5px solid var(--idle);
}
.legend .dot:nth-of-type(2) { margin-left: 1.5rem; }
.dot.proven { background: var(--good); border-color: var(--good); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.875rem; }
th { color: var(--quiet); font-weight: 500; text-align: left; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
td code { overflow-wrap: normal; }
.number { white-space: nowrap; color: var(--quiet); font-variant-numeric: tabular-nums; text-align: right; }
footer { margin-top: 3rem; color: var(--quiet); font-size: 0.8rem; }
@media (max-width: 40rem) {
  .verdict { padding: 1.1rem; }
  dl { grid-template-columns: 1fr; }
  dt { padding-bottom: 0; border-bottom: 0; }
}
@media print {
  :root {
    --paper: #fff; --sheet: #fff; --ink: #000; --quiet: #444; --line: #bbb;
    --good: #0b5d33; --warn: #6e4600; --bad: #8c1c16; --idle: #444;
    --good-wash: #fff; --warn-wash: #fff; --bad-wash: #fff; --idle-wash: #fff;
  }
  body { padding: 0; font-size: 10pt; }
  .card, .timeline > li, tr, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  td code { overflow-wrap: anywhere; }
  .mark, .dot, .badge { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
