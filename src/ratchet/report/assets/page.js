"use strict";
// Everything below reads the JSON of this page and draws it. Text of a model is only ever set as textContent.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const MANY = RUNS.length > 1;
const main = document.getElementById("main");
const tip = document.getElementById("tip");
let selected = 0;
let smoothing = 0.6;

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function figure(value) {
  if (value == null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}
function seconds(s) {
  if (s == null) return "–";
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 120) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} d`;
}
function bytes(n) { return n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(1)} MB`; }
function names() { return RUNS.map((run) => run.status.run.split("/").slice(-2).join("/")); }
function color(index) { return `var(--c${index % 6})`; }
function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${Math.max(8, y)}px`;
}
function hideTip() { tip.hidden = true; }
function last(series) { return series ? series.y.findLast((value) => value != null) : undefined; }
function first(series) { return series ? series.y.find((value) => value != null) : undefined; }

// ---- head ---------------------------------------------------------------------------------------------------------
function stateChip(status) {
  const kind = status.exit_code === 0 ? "good" : status.exit_code == null ? "" : status.exit_code === 75 ? "warn" : "bad";
  return el("span", { class: `chip ${kind}` }, status.state);
}
function tile(value, label) { return el("div", { class: "tile" }, el("b", {}, ...[].concat(value)), el("span", {}, label)); }
function short(value) { return value == null ? "–" : Math.abs(value) >= 1000 || (value && Math.abs(value) < 1e-3) ? figure(value) : String(+value.toPrecision(3)); }
function change(series, label) {
  const from = first(series), to = last(series);
  return tile(short(to), from === to ? label : `${label}, from ${short(from)}`);
}
function evalNames(run) { return Object.keys(run.series).filter((name) => name.startsWith("eval/") && name.endsWith("/reward")); }
function drawHead() {
  const head = document.getElementById("head");
  const run = RUNS[selected], status = run.status;
  const when = new Date(run.written * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const title = MANY ? `${RUNS.length} runs compared` : status.run;
  document.title = `${title} · Ratchet`;
  const parts = [el("h1", {}, title, MANY ? null : stateChip(status))];
  const kind = status.kind === "rl" ? "Asynchronous RL" : "Supervised fine-tuning";
  parts.push(el("p", { class: "sub" }, MANY ? names().join("   ·   ") : `${kind}, run ${status.run_id}`, `   ·   written ${when}`));
  if (!MANY) {
    const tiles = [tile([String(status.step), el("i", {}, ` / ${status.max_steps}`)], "steps")];
    if (status.kind === "rl") tiles.push(change(run.series["reward/mean"], "reward"));
    for (const name of evalNames(run).slice(0, 1)) tiles.push(change(run.series[name], "held-out reward"));
    tiles.push(change(run.series.loss, "loss"));
    tiles.push(tile(figure(last(run.series["progress/total_tokens"])), "tokens trained"));
    tiles.push(tile(seconds(status.step_s), "a step"));
    const restarts = Object.values(status.restarts).reduce((a, b) => a + b, 0);
    tiles.push(tile(String(run.attempts.length), `attempt${run.attempts.length === 1 ? "" : "s"}${restarts ? `, ${restarts} restarts` : ""}`));
    parts.push(el("div", { class: "tiles" }, ...tiles));
    const notes = status.warnings.map((w) => el("li", {}, el("b", {}, `step ${w.step}`), `${w.text}. `, el("span", {}, w.remedy)));
    if (status.stall) notes.unshift(el("li", {}, status.stall));
    if (notes.length) parts.push(el("ul", { class: "notes" }, ...notes));
  }
  head.replaceChildren(...parts);
}

// ---- curves -------------------------------------------------------------------------------------------------------
const MAIN_CHARTS = [
  ["Reward", ["reward/mean"], "of the rollouts trained on"],
  ["Held-out reward", "eval", "policy by policy"],
  ["Loss", ["loss"]],
  ["KL to the sampling policy", ["policy/mismatch_kl"]],
  ["Entropy", ["policy/entropy"], "nats a token"],
  ["Gradient norm", ["grad_norm"]],
  ["Learning rate", ["lr", "lr/muon"]],
  ["Throughput", ["perf/tokens_per_s", "orchestrator/perf/tokens_per_s"], "tokens a second", ["training", "generation"]],
  ["Staleness", ["policy/off_policy_steps"], "steps between sampling and training"],
  ["A step of the trainer", ["time/train_s", "time/wait_s"], "seconds", ["training", "waiting for a batch"]],
  ["Groups with equal rewards", ["reward/equal_groups"], "they teach nothing"],
  ["Length of an answer", ["completion/mean_length"], "tokens"],
];
function lines(keys, labels) {
  const found = [];
  RUNS.forEach((run, index) => {
    const wanted = keys === "eval" ? evalNames(run) : keys;
    wanted.forEach((key, nth) => {
      if (!run.series[key]) return;
      const own = labels ? labels[nth] : wanted.length > 1 ? key.replace(/^eval\//, "").replace(/\/reward$/, "") : "";
      const label = MANY ? names()[index] + (own ? ` · ${own}` : "") : own;
      found.push({ ...run.series[key], key, label, color: color(MANY ? index + nth * 3 : nth), points: keys === "eval" });
    });
  });
  return found;
}
function smoothed(values) {
  let mean = null, weight = 0;
  return values.map((value) => {
    if (value == null) return null;
    mean = mean == null ? (1 - smoothing) * value : smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}
const W = 350, H = 172, LEFT = 46, RIGHT = 8, TOP = 14, BOTTOM = 22;
const crosses = [];
function chart(title, note, curves) {
  const xs = curves.flatMap((c) => c.x), ys = curves.flatMap((c) => c.y).filter((v) => v != null && isFinite(v));
  let low = Math.min(...ys), high = Math.max(...ys);
  if (high === low) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
  const pad = (high - low) * 0.06; low = low >= 0 && low - pad < 0 ? 0 : low - pad; high += pad;
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const Y = (y) => H - BOTTOM - ((y - low) / (high - low)) * (H - TOP - BOTTOM);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const value of ticks(low, high, 4)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: Y(value), y2: Y(value) }));
    const label = svg("text", { x: LEFT - 7, y: Y(value) + 3.5, "text-anchor": "end" }); label.textContent = axis(value); picture.append(label);
  }
  for (const value of ticks(x0, x1, 5).filter(Number.isInteger)) {
    const label = svg("text", { x: X(value), y: H - 6, "text-anchor": "middle" }); label.textContent = value.toLocaleString("en"); picture.append(label);
  }
  for (const mark of MANY ? [] : RUNS[0].marks) if (mark.step >= x0 && mark.step <= x1) {
    const at = X(mark.step);
    picture.append(svg("line", { class: "mark", x1: at, x2: at, y1: TOP - 4, y2: H - BOTTOM }));
    picture.append(svg("path", { class: "markhead", d: `M${at - 3.5} ${TOP - 9}h7l-3.5 5.5z` }));
  }
  for (const c of curves) {
    const draw = (values) => values.map((y, i) => (y == null || !isFinite(y) ? null : `${X(c.x[i]).toFixed(1)} ${Y(y).toFixed(1)}`));
    const path = (points) => points.reduce((d, p, i) => (p == null ? d : d + (i && points[i - 1] != null ? "L" : "M") + p), "");
    const plain = c.points || c.x.length < 12 || smoothing === 0;
    if (!plain) picture.append(svg("path", { class: "raw", stroke: c.color, d: path(draw(c.y)) }));
    picture.append(svg("path", { class: "path", stroke: c.color, d: path(draw(plain ? c.y : smoothed(c.y))) }));
    if (c.points) draw(c.y).forEach((p) => p && picture.append(svg("circle", { cx: p.split(" ")[0], cy: p.split(" ")[1], r: 3, fill: "var(--card)", stroke: c.color, "stroke-width": 1.8 })));
  }
  const cross = svg("line", { class: "cross", x1: 0, x2: 0, y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  picture.append(cross);
  crosses.push((step) => {
    const shown = step != null && step >= x0 && step <= x1;
    cross.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) { cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); }
  });
  const single = curves.length === 1;
  const now = el("span", { class: "now" }, single ? el("b", {}, figure(last(curves[0]))) : "");
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const step = Math.round(x0 + (((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0));
    crosses.forEach((move) => move(step));
    const rows = curves.map((c) => {
      let nearest = 0; c.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(c.x[nearest] - step)) nearest = i; });
      return el("div", {}, single && !c.label ? null : el("i", { class: "dot", style: `--k:${c.color}` }), c.label ? `${c.label}  ` : "", el("b", {}, figure(c.y[nearest])), c.x[nearest] === step ? "" : ` (step ${c.x[nearest]})`);
    });
    const near = (MANY ? [] : RUNS[0].marks).filter((m) => Math.abs(X(m.step) - X(step)) < 5).map((m) => el("div", {}, `▾ ${m.text} at step ${m.step}`));
    showTip(event, el("div", {}, `step ${step}`), ...rows, ...near);
  });
  picture.addEventListener("pointerleave", () => { crosses.forEach((move) => move(null)); hideTip(); });
  const legend = single ? null : el("div", { class: "key" }, ...curves.map((c) => el("span", { style: `--k:${c.color}` }, c.label || c.key)));
  return el("div", { class: "card chart", "data-chart": title }, el("header", {}, el("h3", {}, title, note ? el("span", { class: "dim", style: "font-weight:400" }, `  ${note}`) : null), now), picture, legend);
}
function axis(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size !== 0 && size < 1e-3 ? value.toExponential(0).replace("e-", "e−") : String(+value.toPrecision(3)).replace("-", "−");
}
function drawCurves() {
  const place = document.getElementById("charts");
  crosses.length = 0;
  const shown = new Set(), cards = [];
  for (const [title, keys, note, labels] of MAIN_CHARTS) {
    const curves = lines(keys, labels);
    if (!curves.length) continue;
    curves.forEach((c) => shown.add(c.key));
    cards.push(chart(title, note, curves));
  }
  if (document.getElementById("all").checked) {
    const rest = [...new Set(RUNS.flatMap((run) => Object.keys(run.series)))].filter((key) => !shown.has(key)).sort();
    for (const key of rest) cards.push(chart(key, null, lines([key])));
  }
  place.replaceChildren(...cards);
}
function curvesSection() {
  const slider = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: smoothing, "aria-label": "smoothing", oninput: (e) => { smoothing = +e.target.value; drawCurves(); } });
  const all = el("input", { type: "checkbox", id: "all", onchange: drawCurves });
  const marks = !MANY && RUNS[0].marks.length ? el("span", {}, el("span", { style: "color:var(--warn)" }, "▾"), " a resume or a restart") : null;
  return section("curves", "Curves", MANY ? "The same quantity of every run on one scale." : "By step: the policy that it led to. Where a run went back, only what counts is drawn.",
    el("div", { class: "bar" }, el("label", {}, "smoothing ", slider), el("label", {}, all, "every quantity"), marks), el("div", { class: "charts", id: "charts" }));
}

// ---- timeline -----------------------------------------------------------------------------------------------------
const LANES = ["generation", "evaluation", "orchestrator", "trainer", "policies", "checkpoint"];
const PHASES = {
  generate: ["rollouts in flight", "var(--c0)"], eval: ["evaluation", "var(--c2)"], batch: ["publishing a batch", "var(--c4)"], adopt: ["handing over a policy", "var(--c5)"],
  start: ["starting", "var(--faint)"], wait: ["waiting for a batch", "var(--chip)"], train: ["training", "var(--c1)"], gather: ["taking a copy of a policy", "var(--c5)"], publish: ["publishing a policy", "var(--c3)"],
  copy: ["staging a checkpoint", "var(--c5)"], save: ["writing a checkpoint", "var(--c2)"],
};
function timelineSection() {
  return section("timeline", "Timeline", "What each program did when. Generation runs ahead while the trainer trains; policies are published and checkpoints written beside the next step. Scroll or use the buttons to zoom, drag to move.", el("div", { id: "tl" }));
}
function drawTimeline() {
  const place = document.getElementById("tl"), line = RUNS[selected].timeline;
  if (!line.spans.length) { place.replaceChildren(el("div", { class: "card empty" }, "This run has left no timeline.")); return; }
  const lanes = [...LANES, ...new Set(line.spans.map((s) => s[0]))].filter((lane, i, all) => all.indexOf(lane) === i && line.spans.some((s) => s[0] === lane));
  const end = Math.max(...line.spans.map((s) => s[4]));
  const width = 1180, left = 96, row = 30, top = 24, height = top + lanes.length * row + 26;
  let from = 0, to = end || 1;
  const starts = {};
  for (const s of line.spans) starts[s[5]] = Math.min(starts[s[5]] ?? Infinity, s[3]);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height: height, role: "img", "aria-label": "timeline" });
  const clip = svg("clipPath", { id: "clip" }, svg("rect", { x: left, y: 0, width: width - left - 4, height }));
  function draw() {
    const X = (t) => left + ((t - from) / (to - from)) * (width - left - 4);
    picture.replaceChildren(svg("defs", {}, clip));
    const body = svg("g", { "clip-path": "url(#clip)" });
    lanes.forEach((lane, i) => {
      const label = svg("text", { x: 0, y: top + i * row + 18 }); label.textContent = lane; label.style.fontSize = "12px"; picture.append(label);
      picture.append(svg("line", { class: "grid", x1: left, x2: width - 4, y1: top + (i + 1) * row, y2: top + (i + 1) * row }));
    });
    for (const t of ticks(from, to, 8)) {
      const label = svg("text", { x: Math.max(X(t), left + 1), y: height - 6, "text-anchor": X(t) < left + 12 ? "start" : "middle" }); label.textContent = t === 0 ? "0 s" : seconds(t); body.append(label);
      body.append(svg("line", { class: "grid", x1: X(t), x2: X(t), y1: top, y2: height - 22 }));
    }
    for (const [lane, phase, step, a, b, attempt] of line.spans) {
      if (b < from || a > to) continue;
      const i = lanes.indexOf(lane), thin = ["wait", "start"].includes(phase), wide = Math.max(X(b) - X(a), 1.2);
      const rect = svg("rect", { class: "span", "data-phase": phase, x: X(a), y: top + i * row + (thin ? 11 : 6), width: wide, height: thin ? 8 : 18, rx: Math.min(3, wide / 3), fill: (PHASES[phase] || [0, "var(--soft)"])[1], opacity: thin ? 1 : 0.88 });
      const subject = phase === "batch" || phase === "generate" ? `batch ${step - 1}` : `policy ${step}`;
      rect.addEventListener("pointermove", (event) => showTip(event, el("div", {}, el("b", {}, (PHASES[phase] || [phase])[0]), `, ${subject}`), el("div", {}, `${seconds(b - a)}, attempt ${attempt}\n${clockOf(line, a)}`)));
      rect.addEventListener("pointerleave", hideTip);
      body.append(rect);
      if (wide > 30 && ["train", "generate", "save"].includes(phase)) {
        const label = svg("text", { x: X(a) + wide / 2, y: top + i * row + 19, "text-anchor": "middle", "pointer-events": "none" });
        label.textContent = phase === "generate" ? step - 1 : step; label.style.fill = "var(--card)"; label.style.fontWeight = 600; body.append(label);
      }
    }
    for (const [attempt, t] of Object.entries(starts)) if (+attempt > 1) {
      body.append(svg("line", { class: "mark", x1: X(t), x2: X(t), y1: 4, y2: height - 22 }));
      const label = svg("text", { x: X(t) + 5, y: 13 }); label.textContent = `attempt ${attempt}`; label.style.fill = "var(--warn)"; body.append(label);
    }
    picture.append(body);
  }
  function zoom(factor, at) {
    const span = Math.min(Math.max((to - from) * factor, 0.05), end || 1);
    from = Math.max(0, Math.min(at - ((at - from) / (to - from)) * span, (end || 1) - span)); to = from + span; draw();
  }
  const timeAt = (event) => { const box = picture.getBoundingClientRect(); return from + (((event.clientX - box.left) / box.width) * width - left) / (width - left - 4) * (to - from); };
  picture.addEventListener("wheel", (event) => { if (!event.ctrlKey && Math.abs(event.deltaX) > Math.abs(event.deltaY)) return; event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, timeAt(event)); }, { passive: false });
  let grip = null;
  picture.addEventListener("pointerdown", (event) => { grip = { x: event.clientX, from, to }; });
  addEventListener("pointerup", () => { grip = null; });
  picture.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const moved = ((event.clientX - grip.x) / picture.getBoundingClientRect().width) * width / (width - left) * (grip.to - grip.from);
    from = Math.max(0, Math.min(grip.from - moved, (end || 1) - (grip.to - grip.from))); to = from + (grip.to - grip.from); draw();
  });
  const used = [...new Set(line.spans.map((s) => s[1]))];
  const key = el("div", { class: "key", style: "margin:10px 0 4px" }, ...Object.keys(PHASES).filter((p) => used.includes(p)).map((p) => el("span", { style: `--k:${PHASES[p][1]}` }, PHASES[p][0])));
  const middle = () => (from + to) / 2;
  const bar = el("div", { class: "bar" }, el("button", { "data-zoom": "in", onclick: () => zoom(0.5, middle()) }, "zoom in"), el("button", { onclick: () => zoom(2, middle()) }, "zoom out"), el("button", { "data-zoom": "all", onclick: () => { from = 0; to = end || 1; draw(); } }, "whole"),
    line.omitted ? el("span", {}, `the newest ${line.spans.length.toLocaleString("en")} phases; ${line.omitted.toLocaleString("en")} older ones are in timeline/`) : null, line.stretches.length > 1 ? el("span", {}, "pauses between attempts are cut out") : null);
  draw();
  place.replaceChildren(bar, el("div", { class: "card timeline" }, picture, key));
}
function clockOf(line, t) {
  const stretch = line.stretches.findLast((s) => s[0] <= t + 1e-6) || line.stretches[0];
  return new Date((stretch[1] + t - stretch[0]) * 1000).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });
}

// ---- tables -------------------------------------------------------------------------------------------------------
function section(id, title, text, ...children) { return el("section", { id }, el("h2", {}, title), text ? el("p", { class: "sub" }, text) : null, ...children); }
function table(heads, rows, empty) {
  if (!rows.length) return el("div", { class: "card empty" }, empty);
  const cell = (name, value, tag) => el(tag, { class: name.startsWith("#") ? "n" : name.startsWith("`") ? "m" : null }, ...[].concat(value));
  return el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((h) => cell(h, h.replace(/^[#`]/, ""), "th")))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value, i) => cell(heads[i], value, "td")))))));
}
function drawCheckpoints() {
  const run = RUNS[selected];
  const rows = run.status.checkpoints.map((c) => [String(c.step), c.sound ? bytes(c.size_bytes) : "–", seconds(c.age_s) + " before this page", el("span", { class: c.sound ? "ok" : "no" }, c.sound ? "sound" : "damaged")]);
  document.getElementById("ckpts").replaceChildren(table(["#step", "#size", "saved", "state"], rows.reverse(), "This run has no checkpoints: it was started without --ckpt, or none was due yet."));
}
function drawLedger() {
  const rows = RUNS[selected].ledger.map((line) => {
    const reasons = {}; line.dropped.forEach(([, reason]) => { reasons[reason] = (reasons[reason] || 0) + 1; });
    const lost = Object.entries(reasons).map(([reason, n]) => `${n} ${reason}`).join(", ");
    const draws = line.draws.length > 12 ? `${line.draws.slice(0, 12).join(" ")} …` : line.draws.join(" ");
    return [String(line.step), String(line.groups), String(line.samples), figure(line.tokens), draws, lost || el("span", { class: "dim" }, "none"), line.hash.slice(0, 12)];
  });
  document.getElementById("ledgers").replaceChildren(table(["#batch", "#groups", "#rollouts", "#tokens", "`draws trained", "dropped", "`chain"], rows.reverse(), "SFT has no ledger: its data order follows from the seed."));
}
function drawLineage() {
  const rows = RUNS[selected].attempts.map((a) => {
    if (a.problem) return [String(a.attempt), "", el("span", { class: "no" }, a.problem), "", ""];
    const where = a.step === 0 && !a.from_checkpoint ? "step 0" : `checkpoint ${a.step}`;
    const more = [a.rollback ? "went back" : "", a.replayed ? `${a.replayed} batches replayed` : "", a.forked_from ? `forked from ${a.forked_from.run} at ${a.forked_from.step}` : ""].filter(Boolean).join(", ");
    const said = [...a.announced.map((x) => `changed ${x}`), ...a.restarts.map((x) => `restarted ${x}`)];
    return [String(a.attempt), [where, more ? el("div", { class: "dim" }, more) : null].filter(Boolean), [el("span", { class: a.code === 0 ? "ok" : a.code == null || a.code === 75 ? "dim" : "no" }, a.outcome !== "open" ? a.outcome : a.attempt < RUNS[selected].status.attempt ? "killed" : "no outcome yet"), ...said.map((x) => el("div", { class: "dim" }, x))], String(a.lineage), a.command];
  });
  document.getElementById("lineages").replaceChildren(table(["#attempt", "began at", "ended", "#lineage", "`command"], rows, "No attempt was recorded."));
}
function drawConfig() {
  const wanted = document.getElementById("config-filter").value.toLowerCase(), only = document.getElementById("config-diff");
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.config)))].filter((key) => key.toLowerCase().includes(wanted));
  const text = (value) => value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
  const rows = keys.map((key) => [key, ...RUNS.map((run) => text(run.config[key]))]).filter((row) => !(only && only.checked) || new Set(row.slice(1)).size > 1);
  const view = table(["`key", ...(MANY ? names().map((n) => "`" + n) : ["`value"])], rows, "Nothing matches.");
  if (MANY) view.querySelectorAll("tbody tr").forEach((tr, i) => { if (new Set(rows[i].slice(1)).size > 1) tr.classList.add("diff"); });
  document.getElementById("configs").replaceChildren(view);
}
function drawComparison() {
  const best = (series, f) => series ? figure(f(...series.y.filter((v) => v != null))) : "–";
  const rows = RUNS.map((run, i) => {
    const evaluation = run.series[evalNames(run)[0]];
    return [[el("i", { class: "dot", style: `--k:${color(i)}` }), names()[i]], stateChip(run.status), `${run.status.step} / ${run.status.max_steps}`, figure(last(run.series["reward/mean"])), best(run.series["reward/mean"], Math.max), figure(last(evaluation)), figure(last(run.series.loss)), figure(last(run.series["progress/total_tokens"])), seconds(run.status.step_s), String(run.attempts.length)];
  });
  return section("summary", "Summary", null, table(["run", "state", "#steps", "#reward", "#best reward", "#held-out", "#loss", "#tokens", "#a step", "#attempts"], rows, ""));
}

