"""The style sheet and the script of a report; plain CSS and JavaScript of our own."""

STYLE = """
:root {
  --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --quiet: #5a6472; --rule: #d5dae1; --heat: #1d5fa8;
  --good: #146c3d; --bad: #a3273c; --warn: #fff3d6; --on-warn: #5c4300; --on-series: #fff;
  --c0: #1d64b0; --c1: #b4530a; --c2: #18764a; --c3: #7646b4; --c4: #b02f48;
  --c5: #0c7080; --c6: #80561f; --c7: #a03a88;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1d2127; --ink: #e6e9ed; --quiet: #a3adba; --rule: #363d47; --heat: #3f7fd0;
    --good: #6fd39a; --bad: #f49aa7; --warn: #3d3214; --on-warn: #f6e3b0; --on-series: #14171b;
    --c0: #7fb5f3; --c1: #f0a560; --c2: #6ccb94; --c3: #c1a0f2; --c4: #f28f9d;
    --c5: #60cad8; --c6: #d3ad7c; --c7: #ea9bd8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
.over { margin: 0 0 .3rem; color: var(--quiet); overflow-wrap: anywhere; }
.note, footer, small, figcaption span { color: var(--quiet); font-size: .88rem; }
.note { margin: 0 0 .8rem; max-width: 75ch; }
footer { margin-top: 3rem; }
.warn { background: var(--warn); color: var(--on-warn); padding: .5rem .8rem; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .84rem/1.45 ui-monospace, monospace; }
code span { display: inline-block; max-width: 100%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th { font-weight: 500; text-align: left; vertical-align: bottom; }
td, tbody th { vertical-align: baseline; }
.plain th, .plain td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); }
.plain td { min-width: 4rem; }
.plain tbody th { min-width: 7.5rem; }
.plain thead th { color: var(--quiet); }
td, .number { font-variant-numeric: tabular-nums; }
.words td:last-child { min-width: 11rem; }
.gains td { white-space: nowrap; }
.gains small { display: block; }
.matrix th { padding: .25rem .5rem; max-width: 9rem; min-width: 4.5rem; }
.matrix td { padding: .45rem .5rem; text-align: center; border: 2px solid var(--paper); }
.matrix thead th { text-align: center; font-size: .85rem; }
.matrix thead th:first-child { text-align: left; color: var(--quiet); }
.matrix tbody tr:first-child > * { border-bottom: 6px solid var(--paper); }
/* at most 60 % of the colour: the ink stays legible on it */
.heat { background: color-mix(in srgb, var(--heat) calc(var(--v) * .6), var(--card)); }
.none { color: var(--quiet); }
.marked { outline: 2px solid var(--ink); outline-offset: -4px; font-weight: 600; }
.up { color: var(--good); } .down { color: var(--bad); } .same { color: var(--quiet); }
.pair { display: grid; gap: 1rem; margin-top: 1rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.pair > :only-child { max-width: 38rem; }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: 8px; min-width: 0; }
figure.wide { margin-top: 1rem; }
figure .matrix tr > * { border-color: var(--card) !important; }
figure .heat { background: color-mix(in srgb, var(--heat) calc(var(--v) * .6), var(--paper)); }
figcaption { font-weight: 600; margin-bottom: .5rem; }
figcaption span { display: block; font-weight: 400; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 13px system-ui, sans-serif; }
svg .name { fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis, .zero { stroke: var(--quiet); stroke-width: 1; }
.boundary { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 4; }
.line { stroke: var(--c); stroke-width: 2.4; fill: none; stroke-linejoin: round; }
.again { stroke-dasharray: 7 4; }
.lead { stroke: var(--c); stroke-width: 1.4; fill: none; stroke-dasharray: 3 4; }
.faint { stroke: var(--c); stroke-width: 1; fill: none; opacity: .4; }
.mark { fill: var(--c); stroke: var(--c); stroke-width: 1.4; }
.hollow { fill: var(--card); }
svg text.own { fill: var(--c); font-weight: 600; }
.gate { fill: var(--c); }
.group { fill: none; stroke: var(--rule); }
.map text { font-size: 12px; }
h3 { font-size: .95rem; margin: .9rem 0 .4rem; }
.patches { display: flex; flex-wrap: wrap; gap: .8rem; margin: .3rem 0 .6rem; }
.patches > div { width: 132px; line-height: 1.25; overflow-wrap: anywhere; }
.patches svg { display: block; border-radius: 4px; margin-bottom: .25rem; image-rendering: pixelated; }
.patches small { display: block; }
.veil { fill: var(--paper); }
.silent { fill: var(--ink); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .5rem 0 0; padding: 0;
  font-size: .88rem; }
.legend li { overflow-wrap: anywhere; }
.legend svg { width: 26px; height: 12px; margin-right: .35rem; }
.bars { display: grid; gap: .6rem; }
.bars .label { font-size: .88rem; overflow-wrap: anywhere; }
.bar { display: flex; height: 1.6rem; border-radius: 4px; overflow: hidden; color: var(--quiet); }
.bar span { background: var(--c); color: var(--on-series); font-size: .82rem; line-height: 1.6rem; text-align: center;
  overflow: hidden; }
label { color: var(--quiet); font-size: .9rem; }
select, button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--quiet);
  border-radius: 5px; padding: .25rem .5rem; max-width: 100%; }
.choose { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: baseline; margin-bottom: .8rem; }
#count { color: var(--quiet); font-size: .9rem; }
.answer { border-left: 5px solid var(--rule); background: var(--card); padding: .6rem .8rem; margin-bottom: .7rem;
  border-radius: 0 8px 8px 0; }
.answer.right { border-color: var(--good); } .answer.wrong { border-color: var(--bad); }
.answer.partly { border-color: var(--c1); }
.answer b.right { color: var(--good); } .answer b.wrong { color: var(--bad); } .answer b.partly { color: var(--c1); }
.answer pre { max-height: 14rem; overflow-y: auto; }
.answer dl { margin-top: .4rem; }
.answer dd { white-space: pre-wrap; font: .84rem/1.6 ui-monospace, monospace; }
details summary { cursor: pointer; color: var(--quiet); }
@media (max-width: 520px) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  .answer dl { grid-template-columns: max-content 1fr; gap: .1rem .8rem; } .answer dd { margin: 0; }
  figure { padding: .7rem .5rem; }
  figure > svg text { font-size: 16px; }
}
"""

