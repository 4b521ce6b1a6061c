// Training curves, and the losses that a search measured.

const PLOT = { width: 520, height: 190, left: 58, right: 10, top: 12, bottom: 24 };

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
  const size = [1, 2, 5, 10].map((n) => n * step).find((n) => (high - low) / n <= 4.5) ?? step;
  const values = [];
  for (let value = Math.ceil(low / size) * size; value <= high + 1e-12; value += size) values.push(value);
  return values;
}

/* lines: {name, points: [[x, y]], colour, dashed}; text: of a value. */
function plot(title, lines, text) {
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
  const [start, end] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => PLOT.left + ((value - start) / Math.max(1e-9, end - start)) * (PLOT.width - PLOT.left - PLOT.right);
  const y = (value) => PLOT.height - PLOT.bottom - ((value - low) / (high - low)) * (PLOT.height - PLOT.top - PLOT.bottom);
  const rules = ticks(low, high).flatMap((value) => [
    s("line", { class: "rule", x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(value), y2: y(value) }),
    s("text", { class: "tick", x: PLOT.left - 6, y: y(value) + 4, "text-anchor": "end" }, text(value)),
  ]);
  const paths = lines.map((line) => {
    const d = line.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    const dots = line.points.length < 40 && !line.dashed ? line.points.map(([a, b]) => s("circle", { cx: x(a), cy: y(b), r: 2, fill: line.colour })) : [];
    return s("g", {}, s("path", { class: line.dashed ? "curve dashed" : "curve", d, stroke: line.colour }), ...dots);
  });
  const base = s("text", { class: "tick", x: PLOT.width - PLOT.right, y: PLOT.height - 6, "text-anchor": "end" }, `step ${whole(end)}`);
  const drawing = s("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": title }, rules, paths, base);
  const names = lines.map((line) => [h("span", { class: "swatch", style: { background: line.colour } }), h("span", {}, line.name)]);
  return h("figure", {}, h("figcaption", {}, h("b", {}, title), h("span", { class: "legend" }, names.flat())), drawing);
}

const LINE_COLOURS = ["var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)"];

function curvePanel() {
  const rows = DATA.metrics;
  if (!rows.length) return [];
  const stages = [...new Set(rows.map((row) => row.stage))];
  let begin = 0;
  const at = [];
  stages.forEach((stage) => {
    const own = rows.filter((row) => row.stage === stage);
    own.forEach((row) => at.push([row, begin + row.step]));
    begin += own.at(-1).step;
  });
  const series = (name, value, pick = () => true) => {
    const points = at.filter(([row]) => pick(row)).map(([row, x]) => [x, value(row)]);
    return { name, points: points.filter(([, y]) => y !== null && y !== undefined) };
  };
  const coloured = (lines) => lines.filter((line) => line.points.length > 1).map((line, i) => ({ colour: LINE_COLOURS[i % 4], ...line }));
  const plots = [];
  const add = (title, lines, text) => coloured(lines).length && plots.push(plot(title, coloured(lines), text));
  add("loss", stages.map((stage) => series(stage, (row) => row.loss, (row) => row.stage === stage)), significant);
  add("accuracy, %", [series("training", (row) => row.accuracy), series("validation", (row) => row.validation)], (value) => fixed(value, value % 1 ? 1 : 0));
  for (const measure of Object.keys(MEASURE)) {
    const limit = series("budget", (row) => 100 * (row.measures.budget?.[measure] ?? NaN));
    const budget = { ...limit, points: limit.points.filter(([, y]) => !Number.isNaN(y)), dashed: true };
    const share = series("reached", (row) => (measure in row.measures ? 100 * row.measures[measure] : null));
    if (share.points.length > 1) add(`${MEASURE[measure]}, % of float`, [share, budget], significant);
  }
  add("learning rate", [series("rate", (row) => row.rate)], significant);
  return plots.length ? [section("training", "Training", null, h("div", { class: "plots" }, plots))] : [];
}

// -- measured losses --------------------------------------------------------------------------------------------------

const KINDS = { weight: "bits of weights", activation: "bits of activations", channels: "channels kept" };

function lossColumns(rows, most) {
  const choices = [...new Set(rows.flatMap((row) => row.choices))].sort((a, b) => a - b);
  const loss = (row, choice) => (row.choices.includes(choice) ? row.losses[row.choices.indexOf(choice)] : null);
  return choices.map((choice) => ({
    label: choice === 32 ? "float" : String(choice),
    value: (row) => loss(row, choice),
    text: (row) => (loss(row, choice) === null ? "" : significant(loss(row, choice), 2)),
    show: (row) => heat(loss(row, choice), most),
  }));
}

function heat(value, most) {
  if (value === null) return "";
  const share = Math.max(0, Math.log10(Math.max(value, 1e-12) / most) / 5 + 1);
  return h("span", { class: "heat", style: { background: `color-mix(in oklab, var(--noisy) ${Math.round(55 * share)}%, transparent)` } }, significant(value, 2));
}

// Losses over kept counts, as a line as small as a word.
function spark(row) {
  const most = Math.max(1e-300, ...row.losses);
  const [low, high] = [Math.min(...row.choices), Math.max(...row.choices)];
  const points = row.choices.map((choice, i) => [(100 * (choice - low)) / Math.max(1, high - low), 20 - (18 * Math.max(0, row.losses[i])) / most]);
  points.sort((a, b) => a[0] - b[0]);
  return s("svg", { class: "spark", viewBox: "0 0 100 22", preserveAspectRatio: "none", "aria-hidden": "true" }, s("path", { d: `M${points.map((point) => point.map((v) => v.toFixed(1)).join(" ")).join("L")}` }));
}

function sensitivityPanel() {
  const parts = [];
  for (const [kind, title] of Object.entries(KINDS)) {
    const rows = DATA.sensitivity.filter((row) => row.kind === kind);
    if (!rows.length) continue;
    const most = Math.max(1e-12, ...rows.flatMap((row) => row.losses));
    const few = new Set(rows.flatMap((row) => row.choices)).size <= 10;
    const least = (row) => Math.min(...row.choices);
    const worst = (row) => row.losses[row.choices.indexOf(least(row))];
    const columns = [{ label: "decision", left: true, value: (row) => row.name }];
    if (few) columns.push(...lossColumns(rows, most));
    else {
      columns.push(
        { label: "fewest", value: least, text: (row) => whole(least(row)) },
        { label: "of", value: (row) => Math.max(...row.choices), text: (row) => whole(Math.max(...row.choices)) },
        { label: "loss at the fewest", value: worst, text: (row) => significant(worst(row)), show: (row) => heat(worst(row), most) },
        { label: "loss over what stays", left: true, value: () => "", show: spark, always: true },
      );
    }
    parts.push(h("h3", {}, title), grid(columns, rows, { filter: "filter decisions", csv: `losses-${kind}.csv`, caption: title }));
  }
  const note = "The loss that each choice was measured to cost, in nats an image.";
  return parts.length ? [section("losses", "Measured losses", note, ...parts)] : [];
}
