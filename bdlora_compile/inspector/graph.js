"use strict";
// The graph of a stage, or two stages side by side: sections that fold, a row for each node.

const FOLDED_AT_START = new Set(["inputs", ""]);

/** Where a node is listed: {section, module}. */
function placeOf(node) {
  if (node.kind === "input") return { section: "inputs", module: "" };
  const [module] = splitKey(node.key);
  if (node.layer) return { section: node.layer, module: shortPath(module) };
  return { section: "", module };
}

/** Rows in sections, one for each run of rows of one place. */
function sectionsOf(rows) {
  const sections = [];
  for (const row of rows) {
    const node = row.right || row.left;
    let { section, module } = placeOf(node);
    const last = sections[sections.length - 1];
    // A node without a module of its own stays with its neighbours.
    if (section === "" && module === "" && last && last.section !== "inputs") {
      section = last.section;
      module = last.modules[last.modules.length - 1].module;
    }
    if (!last || last.section !== section) sections.push({ section, modules: [{ module, rows: [row] }] });
    else if (last.modules[last.modules.length - 1].module !== module) last.modules.push({ module, rows: [row] });
    else last.modules[last.modules.length - 1].rows.push(row);
  }
  return sections.map((one, index) => ({ ...one, id: `${one.section || "outside"}@${index}` }));
}

function sectionTitle(section, stage) {
  if (section === "inputs") return ["inputs, weights, banks, caches", ""];
  if (section === "") return ["outside layers", ""];
  const alike = stage.layers.find((one) => one.shown === section);
  const title = `layer ${section.split(".").pop()}`;
  return [title, alike && alike.layers.length > 1 ? `× ${alike.layers.length}: layers ${layerNumbers(alike.layers)}` : ""];
}

/** A strip with a stroke for each node in the colour of its kind. */
function strip(rows) {
  const nodes = rows.map((row) => row.right || row.left);
  const drawn = svg("svg", { class: "strip", viewBox: `0 0 ${Math.max(nodes.length, 1) * 3} 10`, preserveAspectRatio: "none", "aria-hidden": "true" });
  nodes.forEach((node, index) => {
    const tall = node.kind !== "move" && node.kind !== "other" && node.kind !== "input";
    drawn.append(svg("rect", { class: `f-${node.kind}`, x: index * 3, y: tall ? 0 : 4, width: 2.2, height: tall ? 10 : 6 }));
  });
  return drawn;
}

function graphView(app) {
  const { state } = app;
  const [record, graph, stage] = app.current();
  const other = app.other();
  const rows = other ? compareNodes(other[2].nodes, stage.nodes) : stage.nodes.map((node) => ({ status: "same", left: null, right: node }));
  const shown = rows.filter((row) => matches(row.right || row.left, state.query) || (row.left && matches(row.left, state.query)));
  const kept = other && state.mode === "changed" ? shown.filter((row) => row.status !== "same") : shown;
  const isSide = other && state.mode === "side";
  const sections = sectionsOf(kept);
  app.visible = [];
  const list = h(`div.graph${other ? ".comparing" : ""}${isSide ? ".side" : ""}`, { id: "graph" },
    isSide && h("div.panes", {}, h("span", {}, app.stageLabel(other)), h("span", {}, app.stageLabel([record, graph, stage]))),
    sections.map((section) => sectionElement(section, stage, isSide, app)));
  if (!kept.length) list.append(h("p.empty", {}, other && !state.query ? "No node differs." : "Nothing found."));
  return h("div", {}, stageTabs(app), compareBar(app, rows, other), exceptions(stage), list, legend());
}

function stageTabs(app) {
  const [record, graph, stage] = app.current();
  const tab = (one) => {
    const delta = one.nodes_after - one.nodes_before;
    return h("button.stage", {
      type: "button", role: "tab", "aria-selected": String(one === stage), "data-stage": one.name,
      onclick: () => app.set({ stage: one.name }),
    }, h("b", {}, one.name), h("small", {}, graph.isBaseOnly(one) ? "base only" : delta ? `${delta > 0 ? "+" : "−"}${Math.abs(delta)} nodes` : "no node"));
  };
  const records = RECORDS.length > 1
    ? segments(RECORDS.map((one, index) => [index, one.label]), RECORDS.indexOf(record), (value) => app.set({ record: value }), "record") : null;
  return h("div.stages", { role: "tablist", "aria-label": "stages" }, records, graph.all.map(tab));
}