// ---- rollouts -----------------------------------------------------------------------------------------------------
const filter = { text: "", env: "", least: null, order: "newest", shade: "logprob", chosen: 0 };
function rolloutSection() {
  const set = (key) => (e) => { filter[key] = e.target.value; filter.chosen = 0; drawRollouts(); };
  const option = (value, text) => el("option", { value }, text);
  const shade = (key, text) => el("button", { "data-shade": key, class: filter.shade === key ? "on" : null, onclick: () => { filter.shade = key; bar.querySelectorAll("[data-shade]").forEach((b) => b.classList.toggle("on", b.dataset.shade === key)); drawRollouts(); } }, text);
  const bar = el("div", { class: "bar" }, el("input", { id: "find", type: "search", placeholder: "search text or task", oninput: set("text") }), el("select", { id: "envs", "aria-label": "environment", onchange: set("env") }),
    el("select", { id: "rewards", "aria-label": "advantage", onchange: (e) => { filter.least = e.target.value; filter.chosen = 0; drawRollouts(); } }, option("", "all advantages"), option("up", "pushed towards"), option("down", "pushed away from")),
    el("select", { id: "order", "aria-label": "order", onchange: set("order") }, option("newest", "newest first"), option("oldest", "oldest first"), option("high", "highest reward"), option("low", "lowest reward")),
    el("span", { style: "margin-left:auto;display:flex;gap:6px;align-items:center" }, "shade by", shade("logprob", "surprise"), shade("version", "policy")));
  return section("rollouts", "Rollouts", "Sampled over the batches that are still there: of some groups the best and the worst. A shaded token surprised the policy that sampled it.", bar, el("div", { class: "card browser" }, el("div", { class: "list", id: "list" }), el("div", { class: "detail", id: "detail" })));
}
function spoken(r) { return r.tokens.filter((_, i) => r.mask[i] === "1").join(""); }
function matching() {
  const wanted = filter.text.toLowerCase();
  const found = RUNS[selected].rollouts.filter((r) => (!filter.env || r.env === filter.env) && (!filter.least || (filter.least === "up" ? r.advantage > 0 : r.advantage < 0)) && (!wanted || `${r.tokens.join("")} ${r.task}`.toLowerCase().includes(wanted)));
  const by = { newest: (a, b) => b.step - a.step, oldest: (a, b) => a.step - b.step, high: (a, b) => b.reward - a.reward, low: (a, b) => a.reward - b.reward }[filter.order];
  return found.sort((a, b) => by(a, b) || a.draw - b.draw || b.reward - a.reward);
}
function drawRollouts() {
  const envs = document.getElementById("envs"), all = [...new Set(RUNS[selected].rollouts.map((r) => r.env))];
  if (envs.options.length !== all.length + 1) envs.replaceChildren(el("option", { value: "" }, "all environments"), ...all.map((env) => el("option", { value: env }, env)));
  const found = matching(), list = document.getElementById("list"), detail = document.getElementById("detail");
  list.replaceChildren(...found.map((r, i) => el("button", { class: `item${i === filter.chosen ? " on" : ""}`, onclick: () => { filter.chosen = i; const at = list.scrollTop; drawRollouts(); list.scrollTop = at; } },
    el("b", { style: `color:var(--${r.advantage > 0 ? "good" : r.advantage < 0 ? "bad" : "soft"})` }, short(r.reward)), el("em", {}, spoken(r).trim() || "(nothing)"), el("small", {}, `batch ${r.step}`))));
  if (!found.length) { list.replaceChildren(el("div", { class: "empty" }, "no rollout matches")); detail.replaceChildren(); return; }
  drawRollout(detail, found[Math.min(filter.chosen, found.length - 1)]);
}
function drawRollout(place, r) {
  const signed = (value) => (value > 0 ? "+" : "") + figure(value);
  const versions = r.versions.map(([step]) => step), oldest = Math.min(...versions), span = versions.length > 1 ? `${oldest} to ${Math.max(...versions)}` : `${oldest}`;
  const fact = (name, value) => el("span", {}, `${name} `, el("b", {}, value));
  const facts = el("div", { class: "facts" }, fact("reward", figure(r.reward)), fact("advantage", signed(r.advantage)), fact("batch", r.step), fact("sampled by policy", versions.length ? span : "–"), fact("ended by", r.finish), fact("environment", r.env), fact("task", r.task), fact("draw", `${r.draw}.${r.rollout}`), ...Object.entries(r.metrics).map(([k, v]) => fact(k, figure(v))));
  const parts = [];
  let start = 0;
  while (start < r.tokens.length) {
    let stop = start;
    while (stop < r.tokens.length && r.mask[stop] === r.mask[start]) stop++;
    const isSaid = r.mask[start] === "1";
    const text = el("p", { class: `text${isSaid ? "" : " prompt"}` });
    if (!isSaid) text.textContent = r.tokens.slice(start, stop).join("");
    else for (let i = start; i < stop; i++) text.append(token(r, i));
    parts.push(el("div", { class: "part" }, isSaid ? `answer, ${stop - start} tokens` : start ? "environment" : "prompt"), text);
    start = stop;
  }
  if (r.omitted) parts.push(el("p", { class: "dim" }, `… and ${r.omitted.toLocaleString("en")} more tokens`));
  const ramp = filter.shade === "logprob" ? el("span", { class: "legend" }, "expected", el("span", { class: "ramp" }), "surprising") : el("span", { class: "legend" }, ...[...new Set(versions)].map((v, i) => el("span", {}, el("i", { class: "dot", style: `--k:${color(i)}` }), `policy ${v}`)));
  place.replaceChildren(facts, ramp, ...parts);
}
function token(r, i) {
  const p = r.logprobs[i], version = r.versions.find(([, a, b]) => i >= a && i < b);
  const order = [...new Set(r.versions.map(([step]) => step))];
  const node = el("span", {});
  node.textContent = r.tokens[i];
  if (filter.shade === "logprob") node.style.background = `rgba(var(--low), ${Math.min(0.75, -p * 0.2).toFixed(2)})`;
  else if (version) node.style.background = `color-mix(in srgb, ${color(order.indexOf(version[0]))} 28%, transparent)`;
  node.addEventListener("pointermove", (event) => showTip(event, el("div", {}, el("b", {}, JSON.stringify(r.tokens[i]))), el("div", {}, `logprob ${p.toFixed(2)}, probability ${(Math.exp(p) * 100).toPrecision(3)} %${version ? `\nsampled by policy ${version[0]}` : ""}`)));
  node.addEventListener("pointerleave", hideTip);
  return node;
}

