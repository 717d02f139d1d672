"use strict";
const record = JSON.parse(document.getElementById("record").textContent);
const NS = "http://www.w3.org/2000/svg";

function node(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function titled(shape, text) {
  shape.append(node("title", {}, text));
  return shape;
}

// An SVG of the given size with room for axes, named for those who can't see it.
function canvas(id, width, height, label) {
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  document.getElementById(id).replaceChildren(svg);
  return svg;
}

function nothing(id, text) {
  const made = document.createElement("p");
  made.className = "details";
  made.textContent = text;
  document.getElementById(id).replaceChildren(made);
}

function percent(value) { return `${(100 * value).toFixed(1)} %`; }
function milliseconds(seconds) { return `${(1000 * seconds).toFixed(3)} ms`; }

// A round step of 1, 2 or 5 times a power of ten that cuts `span` into about `count` parts.
function step(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  for (const times of [1, 2, 5]) if (times * power >= rough) return times * power;
  return 10 * power;
}

const BOX = { width: 540, height: 230, left: 46, right: 12, top: 30, bottom: 34 };

// Axes of a chart: y from 0 to `top` with labels by `show`; returns the two scales.
function axes(svg, { x0, x1, top, show, xlabel, xshow, ycount = 4, xs }) {
  const { width, height, left, right, bottom } = BOX;
  const x = (value) => left + (width - left - right) * (value - x0) / (x1 - x0 || 1);
  const y = (value) => height - bottom - (height - bottom - BOX.top) * value / (top || 1);
  const by = step(top, ycount);
  for (let value = 0; value <= top * 1.0001; value += by) {
    svg.append(node("line", { class: "gridline", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(node("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, show(value)));
  }
  if (xs !== false) {
    const across = step(x1 - x0, 6);
    for (let value = Math.ceil(x0 / across) * across; value <= x1; value += across)
      svg.append(node("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, xshow(value)));
  }
  svg.append(node("line", { class: "axis", x1: left, x2: width - right, y1: y(0), y2: y(0) }));
  svg.append(node("text", { x: width - right, y: height - 2, "text-anchor": "end" }, xlabel));
  return { x, y };
}

function byPosition() {
  const { proposed_by_position: proposed, accepted_by_position: accepted } = record.speculation;
  if (!proposed.length) return nothing("by-position", "Nothing was proposed.");
  const rates = accepted.map((count, at) => count / proposed[at]);
  const svg = canvas("by-position", BOX.width, BOX.height,
    "Acceptance by position: " + rates.map((rate, at) => `${at + 1}: ${percent(rate)}`).join(", "));
  const { x, y } = axes(svg, { x0: 0.5, x1: proposed.length + 0.5, top: 1, show: (v) => `${Math.round(100 * v)} %`, xlabel: "position in the proposal", xs: false, ycount: 5 });
  const width = Math.min(56, 0.66 * (x(2) - x(1)));
  rates.forEach((rate, at) => {
    const middle = x(at + 1);
    svg.append(node("rect", { class: "ghost", x: middle - width / 2, width, y: y(1), height: y(0) - y(1), rx: 2 }));
    svg.append(titled(node("rect", { class: "bar", x: middle - width / 2, width, y: y(rate), height: y(0) - y(rate), rx: 2, "data-position": at + 1, "data-rate": rate }),
      `position ${at + 1}: ${accepted[at]} of ${proposed[at]} accepted`));
    svg.append(node("text", { class: "strong", x: middle, y: Math.max(y(rate) - 5, BOX.top - 3), "text-anchor": "middle" }, `${Math.round(100 * rate)} %`));
    svg.append(node("text", { x: middle, y: BOX.height - BOX.bottom + 18, "text-anchor": "middle" }, `${at + 1}`));
  });
}

// Rounds that emitted something, in order.
const verifies = record.rounds.filter((one) => one.emitted > 0);
const last = record.rounds.length ? record.rounds.at(-1) : null;
const span = last ? [record.rounds[0].at, last.at + last.seconds] : [0, 1];
const inTime = { x0: span[0], x1: span[1], xlabel: "seconds since arrival", xshow: (v) => +v.toFixed(4) };

function overTime() {
  const speculative = verifies.filter((one) => one.proposed > 0);
  if (!speculative.length) return nothing("over-time", "Nothing was proposed.");
  const reach = Math.max(4, Math.ceil(speculative.length / 12));
  const svg = canvas("over-time", BOX.width, BOX.height, `Acceptance rate over time, mean over ${reach} rounds; ${percent(record.speculation.acceptance_rate)} in all`);
  const { x, y } = axes(svg, { ...inTime, top: 1, show: (v) => `${Math.round(100 * v)} %`, ycount: 5 });
  const points = speculative.map((one, at) => {
    const window = speculative.slice(Math.max(0, at - reach + 1), at + 1);
    const sum = (key) => window.reduce((total, each) => total + each[key], 0);
    return [x(one.at + one.seconds), y(sum("accepted") / sum("proposed"))];
  });
  for (const one of speculative)
    svg.append(titled(node("circle", { class: "dot", r: 2, opacity: 0.45, cx: x(one.at + one.seconds), cy: y(one.accepted / one.proposed) }),
      `round ${one.round}: ${one.accepted} of ${one.proposed}`));
  svg.append(node("polyline", { class: "line", points: points.map((p) => p.join(",")).join(" ") }));
  svg.append(node("text", { x: BOX.left + 6, y: BOX.top - 12 }, `line: mean over ${reach} rounds; dots: single rounds`));
}

function kOverTime() {
  if (!verifies.length) return nothing("k-over-time", "No rounds.");
  const top = Math.max(1, ...verifies.map((one) => one.k));
  const svg = canvas("k-over-time", BOX.width, BOX.height, `K over time: mean ${record.speculation.mean_k.toFixed(2)}, largest ${top}`);
  const { x, y } = axes(svg, { ...inTime, top: top + 0.5, show: (v) => (Number.isInteger(v) ? v : ""), ycount: Math.min(top, 6) });
  let path = "";
  for (const one of verifies) path += `${path ? "L" : "M"}${x(one.at)},${y(one.k)}H${x(one.at + one.seconds)}`;
  for (const one of verifies)
    svg.append(titled(node("rect", { class: "bar", opacity: 0.55, x: x(one.at), width: Math.max(0.6, x(one.at + one.seconds) - x(one.at) - 0.6), y: y(one.accepted), height: y(0) - y(one.accepted) }),
      `round ${one.round}: K ${one.k}, ${one.accepted} accepted`));
  svg.append(node("path", { class: "line k", d: path }));
  svg.append(node("text", { x: BOX.left + 6, y: BOX.top - 12 }, "line: K asked for; bars: tokens accepted"));
}

function ceiling() {
  const found = record.ceiling;
  if (!found) return nothing("ceiling", "The memory's speed was not measured, so no ceiling is known.");
  const rows = [
    ["measured", found.measured_tokens_per_second, "fill-accept"],
    ["ceiling of these rounds", found.tokens_per_second, "fill-round"],
    ["ceiling, base alone", found.base_alone_tokens_per_second, "fill-round"],
  ];
  const svg = canvas("ceiling", 540, 190, rows.map((row) => `${row[0]}: ${row[1].toFixed(1)} tokens per second`).join("; "));
  const most = Math.max(...rows.map((row) => row[1]));
  rows.forEach(([name, value, fill], at) => {
    const top = 8 + 52 * at;
    svg.append(node("text", { x: 0, y: top + 12 }, name));
    svg.append(node("rect", { class: "ghost", x: 0, y: top + 18, width: 440, height: 18, rx: 3 }));
    svg.append(node("rect", { class: fill, x: 0, y: top + 18, width: 440 * value / most, height: 18, rx: 3 }));
    svg.append(node("text", { class: "strong", x: 448, y: top + 32 }, `${value.toFixed(1)} t/s`));
  });
  svg.append(node("text", { x: 0, y: 182 }, `weights read at ${(found.memory_bandwidth / 1e9).toFixed(1)} GB/s; ${percent(found.share)} of the ceiling reached`));
}

const PHASES = ["draft", "verify", "cache", "link", "accept", "schedule", "idle"];

function phaseBar() {
  const totals = PHASES.map((name) => record.phases[name].total);
  const whole = totals.reduce((sum, one) => sum + one, 0) || 1;
  const svg = canvas("phase-bar", 1140, 52, PHASES.map((name, at) => `${name} ${percent(totals[at] / whole)}`).join(", "));
  let at = 0;
  PHASES.forEach((name, index) => {
    const width = 1140 * totals[index] / whole;
    svg.append(titled(node("rect", { class: `fill-${name}`, x: at, y: 0, width: Math.max(0, width - 1), height: 24, "data-phase": name, "data-seconds": totals[index] }), `${name}: ${totals[index].toFixed(3)} s`));
    if (width > 70) svg.append(node("text", { x: at + 2, y: 42 }, `${name} ${percent(totals[index] / whole)}`));
    at += width;
  });
}

byPosition();
overTime();
kOverTime();
ceiling();
phaseBar();
