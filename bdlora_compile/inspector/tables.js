"use strict";
// Headline, collectives, sites and passes.

function headline(app) {
  const [record, graph] = app.current();
  const [from, to] = app.ends();
  const before = totals(from);
  const after = totals(to);
  // A block without layers is counted as a whole.
  const isLayered = [...from.collectives, ...to.collectives].some((one) => one.layers.length);
  const count = (stage, origin) => (isLayered ? perLayer(stage, origin) : totals(stage, origin).count);
  const place = isLayered ? "a layer" : "a forward";
  const layers = [count(from, "lora"), count(to, "lora")];
  const base = count(to, "base");
  const item = (label, value, more) => h("div.fact", {}, h("span.label", {}, label), h("strong", {}, value), h("small", {}, more));
  const items = [
    item(`LoRA collectives in ${place}`, [h("span.was", { id: "lora-before" }, layers[0]), " → ", h("span", { id: "lora-after" }, layers[1])],
      `${number(totals(from, "lora").count)} → ${number(totals(to, "lora").count)} in a forward`),
    item(`base collectives in ${place}`, h("span", { id: "base-after" }, base), `${number(totals(to, "base").count)} in a forward`),
    after.hasTokens && item("a rank sends for a token", [h("span.was", {}, bytes(before.token)), " → ", bytes(after.token)], `LoRA ${bytes(totals(from, "lora").token)} → ${bytes(totals(to, "lora").token)}`),
    item(record.kind === "foreign" ? "a rank sends in a forward" : `a rank sends in a ${graph.phase.split(" ")[0]} step`, [h("span.was", {}, bytes(before.wire)), " → ", h("span", { id: "wire-after", "data-bytes": after.wire }, bytes(after.wire))], record.kind === "foreign" ? "with the inputs that were traced" : `${number(graph.batch)} row${graph.batch > 1 ? "s" : ""} of ${number(graph.seq)} token${graph.seq > 1 ? "s" : ""}`),
  ];
  const estimate = record.estimates.find((one) => one.phase === graph.phase && one.strategy === record.strategy);
  if (estimate) items.push(item(`estimated ${graph.phase} step`, seconds(estimate.seconds), `${record.machine.name}${record.is_extrapolated ? ", extrapolated" : ""}`));
  const verdict = layers[1] === 0
    ? `LoRA adds no collective to ${place}${layers[0] ? `: S-LoRA placement had ${layers[0]}${forToken(from)}` : ""}.`
    : `LoRA keeps ${layers[1]} collective${layers[1] > 1 ? "s" : ""} in ${place}${forToken(to)}; the collectives' table says why.`;
  const ranks = record.ranks && h(`p.verdict.ranks${record.ranks.difference ? ".differ" : ""}`, {}, record.ranks.difference
    ? `Ranks differ: ${record.ranks.difference}` : `${record.ranks.size > 1 ? `All ${record.ranks.size} ranks have this graph; written` : "Written"} by rank ${record.ranks.rank}.`);
  return [h("p.verdict", {}, verdict), ranks, h("div.facts-grid", {}, items.filter(Boolean))];
}

/** ", 12 kB for each token" of LoRA's collectives, where rows are known. */
function forToken(stage) {
  const found = totals(stage, "lora");
  return found.hasTokens ? `, ${bytes(found.token)} for each token` : "";
}

function collectivesView(app) {
  const [from, to] = app.ends();
  const labels = app.endLabels();
  return h("div", {},
    collectiveTable(app, from, labels[0], "before"), collectiveTable(app, to, labels[1], "after"),
    h("p.note", {}, "Bytes of one rank in a ring: an all-reduce sends 2(N−1)/N of its payload, a gather (N−1)/N. ",
      "The payload of an all-reduce is its operand, of an all-gather its result."));
}

