"use strict";
// The estimated decode step against the batch size. The functions in FORMULAS are printed by sympy from the compiler's
// own cost model; this file only evaluates and draws them.

const CONSTANTS = {
  W_mem: ["memory", "GB/s", 1e9], F_peak: ["products", "TFLOP/s", 1e12], t_launch: ["a kernel", "µs", 1e-6],
  t_ar: ["all-reduce latency", "µs", 1e-6], W_ar: ["all-reduce link", "GB/s", 1e9],
  t_one: ["one-shot all-reduce", "µs", 1e-6], W_one: ["its link", "GB/s", 1e9],
  t_two: ["two-shot all-reduce", "µs", 1e-6], W_two: ["its link", "GB/s", 1e9],
  t_ag: ["all-gather latency", "µs", 1e-6], W_ag: ["all-gather link", "GB/s", 1e9], L: ["context", "tokens", 1],
};
const STRATEGIES = { local: "local: no LoRA collective", slora: "slora: S-LoRA placement", auto: "auto: the cheaper one of each group" };

/** Seconds of a step of `rows` rows. */
function stepSeconds(record, strategy, rows, values, adapters) {
  const load = { T: rows, K: adapters ? Math.min(adapters, rows) : rows };
  return FORMULAS[record][strategy]({ ...values, ...load });
}

function decodeView(app) {
  const [record] = app.current();
  const index = RECORDS.indexOf(record);
  const names = Object.keys(FORMULAS[index] || {});
  if (!names.length) return h("p.empty", {}, "A run's report has no estimates; `bdlora explain` has.");
  const state = (app.chart[index] ||= {
    values: { ...record.constants }, rows: record.batch,
    adapters: record.workload.adapters === record.batch ? 0 : record.workload.adapters,
  });
  const host = h("div.plot", { id: "plot" });
  const redraw = () => host.replaceChildren(...plot(index, names, state, redraw));
  const field = (name) => {
    const [words, unit, scale] = CONSTANTS[name];
    const input = h("input", { type: "number", step: "any", min: 0, value: Number((state.values[name] / scale).toPrecision(5)), "data-constant": name });
    input.addEventListener("input", () => { const value = Number(input.value); if (value > 0) { state.values[name] = value * scale; redraw(); } });
    return h("label.field", {}, h("span", {}, words), input, h("small", {}, unit));
  };
  const adapters = h("input", { type: "number", min: 0, step: 1, value: state.adapters, "data-constant": "K" });
  adapters.addEventListener("input", () => { state.adapters = Math.max(0, Math.floor(Number(adapters.value))); redraw(); });
  const reset = h("button.quiet", { type: "button", onclick: () => { delete app.chart[index]; app.draw(); } }, "as explained");
  redraw();
  return h("div", {},
    h("section.block", {}, h("h2", {}, "Estimated decode step", h("small", {}, ` ${record.machine.name}`)), host),
    h("section.block", {}, h("h2", {}, "Constants", " ", reset),
      h("div.fields", {}, Object.keys(CONSTANTS).filter((name) => name in state.values).map(field),
        h("label.field", {}, h("span", {}, "distinct adapters"), adapters, h("small", {}, "0: one for each row"))),
      h("p.note", {}, record.machine.source, record.is_extrapolated ? ` Collectives over ${record.tp_size} ranks were not measured on it: their latency is extrapolated.` : "",
        " Not counted: norms, activation functions, rotary angles, sampling, the host, and that kernels of up to 64 tokens' LoRA lie beside products on GPUs. The layouts of auto are those chosen for the explained load.")),
    h("details.block", {}, h("summary", {}, "The formulas"), names.map((name) => [h("h3", {}, name), h("pre.formula", {}, record.formulas.find((one) => one.strategy === name).expression)])));
}

function plot(index, names, state, redraw) {
  const width = 920, height = 380, left = 68, right = 150, top = 16, bottom = 44;
  const powers = Array.from({ length: 10 }, (_, power) => 2 ** power);
  const points = Array.from({ length: 109 }, (_, step) => Math.max(1, Math.round(2 ** (step / 12))));
  const xs = [...new Set(points)];
  const curves = names.map((name) => ({ name, ys: xs.map((rows) => stepSeconds(index, name, rows, state.values, state.adapters)) }));
  const top_ = Math.max(...curves.flatMap((curve) => curve.ys)) * 1.05;
  const x = (rows) => left + ((width - left - right) * Math.log2(rows)) / 9;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / top_;
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": "estimated seconds of a decode step against rows" });
  for (const value of ticks(top_)) {
    drawn.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), svg("text", { class: "tick", x: left - 10, y: y(value) + 4, "text-anchor": "end" }, seconds(value)));
  }
  for (const rows of powers) drawn.append(svg("text", { class: "tick", x: x(rows), y: height - bottom + 20, "text-anchor": "middle" }, rows));
  drawn.append(svg("text", { class: "axis", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "rows that decode together"));
  const ends = curves.map((curve) => ({ name: curve.name, at: y(curve.ys[curve.ys.length - 1]) })).sort((a, b) => a.at - b.at);
  ends.forEach((end, position) => { if (position) end.at = Math.max(end.at, ends[position - 1].at + 17); });
  for (const curve of curves) {
    drawn.append(svg("path", { class: `curve c-${curve.name}`, d: `M${xs.map((rows, at) => `${x(rows).toFixed(1)},${y(curve.ys[at]).toFixed(1)}`).join("L")}` }));
    drawn.append(svg("text", { class: `curve-name c-${curve.name}`, x: width - right + 10, y: ends.find((end) => end.name === curve.name).at + 4 }, curve.name));
  }
  const cursor = Math.min(512, Math.max(1, state.rows));
  drawn.append(svg("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: top, y2: height - bottom }));
  for (const name of names) drawn.append(svg("circle", { class: `point c-${name}`, cx: x(cursor), cy: y(stepSeconds(index, name, cursor, state.values, state.adapters)), r: 4 }));
  const move = (event) => {
    const box = drawn.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    state.rows = Math.min(512, Math.max(1, Math.round(2 ** ((9 * (at - left)) / (width - left - right)))));
    redraw();
  };
  drawn.addEventListener("click", move);
  const rowsInput = h("input", { type: "number", min: 1, max: 512, value: cursor, "data-constant": "T", "aria-label": "rows" });
  rowsInput.addEventListener("change", () => { state.rows = Math.max(1, Math.min(512, Math.round(Number(rowsInput.value)) || 1)); redraw(); });
  const best = Math.min(...names.map((name) => stepSeconds(index, name, cursor, state.values, state.adapters)));
  const line = (name) => {
    const value = stepSeconds(index, name, cursor, state.values, state.adapters);
    return h("div.reading", { "data-strategy": name, "data-seconds": value }, h(`i.key.c-${name}`), h("span", {}, STRATEGIES[name] || name), h("b", {}, seconds(value)), h("small", {}, value > best * 1.0005 ? `${(value / best).toFixed(2)}×` : "fastest"));
  };
  return [drawn, h("div.readings", {}, h("label", {}, "at ", rowsInput, " rows"), names.map(line))];
}

function ticks(most) {
  const raw = most / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= raw);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, at) => at * step);
}