// ---- the page -----------------------------------------------------------------------------------------------------
function drawSelected() { drawHead(); drawTimeline(); drawRollouts(); drawCheckpoints(); drawLedger(); drawLineage(); }
const filterBox = el("input", { id: "config-filter", type: "search", placeholder: "filter keys", oninput: drawConfig });
const diffBox = MANY ? el("label", {}, el("input", { id: "config-diff", type: "checkbox", checked: true, onchange: drawConfig }), "only what differs") : null;
main.append(...[MANY ? drawComparison() : null, curvesSection(), timelineSection(), rolloutSection(),
  section("checkpoints", "Checkpoints", null, el("div", { id: "ckpts" })),
  section("ledger", "Ledger", "Which draws each batch trained and which were dropped, newest first. ckpt audit proves that every draw was trained once or dropped once.", el("div", { id: "ledgers" })),
  section("lineage", "Lineage", "Every attempt: where it began, how it ended, what was typed.", el("div", { id: "lineages" })),
  section("config", "Configuration", null, el("div", { class: "bar" }, filterBox, diffBox), el("div", { id: "configs" })),
  el("footer", {}, "This file needs no network. Written by ratchet report.")].filter(Boolean));
const links = [...main.querySelectorAll("section")].map((s) => el("a", { href: `#${s.id}` }, s.querySelector("h2").textContent));
const chooser = MANY ? el("select", { id: "run", "aria-label": "run", onchange: (e) => { selected = +e.target.value; filter.chosen = 0; drawSelected(); } }, ...names().map((n, i) => el("option", { value: i }, n))) : null;
document.getElementById("nav").append(el("div", {}, ...links, chooser || ""));
const observer = new IntersectionObserver((entries) => { for (const entry of entries) if (entry.isIntersecting) links.forEach((a) => a.classList.toggle("here", a.hash === `#${entry.target.id}`)); }, { rootMargin: "-20% 0px -70% 0px" });
main.querySelectorAll("section").forEach((s) => observer.observe(s));
drawSelected(); drawCurves(); drawConfig();