function compareBar(app, rows, other) {
  const { state } = app;
  const options = [h("option", { value: "" }, "nothing")];
  RECORDS.forEach((record, r) => record.graphs.forEach((graph, g) => {
    const group = h("optgroup", { label: `${RECORDS.length > 1 ? `${record.label}, ` : ""}${graph.phase}` });
    for (const stage of graph.all) group.append(h("option", { value: `${r}/${g}/${stage.name}` }, stage.name));
    options.push(group);
  }));
  const select = h("select", { id: "other", onchange: (event) => app.set({ other: event.target.value || null }) }, options);
  select.value = state.other || "";
  const counts = {};
  for (const row of rows) counts[row.status] = (counts[row.status] || 0) + 1;
  const words = ["added", "removed", "changed", "moved", "same"].filter((name) => counts[name])
    .map((name) => h(`span.count.d-${name}`, {}, `${counts[name]} ${name}`));
  return h("div.bar", {},
    h("label", {}, "compare with ", select),
    other && segments([["side", "side by side"], ["unified", "unified"], ["changed", "only changed"]], state.mode, (mode) => app.set({ mode }), "view"),
    other && h("span.counts", {}, words),
    h("button.quiet", { type: "button", id: "fold", onclick: () => app.foldAll() }, "fold / unfold"));
}

/** Layers that are not like the others. */
function exceptions(stage) {
  if (stage.layers.length < 2) return null;
  const [most, ...rest] = [...stage.layers].sort((a, b) => b.layers.length - a.layers.length);
  return h("p.note", { id: "exceptions" }, `${most.layers.length} layers are alike (${layerNumbers(most.layers)}); apart from them: `,
    rest.slice(0, 6).map((one) => `layers ${layerNumbers(one.layers)}`).join("; "), rest.length > 6 ? ` and ${rest.length - 6} more kinds` : "", ".");
}

function sectionElement(section, stage, isSide, app) {
  const isOpen = app.isOpen(section.id, section.section);
  const all = section.modules.flatMap((one) => one.rows);
  const [title, more] = sectionTitle(section.section, stage);
  const head = h("button.section-head", { type: "button", "aria-expanded": String(isOpen), "data-section": section.section || "outside", onclick: () => app.toggle(section.id, section.section) },
    h("span.twist", { "aria-hidden": "true" }, isOpen ? "▾" : "▸"), h("b", {}, title), more && h("span.times", {}, more), strip(all), h("small", {}, `${all.length} nodes`));
  const body = isOpen ? section.modules.map((one) => h("div.module", {},
    h("div.module-name", {}, one.module || "·"), h("div.rows", {}, one.rows.map((row) => rowElement(row, isSide, app))))) : null;
  return h("section.section", {}, head, body);
}

function rowElement(row, isSide, app) {
  const node = row.right || row.left;
  app.visible.push(node.key);
  const select = () => app.select(node.key, row);
  const attributes = { "data-key": node.key, "data-status": row.status, tabindex: "0", role: "button", onclick: select,
    onkeydown: (event) => { if (event.key === "Enter") { event.preventDefault(); select(); } } };
  const chosen = app.state.selected === node.key ? ".chosen" : "";
  if (isSide) return h(`div.row.pair.d-${row.status}${chosen}`, attributes, cell(row.left), cell(row.right));
  const from = row.status === "changed" ? h("span.was", {}, differences(row.left, row.right).map((name) => changeWords(name, row)).join("; ")) : null;
  return h(`div.row.d-${row.status}${chosen}`, attributes, cell(node), from);
}

function changeWords(name, row) {
  if (name === "operands") return "reads other nodes";
  return `${name} was ${row.left[name] || "none"}`;
}

function cell(node) {
  if (!node) return h("span.cell.void", {}, "");
  const [, name] = splitKey(node.key);
  return h("span.cell", {}, badge(node.kind),
    h("span.op", {}, node.kind === "input" ? node.source || name : shortOperator(node.operator)),
    node.origin !== "base" && h(`span.dot.o-${node.origin}`, { title: ORIGINS[node.origin] }, node.origin === "lora" ? "lora" : "!"),
    h("span.type", {}, node.type),
    h("span.place", { title: placementWords(node.placement) }, node.placement));
}

function shortOperator(name) {
  const short = name.replace(/^_c10d_functional::/, "").replace(/^bdlora::/, "");
  return OPERATORS[short] || short;
}