function collectiveTable(app, stage, label, id) {
  const [record] = app.current();
  const rows = collectiveRows(stage).filter((one) => !app.state.query || JSON.stringify(one).toLowerCase().includes(app.state.query.toLowerCase()));
  const most = Math.max(1, ...rows.map((one) => one.wire_bytes || 0));
  const line = (one) => h("tr", { "data-origin": one.origin, "data-key": one.key },
    h("td", {}, one.layers.length ? [one.layers.length > 1 ? `layers ${layerNumbers(one.layers)}` : `layer ${layerNumbers(one.layers)}`, one.runs > 1 ? h("span.times", {}, ` ×${one.runs}`) : null] : "outside layers"),
    h("td", {}, originBadge(one.origin), one.site ? [" ", h("code", {}, shortPath(one.site))] : null,
      one.reason ? h("div", {}, h("button.link.why", { type: "button", onclick: () => app.showReason(one) }, "why it stays")) : null),
    h("td", {}, h("button.link", { type: "button", onclick: () => app.revealIn(stage, one.key) }, badge("collective"), " ", OPERATORS[one.kind] || one.kind), h("small", {}, ` of ${one.group_size}`)),
    h("td", {}, h("code", {}, `${one.dtype}[${one.shape.join(", ")}]`)),
    h("td.num", {}, number(one.payload_bytes)),
    h("td.num", {}, h("span.meter", { style: `--part:${(100 * (one.wire_bytes || 0)) / most}%` }), number(one.wire_bytes)),
    totals(stage).hasTokens && h("td.num", {}, number(one.wire_bytes_per_token)),
    h("td.num", {}, one.runs));
  const sum = (text, found) => h("tr.total", {}, h("td", { colspan: 4 }, text), h("td.num", {}, number(found.payload)), h("td.num", {}, number(found.wire)), totals(stage).hasTokens && h("td.num", {}, number(found.token)), h("td.num", {}, found.count));
  const layer = layerTotals(stage);
  const body = [...rows.map(line), ...layer.map(([text, found]) => sum(text, found)), sum("a forward", totals(stage))];
  const token = totals(stage).hasTokens ? [{ text: "wire a token", num: 1 }] : [];
  const step = record.kind === "foreign" ? "a forward" : "a step";
  return h("section.block", { id: `collectives-${id}` }, h("h2", {}, label, h("small", {}, ` ${number(totals(stage).count)} collective${totals(stage).count === 1 ? "" : "s"}`)),
    table(["where", "for", "operator", "operand on a rank", { text: `payload ${step}`, num: 1 }, { text: `wire ${step}`, num: 1 }, ...token, { text: "times", num: 1 }], body));
}

/** What one layer sends, for each set of layers that send alike. */
function layerTotals(stage) {
  const byLayer = new Map();
  for (const one of stage.collectives) {
    for (const layer of one.layers) {
      const sum = byLayer.get(layer) || { payload: 0, wire: 0, token: 0, count: 0 };
      byLayer.set(layer, { payload: sum.payload + (one.payload_bytes || 0), wire: sum.wire + (one.wire_bytes || 0), token: sum.token + (one.wire_bytes_per_token || 0), count: sum.count + 1 });
    }
  }
  const alike = new Map();
  for (const [layer, sum] of byLayer) {
    const id = JSON.stringify(sum);
    alike.set(id, [...(alike.get(id) || []), layer]);
  }
  return [...alike].map(([id, layers]) => [`one of layers ${layerNumbers(layers)}`, JSON.parse(id)]);
}

