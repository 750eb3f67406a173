"use strict";
// State, keys, and which view is drawn. Every change goes through `set`, which draws what it concerns.

const VIEWS = { graph: ["Graph", graphView], collectives: ["Collectives", collectivesView], sites: ["Sites", sitesView], decode: ["Decode step", decodeView], passes: ["Passes", passesView] };
const MODES = ["side", "unified", "changed"];
const find = (id) => document.getElementById(id);

const app = {
  state: { view: "graph", record: RECORDS.length - 1, graph: RECORDS[0].graphs.length - 1, stage: null, other: null, mode: "side", query: "", selected: null, reason: null },
  folded: new Map(),
  visible: [],
  chart: {},

  current() {
    const record = RECORDS[this.state.record];
    const graph = record.graphs[Math.min(this.state.graph, record.graphs.length - 1)];
    return [record, graph, graph.all.find((one) => one.name === this.state.stage) || stageAfter(graph)];
  },
  other() {
    if (!this.state.other) return null;
    const [record, graph, ...name] = this.state.other.split("/");
    const found = RECORDS[record].graphs[graph];
    return [RECORDS[record], found, found.all.find((one) => one.name === name.join("/"))];
  },
  stageLabel([record, graph, stage]) {
    return `${RECORDS.length > 1 ? `${record.label}: ` : ""}${graph.phase}, after ${stage.name}`;
  },
  /** The two stages that headline and collectives compare: before and after, or the ends of two records. */
  ends() {
    const [, graph] = this.current();
    if (RECORDS.length === 1) return [stageBefore(graph), stageAfter(graph)];
    return RECORDS.map((record) => stageAfter(record.graphs.find((one) => one.phase === graph.phase) || record.graphs[0]));
  },
  endLabels() {
    const [from, to] = this.ends();
    return RECORDS.length === 1 ? [`Before: after ${from.name}`, `After: after ${to.name}`] : RECORDS.map((record) => record.label);
  },
  set(changes) {
    Object.assign(this.state, changes);
    if (!("reason" in changes)) this.state.reason = null;
    this.draw();
  },
  isOpen(id, section) {
    if (this.state.query) return true;
    return this.folded.has(id) ? !this.folded.get(id) : !(FOLDED_AT_START.has(section) && this.current()[2].layers.length > 0);
  },
  toggle(id, section) {
    this.folded.set(id, this.isOpen(id, section));
    this.draw();
  },
  foldAll() {
    const heads = [...document.querySelectorAll(".section-head")];
    const fold = heads.some((head) => head.getAttribute("aria-expanded") === "true");
    const [, , stage] = this.current();
    const other = this.other();
    const rows = other ? compareNodes(other[2].nodes, stage.nodes) : stage.nodes.map((node) => ({ right: node }));
    for (const section of sectionsOf(rows)) this.folded.set(section.id, fold);
    this.draw();
  },
  select(key) {
    this.state.selected = key;
    for (const row of document.querySelectorAll(".row")) row.classList.toggle("chosen", row.dataset.key === key);
    this.drawDetail();
  },
  /** Go to a node of the shown stage, whatever was folded or filtered. */
  reveal(key) {
    this.state.query = "";
    find("search").value = "";
    const [, , stage] = this.current();
    const section = sectionsOf(stage.nodes.map((node) => ({ right: node }))).find((one) => one.modules.some((module) => module.rows.some((row) => row.right.key === key)));
    if (section && !this.state.other) this.folded.set(section.id, false);
    else this.folded.clear();
    this.set({ view: "graph", selected: key });
    const row = document.querySelector(`.row[data-key="${CSS.escape(key)}"]`);
    if (row) row.scrollIntoView({ block: "center" });
  },
  revealIn(stage, key) {
    RECORDS.forEach((record, r) => record.graphs.forEach((graph, g) => { if (graph.all.includes(stage)) Object.assign(this.state, { record: r, graph: g, stage: stage.name, other: null }); }));
    this.reveal(key);
  },
  /** The pass that left a collective, with its reason in view. */
  showReason(one) {
    this.set({ view: "passes", reason: one, query: "" });
    find("search").value = "";
    const found = [...document.querySelectorAll(".refusal.chosen")][0];
    if (found) found.scrollIntoView({ block: "center" });
  },
  draw() {
    const [record, graph] = this.current();
    const facts = [record.model !== record.label && record.model, record.num_layers && `${record.num_layers} layers`, record.dtype, `${record.tp_size} ranks`, record.strategy && `strategy ${record.strategy}`, ...record.adapters.slice(0, 2)];
    find("facts").replaceChildren(...facts.filter(Boolean).map((text) => h("span", {}, text)));
    find("phases").replaceChildren(...record.graphs.map((one, index) => h("button", { type: "button", "aria-pressed": String(one === graph), onclick: () => this.set({ graph: index }) }, one.phase)));
    find("headline").replaceChildren(...[headline(this)].flat().filter(Boolean));
    find("views").replaceChildren(...Object.entries(VIEWS).map(([name, [text]], index) => h("button", { type: "button", role: "tab", "aria-selected": String(name === this.state.view), "data-view": name, onclick: () => this.set({ view: name }) }, text, h("kbd", {}, index + 1))));
    const main = find("main");
    const [scroll, strip] = [window.scrollY, document.querySelector(".stages")?.scrollLeft || 0];
    main.replaceChildren(VIEWS[this.state.view][1](this));
    window.scrollTo(0, scroll);
    const stages = document.querySelector(".stages");
    if (stages) stages.scrollLeft = strip;
    this.drawDetail();
  },
  drawDetail() {
    const panel = find("detail");
    const parts = this.state.view === "graph" && this.state.selected ? detailOf(this.state.selected, this) : null;
    panel.hidden = !parts;
    document.body.classList.toggle("with-detail", Boolean(parts));
    panel.replaceChildren(...[parts].flat(2).filter(Boolean));
  },
  step(by) {
    const at = this.visible.indexOf(this.state.selected);
    const next = this.visible[Math.min(this.visible.length - 1, Math.max(0, at + by))];
    if (!next) return;
    this.select(next);
    document.querySelector(`.row[data-key="${CSS.escape(next)}"]`)?.scrollIntoView({ block: "nearest" });
  },
  moveStage(by) {
    const [, graph, stage] = this.current();
    const next = graph.all[graph.all.indexOf(stage) + by];
    if (next) this.set({ stage: next.name });
  },
  compareWithBefore() {
    const [record, graph, stage] = this.current();
    const before = graph.all[Math.max(0, graph.all.indexOf(stage) - 1)];
    this.set({ other: this.state.other ? null : `${RECORDS.indexOf(record)}/${record.graphs.indexOf(graph)}/${before.name}` });
  },
};

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  find("theme").textContent = name === "dark" ? "Light" : "Dark";
}

