// What became of a result in other tools, and of several methods on one model.

function targetPanel() {
  if (!DATA.targets.length) return [];
  const rows = DATA.targets.filter((row) => !row.reason);
  const batches = [...new Set(rows.flatMap((row) => Object.keys(row.milliseconds)))].sort((a, b) => a - b);
  const columns = [
    { label: "tool", left: true, value: (row) => row.tool },
    { label: "equal predictions", unit: "%", value: (row) => row.same, text: (row) => (row.same === null ? "" : fixed(100 * row.same, 1)) },
    { label: "largest difference", value: (row) => row.difference, text: (row) => significant(row.difference, 2) },
    ...batches.map((batch) => ({ label: `batch ${batch}`, unit: "ms", value: (row) => row.milliseconds[batch], text: (row) => significant(row.milliseconds[batch]) })),
    { label: "file", left: true, value: (row) => row.file },
    { label: "size", value: (row) => row.stored, text: (row) => (row.stored === null ? "" : `${scaled(row.stored)[0]}${THIN}${scaled(row.stored)[1]}B`) },
    { label: "integer kernels", left: true, value: (row) => row.kernels },
  ];
  const refused = DATA.targets.filter((row) => row.reason).map((row) => h("li", {}, h("code", {}, row.tool), `, not run: ${row.reason}`));
  const examples = Math.max(0, ...rows.map((row) => row.examples));
  const note = `What exports and benchmarks of this directory found.${examples ? ` Outputs are compared with the static graph's on ${plural(examples, "made-up example")}.` : ""}`;
  return [section("targets", "Targets", note, rows.length ? grid(columns, rows, { caption: "targets", csv: "targets.csv" }) : null, refused.length ? h("ul", { class: "refused" }, refused) : null)];
}

// -- several methods --------------------------------------------------------------------------------------------------

function scatter(comparison) {
  const points = comparison.points.filter((point) => point.outcome === "ok" && point.bops && point.best !== null);
  const width = 600;
  const height = 290;
  const [left, right, top, bottom] = [54, 16, 14, 40];
  const logs = points.map((point) => Math.log10(point.bops));
  let [start, end] = [Math.min(...logs), Math.max(...logs)];
  [start, end] = [start - 0.06 - (start === end ? 0.2 : 0), end + 0.06];
  const heights = [...points.map((point) => point.best), comparison.float_accuracy];
  const pad = Math.max(0.5, (Math.max(...heights) - Math.min(...heights)) / 12);
  const [low, high] = [Math.min(...heights) - pad, Math.max(...heights) + pad];
  const x = (value) => left + ((Math.log10(value) - start) / (end - start)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const rules = ticks(low, high).flatMap((value) => [
    s("line", { class: "rule", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    s("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, 1)),
  ]);
  const front = points.filter((point) => point.front).sort((a, b) => a.bops - b.bops);
  const steps = front.map((point, i) => (i ? `H${x(point.bops).toFixed(1)}V${y(point.best).toFixed(1)}` : `M${x(point.bops).toFixed(1)} ${y(point.best).toFixed(1)}`)).join("");
  const methods = [...new Set(points.map((point) => point.method))];
  const colour = (method) => LINE_COLOURS[methods.indexOf(method) % LINE_COLOURS.length];
  const dots = points.map((point) => {
    const text = `${point.method}, ${point.limits}: ${fixed(point.best, 2)} %, ${significant(point.bops_ratio)} times fewer BOPs`;
    const shape = { cx: x(point.bops), cy: y(point.best), r: point.front ? 6 : 4, fill: point.front ? colour(point.method) : "var(--paper)", stroke: colour(point.method), "stroke-width": 2 };
    return s("circle", { ...shape, class: "point", tabindex: 0, role: "img", "aria-label": text }, s("title", {}, text));
  });
  const marks = points.length ? [...new Set([points.reduce((a, b) => (b.bops < a.bops ? b : a)), points.reduce((a, b) => (b.bops > a.bops ? b : a))])] : [];
  const axis = marks.map((point) => s("text", { class: "tick", x: x(point.bops), y: height - 20, "text-anchor": "middle" }, scaled(point.bops).join("")));
  const drawing = s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "accuracy over bit operations" },
    rules,
    s("line", { class: "curve dashed", x1: left, x2: width - right, y1: y(comparison.float_accuracy), y2: y(comparison.float_accuracy), stroke: "var(--quiet)" }),
    s("path", { class: "front", d: steps || "M0 0" }),
    dots,
    axis,
    s("text", { class: "tick", x: width - right, y: height - 4, "text-anchor": "end" }, "bit operations of one example, logarithmic"),
  );
  const names = methods.map((method) => [h("span", { class: "swatch", style: { background: colour(method) } }), h("span", {}, method)]);
  return h("figure", { class: "wide" }, h("figcaption", {}, h("b", {}, `${comparison.metric}, %`), h("span", { class: "legend" }, names.flat(), h("span", {}, "filled: no other is as accurate at as few BOPs; dashed: float"))), drawing);
}

function comparisonTitle() {
  const { points, part, epochs } = DATA.comparison;
  const methods = new Set(points.map((point) => point.method)).size;
  const told = [plural(methods, "method"), plural(points.length, "plan"), epochs ? `${plural(epochs, "epoch")} of fine-tuning each` : "", part].filter(Boolean);
  return [h("div", { class: "title" }, h("h1", {}, "Methods side by side"), themeButton()), h("p", { class: "lede" }, `${told.join("; ")}.`)];
}

function comparisonPanels() {
  const comparison = DATA.comparison;
  const { points } = comparison;
  const number = (label, unit, pick, digits) => ({ label, unit, value: pick, text: (row) => (pick(row) === null ? "" : fixed(pick(row), digits)) });
  const columns = [
    { label: "method", left: true, value: (row) => row.method },
    { label: "budget", left: true, value: (row) => row.limits },
    number(comparison.metric, "%", (row) => row.accuracy, 2),
    number("tuned", "%", (row) => row.tuned_accuracy, 2),
    number("BOPs", "times fewer", (row) => row.bops_ratio, 1),
    number("size", "times less", (row) => row.size_ratio, 1),
    number("MACs left", "%", (row) => (row.macs_share === null ? null : 100 * row.macs_share), 0),
    number("policy after", "s", (row) => row.seconds, 1),
    { label: "front", left: true, value: (row) => (row.front ? "yes" : ""), show: (row) => (row.front ? h("b", { class: "fine" }, "yes") : "") },
  ];
  const sound = points.filter((point) => point.outcome === "ok");
  const rejected = points.filter((point) => !point.front);
  const reasons = [
    { label: "method", left: true, value: (row) => row.method },
    { label: "budget", left: true, value: (row) => row.limits },
    { label: "why not", left: true, value: (row) => row.reason, show: (row) => h("span", { class: "sides" }, row.reason) },
  ];
  const held = comparison.held_out ? "measured on pictures that methods did not see" : "measured on the pictures that methods were given; nothing was held out";
  return [
    ...(sound.length ? [section("front", "Pareto front", `Accuracy is ${held}; the float model has ${fixed(comparison.float_accuracy, 2)} %.`, scatter(comparison))] : []),
    section("points", "Plans", null, grid(columns, points, { csv: "points.csv", caption: "plans" })),
    ...(rejected.length ? [section("rejected", "Rejected plans", null, grid(reasons, rejected, { caption: "rejected plans" }))] : []),
  ];
}