function sitesView(app) {
  const [record] = app.current();
  if (!record.sites.length) return h("p.empty", {}, "A run's report does not list sites; `bdlora explain` does.");
  const most = Math.max(...record.sites.map((site) => site.weight_bytes), 1);
  const found = record.sites.filter((site) => !app.state.query || site.site.toLowerCase().includes(app.state.query.toLowerCase()));
  const size = (pair) => `${pair[0]} × ${pair[1]}`;
  const line = (site) => h("tr", {}, h("td", {}, h("code", {}, shortPath(site.site)), h("span.times", {}, ` ×${site.layers}`)), h("td", {}, site.role), h("td", {}, h(`span.layout.l-${site.layout}`, {}, site.layout)),
    h("td", {}, size(site.weight)), h("td", {}, size(site.local_weight), site.copies > 1 ? h("small", {}, ` in ${site.copies} copies`) : null),
    h("td", {}, site.ranks.join(", ") || "none"), h("td", {}, size(site.local_a)), h("td", {}, size(site.local_b)),
    h("td.num", {}, h("span.meter", { style: `--part:${(100 * site.weight_bytes) / most}%` }), number(site.weight_bytes)), h("td.num", {}, number(site.adapter_bytes)), h("td.num", {}, number(site.flops)));
  const decisions = record.decisions.map((one) => h("li", {}, h("code", {}, shortPath(one.group)), ": ", h(`span.layout.l-${one.chosen}`, {}, one.chosen), ` ${one.why}`));
  return h("div", {},
    h("section.block", {}, h("h2", {}, "LoRA sites", h("small", {}, ` on the rank that holds most; bytes of one layer, FLOPs of one token`)),
      table(["site", "role", "layout", "weight", "on a rank", "R", "A on a rank", "B on a rank", { text: "weight bytes", num: 1 }, { text: "adapter bytes", num: 1 }, { text: "FLOPs", num: 1 }], found.map(line), { id: "sites" })),
    h("p.note", {}, `A rank holds ${bytes(record.weight_bytes)} of weights and ${bytes(record.adapter_bytes)} of one adapter. `, record.adapters.join("; ")),
    h("section.block", {}, h("h2", {}, "Layouts, and why"), h("ul.plain", {}, decisions)));
}

function passesView(app) {
  const [, graph] = app.current();
  const longest = Math.max(...graph.all.map((stage) => stage.seconds), 1e-9);
  const blocks = graph.all.map((stage) => {
    const delta = stage.nodes_after - stage.nodes_before;
    const isIdle = !stage.matches && !delta;
    const notes = Object.entries(stage.notes).map(([name, value]) => `${name} ${value}`).join(", ");
    return h(`section.pass${isIdle ? ".idle" : ""}`, { "data-pass": stage.name },
      h("div.pass-head", {},
        h("button.link", { type: "button", onclick: () => app.set({ view: "graph", stage: stage.name }) }, h("b", {}, stage.name)),
        h("span.timeline", {}, h("i", { style: `width:${Math.max(0.6, (100 * stage.seconds) / longest)}%` })),
        h("span.ms", {}, `${(stage.seconds * 1e3).toFixed(stage.seconds < 0.01 ? 2 : 0)} ms`),
        h("span.nodes", {}, `${number(stage.nodes_before)} → ${number(stage.nodes_after)} nodes`),
        h("span.matched", {}, stage.matches ? `${number(stage.matches)} match${stage.matches > 1 ? "es" : ""}` : "no match"),
        h("span.left", {}, stage.refusals.length ? `${number(stage.refusals.length)} left` : "")),
      notes && h("p.note", {}, notes), reasons(stage, app));
  });
  return h("div.passes", {}, h("p.note", {}, "Time of each pass with its verification. A pass that left a place says why."), blocks);
}

function reasons(stage, app) {
  const byReason = new Map();
  for (const { where, reason } of stage.refusals) byReason.set(reason, [...(byReason.get(reason) || []), where]);
  return [...byReason].map(([reason, places]) => {
    const chosen = app.state.reason && app.state.reason.reason === reason;
    return h(`div.refusal${chosen ? ".chosen" : ""}`, { "data-reason": reason },
      h("p", {}, reason), h("details", { open: chosen || places.length < 4 }, h("summary", {}, `${places.length} place${places.length > 1 ? "s" : ""}`),
        h("ul", {}, places.slice(0, 400).map((place) => h("li", {}, h("code", {}, place))))));
  });
}