const KEYS = {
  "[": () => app.moveStage(-1), "]": () => app.moveStage(1), j: () => app.step(1), k: () => app.step(-1),
  d: () => app.compareWithBefore(), m: () => app.set({ mode: MODES[(MODES.indexOf(app.state.mode) + 1) % MODES.length] }),
  f: () => app.foldAll(), t: () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
  p: () => app.set({ graph: (app.state.graph + 1) % app.current()[0].graphs.length }),
  "/": () => find("search").focus(), "?": () => find("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (app.state.query) { find("search").value = ""; app.set({ query: "" }); } else app.select(null);
    find("search").blur();
    return;
  }
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const view = Object.keys(VIEWS)[Number(event.key) - 1];
  const act = view ? () => app.set({ view }) : KEYS[event.key];
  if (act) { event.preventDefault(); act(); }
});

find("search").addEventListener("input", (event) => app.set({ query: event.target.value.trim() }));
find("search").addEventListener("keydown", (event) => { if (event.key === "Enter") app.step(1); });
find("theme").addEventListener("click", KEYS.t);
find("help").addEventListener("click", KEYS["?"]);

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
if (RECORDS.length > 1) {
  const [, graph] = app.current();
  const g = Math.max(0, RECORDS[0].graphs.findIndex((one) => one.phase === graph.phase));
  app.state.other = `0/${g}/${stageAfter(RECORDS[0].graphs[g]).name}`;
}
app.draw();