SCRIPT = """
"use strict";
for (const select of document.querySelectorAll("select.panels")) {
  const panels = select.closest("figure").querySelectorAll(".scroll");
  select.addEventListener("change", () => panels.forEach((panel, i) => { panel.hidden = i !== Number(select.value); }));
}
const source = document.getElementById("predictions");
if (source) {
  const PAGE = 20, data = JSON.parse(source.textContent), at = (id) => document.getElementById(id);
  const rows = at("row"), tasks = at("task"), filter = at("filter"), more = at("more"), list = at("answers");
  const verdict = (score) => score >= 1 ? "right" : score > 0 ? "partly" : "wrong";
  let left = [];
  const add = (parent, name, text, kind) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return parent.appendChild(node);
  };
  const fill = (select, names) => {
    const before = select.value;
    select.replaceChildren();
    names.forEach((name) => { add(select, "option", name).value = name; });
    if (names.includes(before)) select.value = before;
  };
  const show = () => {
    for (const [prompt, answer, prediction, score] of left.splice(0, PAGE)) {
      const kind = verdict(score), card = add(list, "div", undefined, "answer " + kind);
      add(card, "b", (kind === "partly" ? "partly right" : kind) + ", score " + score, kind);
      add(card, "pre", data.texts[prompt]);
      const facts = add(card, "dl");
      add(facts, "dt", "answer"); add(facts, "dd", data.texts[answer]);
      add(facts, "dt", "prediction"); add(facts, "dd", data.texts[prediction] || "(nothing)");
    }
    more.hidden = left.length === 0;
    more.textContent = left.length + " more";
  };
  const draw = () => {
    const task = data.rows[rows.selectedIndex].tasks[tasks.selectedIndex];
    left = task.shown.filter((record) => filter.value === "all" || verdict(record[3]) === filter.value);
    const cut = task.of > task.shown.length ? " (of " + task.of + " evaluated)" : "";
    at("count").textContent = left.length + " of " + task.shown.length + " answers" + cut;
    list.replaceChildren();
    show();
  };
  const choose = () => { fill(tasks, data.rows[rows.selectedIndex].tasks.map((task) => task.name)); draw(); };
  fill(rows, data.rows.map((row) => row.name));
  rows.selectedIndex = data.rows.length - 1;
  rows.addEventListener("change", choose);
  tasks.addEventListener("change", draw);
  filter.addEventListener("change", draw);
  more.addEventListener("click", show);
  choose();
}
"""
