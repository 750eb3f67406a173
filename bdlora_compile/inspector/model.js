"use strict";
// The data of the page, and what is read off it. Nothing here touches the document.

const RECORDS = JSON.parse(document.getElementById("data").textContent);

const SOURCES = JSON.parse(document.getElementById("sources").textContent);

const KINDS = {
  collective: ["C", "collective"],
  "lora-a": ["A", "LoRA, first factor"],
  "lora-b": ["B", "LoRA, second factor"],
  lora: ["L", "LoRA, both factors in one operator"],
  product: ["G", "product of the base model"],
  attention: ["T", "attention"],
  move: ["M", "view, copy or wait"],
  input: ["I", "input"],
  output: ["R", "return"],
  other: ["E", "elementwise and the rest"],
};

for (const record of RECORDS) {
  for (const graph of record.graphs) {
    for (const stage of [...graph.stages, ...graph.base_only]) {
      stage.nodes = stage.nodes.map((index) => record.nodes[index]);
      stage.byKey = new Map(stage.nodes.map((node) => [node.key, node]));
      stage.users = new Map();
      for (const node of stage.nodes) {
        for (const key of node.operands) {
          if (!stage.users.has(key)) stage.users.set(key, []);
          stage.users.get(key).push(node.key);
        }
      }
    }
    graph.all = [...graph.stages, ...graph.base_only];
    graph.isBaseOnly = (stage) => graph.base_only.includes(stage);
  }
}

/** The stage where LoRA lies as S-LoRA has it: before anything was localized. */
function stageBefore(graph) {
  return graph.stages.find((stage) => stage.name === "partition") ||
    graph.stages.find((stage) => stage.name === "tag paths") || graph.stages[0];
}

function stageAfter(graph) {
  return graph.stages[graph.stages.length - 1];
}

/** Collectives as rows: those that differ in their layer alone are one. */
function collectiveRows(stage) {
  const rows = new Map();
  for (const one of stage.collectives) {
    const inner = one.site && one.layers.length ? one.site.replace(one.layers[0], "*") : one.site;
    const id = JSON.stringify([one.kind, one.origin, inner, one.shape, one.dtype, one.group_size, one.reason,
      one.layers.length > 0, one.layers.length ? one.key.replace(one.layers[0], "*") : one.key]);
    const row = rows.get(id);
    if (row) row.layers = [...row.layers, ...one.layers];
    else rows.set(id, { ...one, layers: [...one.layers] });
  }
  return [...rows.values()].map((row) => ({ ...row, runs: Math.max(row.layers.length, 1) }));
}

const runsOf = (one) => Math.max(one.layers.length, 1);

/** Sums over the collectives of a stage, of one origin or of all. */
function totals(stage, origin) {
  const chosen = stage.collectives.filter((one) => !origin || one.origin === origin);
  const sum = (name) => chosen.reduce((all, one) => all + runsOf(one) * (one[name] || 0), 0);
  return {
    count: chosen.reduce((all, one) => all + runsOf(one), 0),
    payload: sum("payload_bytes"), wire: sum("wire_bytes"), token: sum("wire_bytes_per_token"),
    hasTokens: stage.collectives.some((one) => one.wire_bytes_per_token !== null),
  };
}

/** Collectives of one origin in a layer; the largest number where layers differ. */
function perLayer(stage, origin) {
  const counts = new Map();
  for (const one of stage.collectives) {
    for (const layer of one.layers) {
      if (one.origin === origin) counts.set(layer, (counts.get(layer) || 0) + 1);
    }
  }
  return Math.max(0, ...counts.values());
}

/** "0-79" or "0, 2-5" of paths of layers. */
function layerNumbers(layers) {
  const numbers = layers.map((path) => Number(path.split(".").pop())).sort((a, b) => a - b);
  const runs = [];
  for (const number of numbers) {
    const last = runs[runs.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([a, b]) => (a === b ? String(a) : `${a}-${b}`)).join(", ");
}

/** The part of a path inside its layer. */
function shortPath(path) {
  const parts = path.split(".");
  const at = parts.findIndex((part) => /^(\d+|\*)$/.test(part));
  return at < 0 ? path : parts.slice(at + 1).join(".");
}

function splitKey(key) {
  const at = key.startsWith("in/") ? 2 : key.lastIndexOf("/");
  return [key.slice(0, Math.max(at, 0)), key.slice(at + 1)];
}

/** A placement in words: "S0/8" is cut on dim 0 into 8 pieces. */
function placementWords(text, size) {
  const shard = /^S(\d+)\/(\d+)/.exec(text);
  if (shard) {
    const copies = size && size / Number(shard[2]) > 1 ? `, each held by ${size / Number(shard[2])} ranks` : "";
    return `cut on dim ${shard[1]} into ${shard[2]} pieces${copies}`;
  }
  if (text === "R") return "whole on every rank";
  if (text === "P") return "a summand on every rank; the sum is the value";
  return text ? "every rank has its own" : "";
}

/** Which part of a tensor each rank reads, from its local shape and its placement. */
function sliceWords(node, size) {
  const shard = /^S(\d+)\/(\d+)/.exec(node.placement);
  const shape = /\[(.*)\]/.exec(node.type);
  if (!shard || !shape) return node.placement === "R" ? "all of it" : "";
  const length = Number(shape[1].split(", ")[Number(shard[1])]);
  if (!Number.isFinite(length)) return "";
  const pieces = Number(shard[2]);
  const copies = Math.max(1, Math.round(size / pieces));
  const dims = ["rows", "columns"];
  return `${dims[shard[1]] || `dim ${shard[1]}`} ${length}·p to ${length}·(p+1), p = rank${copies > 1 ? ` // ${copies}` : ""}`;
}

const number = (value) => (value === null || value === undefined ? "by a run" : Math.round(value).toLocaleString("en-US"));

function bytes(value) {
  if (value === null || value === undefined) return "by a run";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let amount = value;
  while (amount >= 1000 && at < units.length - 1) { amount /= 1000; at += 1; }
  return `${amount.toLocaleString("en-US", { maximumFractionDigits: at && amount < 100 ? 2 : 0 })}\u00a0${units[at]}`;
}

function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 1e-3) return `${(value * 1e3).toFixed(2)} ms`;
  return `${(value * 1e6).toFixed(1)} µs`;
}

/** What Inductor made of the region that a node is in, with and without adapters: [{title, text, lines}]. */
function codeOf(record, node, isBaseOnly) {
  const own = (record.code || []).filter((one) => one.is_base_only === isBaseOnly && node.key in one.nodes);
  return own.map((one) => ({
    title: one.layers.length ? `layer${one.layers.length > 1 ? "s" : ""} ${layerNumbers(one.layers)}` : one.region,
    text: one.text, lines: one.nodes[node.key],
  }));
}

const OPERATORS = { all_gather_into_tensor: "all_gather", reduce_scatter_tensor: "reduce_scatter", all_to_all_single: "all_to_all" };
const ORIGINS = { base: "base model", lora: "LoRA", fallback: "gather nobody asked for" };