function matches(node, query) {
  if (!query) return true;
  const text = `${node.key} ${node.operator} ${node.type} ${node.site || ""} ${node.source || ""} ${KINDS[node.kind][1]}`.toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

/** The panel of one node. */
function detailOf(key, app) {
  const [record, graph, stage] = app.current();
  const other = app.other();
  const node = stage.byKey.get(key) || (other && other[2].byKey.get(key));
  if (!node) return null;
  const home = stage.byKey.has(key) ? stage : other[2];
  const facts = [
    ["what", [badge(node.kind), " ", KINDS[node.kind][1], node.origin !== "base" ? [" ", originBadge(node.origin)] : null]],
    ["value", h("code", {}, node.type || "none")],
    ["placement", node.kind === "output" ? null : [h("code", {}, node.placement), " ", placementWords(node.placement, record.tp_size)]],
    ["reads", node.source && [h("code", {}, node.source), node.placement.startsWith("S") ? [h("br"), sliceWords(node, record.tp_size)] : null]],
    ["LoRA site", node.site && h("code", {}, node.site)],
    ["arguments", node.arguments && h("code", {}, node.arguments)],
    ["source", node.file && [h("code.file", {}, node.file), node.code && h("pre", {}, node.code)]],
    ["made by", node.stage ? `the ${node.stage} pass` : node.kind === "input" ? null : "the model's own code"],
    ["kernel", node.kernel],
  ].filter(([, value]) => value);
  const links = (keys) => keys.map((one) => {
    const target = home.byKey.get(one);
    return h("li", {}, h("button.link", { type: "button", onclick: () => app.reveal(one) }, target ? badge(target.kind) : null, " ", one));
  });
  const users = home.users.get(key) || [];
  return [
    h("div.detail-head", {}, h("h2", {}, shortOperator(splitKey(node.key)[1])), h("button.quiet", { type: "button", id: "close", onclick: () => app.select(null) }, "Close")),
    h("p.key", {}, node.key),
    through(node.key, graph, stage, app),
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    collectiveFacts(node, home, app),
    codeFacts(record, graph, node, home),
    node.operands.length ? [h("h3", {}, `reads ${node.operands.length}`), h("ul.links", {}, links(node.operands))] : null,
    users.length ? [h("h3", {}, `read by ${users.length}`), h("ul.links", {}, links(users))] : null,
  ];
}

/** A dot for each stage: where the node is, and where it changed. */
function through(key, graph, stage, app) {
  let before = null;
  return h("div.through", { "aria-label": "the node through the stages" }, graph.all.map((one) => {
    const found = one.byKey.get(key);
    const status = !found ? "absent" : !before ? "new" : differences(before, found).length ? "changed" : "same";
    before = found || before;
    return h(`button.step.s-${status}${one === stage ? ".here" : ""}`, { type: "button", title: `${one.name}: ${status}`, onclick: () => app.set({ stage: one.name }) },
      h("i"), h("span", {}, one.name));
  }));
}

function collectiveFacts(node, stage, app) {
  const one = node.kind === "collective" && stage.collectives.find((found) => found.key === node.key);
  if (!one) return null;
  return h("div.wire", {}, h("p", {}, `Over ${one.group_size} ranks a rank sends ${bytes(one.wire_bytes)} a step${one.wire_bytes_per_token === null ? "" : `, ${bytes(one.wire_bytes_per_token)} for a token`}; payload ${bytes(one.payload_bytes)}.`),
    one.reason ? h("p", {}, "It is still here because ", h("button.link.why", { type: "button", onclick: () => app.showReason(one) }, one.reason), ".") : null);
}

/** The code that runs a node: our own kernels, and on a run what Inductor made of its region. */
function codeFacts(record, graph, node, stage) {
  const own = (node.kernel.match(/runtime\/(?:kernels\/)?[a-z_]+\.py/g) || []).filter((path) => SOURCES[path])
    .map((path) => codeBlock(`source of ${path}`, SOURCES[path], []));
  const generated = codeOf(record, node, graph.isBaseOnly(stage))
    .map((one) => codeBlock(`Inductor's code of ${one.title === "graph" ? "the graph" : one.title}`, one.text, one.lines));
  if (!own.length && !generated.length) return null;
  return h("div.codes", {}, h("h3", {}, "code"), generated, own);
}

/** Code that unfolds; the lines that name the node are marked, and the first of them comes into view. */
function codeBlock(title, text, lines) {
  const marked = new Set(lines);
  const body = h("pre.code", { tabindex: "0" });
  const block = h("details", {}, h("summary", {}, title, lines.length ? h("small", {}, ` line ${lines.join(", ")}`) : null), body);
  block.addEventListener("toggle", () => {
    if (!block.open || body.childNodes.length) return;
    text.split("\n").forEach((line, index) => body.append(h(marked.has(index + 1) ? "mark" : "span", {}, `${line}\n`)));
    const first = body.querySelector("mark");
    if (first) body.scrollTop = first.offsetTop - 12;
  });
  return block;
}
