// What was compressed and what came of it: title, cards, warnings, stages, transitions, groups, pins, provenance.

const MEASURE = { bops: "BOPs", macs: "MACs", size: "size", latency: "latency", params: "parameters" };

function budgetLines(model) {
  return model.report.limits.map((row) => {
    const met = row.reached <= row.limit * (1 + 1e-6);
    const text = `${MEASURE[row.measure] ?? row.measure} at most ${percent(row.limit, 2)} % of the float model's: ${percent(row.reached, 2)} % reached, `;
    return h("li", { class: met ? "met" : "missed" }, text, h("b", {}, met ? "met" : "not met"));
  });
}

function themeButton() {
  const root = document.documentElement;
  const dark = () => getComputedStyle(root).colorScheme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const name = () => (dark() ? "light theme" : "dark theme");
  const button = h("button", { type: "button", id: "theme", click: () => ((root.dataset.theme = dark() ? "light" : "dark"), (button.textContent = name())) }, name());
  return button;
}

function titlePanel() {
  const [model, other] = MODELS;
  const { report } = model;
  const { run } = DATA;
  const name = other ? `${DATA.labels[0]} and ${DATA.labels[1]}` : run.model || report.model || "Model";
  if (other) {
    const what = MODELS.map(({ report: { model: kind, method } }, i) => `${"AB"[i]}: ${DATA.labels[i]} (${[kind, method ?? "float"].filter(Boolean).join(", ")})`);
    return [h("div", { class: "title" }, h("h1", {}, name), themeButton()), h("p", { class: "lede" }, what.join("; "))];
  }
  const weights = report.weights || run.weights;
  const parts = [];
  if (model.planned) parts.push(["Pruned and quantised by ", h("code", {}, report.method)]);
  else parts.push("Float model, as it was given");
  if (report.data) parts.push(`data: ${report.data}`);
  if (weights) parts.push(`weights: ${weights}`);
  if (run.part) parts.push(`part: ${run.part}`);
  if (run.model && report.model) parts.push(`class ${report.model}`);
  const lede = parts.flatMap((part, i) => (i ? ["; ", part] : [part])).flat();
  const limits = budgetLines(model);
  const told = report.notes.filter((note) => note !== `weights: ${weights}`);
  const notes = told.map((note) => h("p", { class: "note" }, note));
  const unknown = Object.entries(report.unknown_operators).map(([operator, nodes]) =>
    h("p", { class: "alarm" }, `Operator without a rule: ${operator} (${plural(nodes.length, "time")}); nothing that it touches can be pruned`),
  );
  return [
    h("div", { class: "title" }, h("h1", {}, name), themeButton()),
    h("p", { class: "lede" }, ...lede, "."),
    limits.length ? h("ul", { class: "budget" }, limits) : null,
    ...notes,
    ...unknown,
  ].filter(Boolean);
}

// -- cards ------------------------------------------------------------------------------------------------------------

function shown(name, value) {
  if (name === "stored bytes") return [scaled(value)[0], `${scaled(value)[1]}B`];
  if (name === "latency ms") return [significant(value), "ms"];
  if (name.startsWith("accuracy")) return [fixed(value, 2), "%"];
  return scaled(value);
}

function change(name, before, after) {
  if (name.startsWith("accuracy")) return `${signed(after - before, 2)} points`;
  if (!after) return "";
  const factor = before / after;
  return factor >= 1.005 ? `${factor.toFixed(factor < 10 ? 2 : 1)} times less` : factor <= 0.995 ? `${(1 / factor).toFixed(2)} times more` : "unchanged";
}

const TITLES = { "stored bytes": "size", "latency ms": "latency", "accuracy %": "accuracy" };

function card(title, value, unit, below, exact) {
  const big = h("p", { class: "big", title: exact || null }, value, unit ? h("span", { class: "unit" }, `${THIN}${unit}`) : null);
  return h("div", { class: "card" }, h("h3", {}, title), big, h("p", { class: "below" }, below));
}

function cardPanel() {
  const [model, other] = MODELS;
  const cards = [];
  const rows = [...model.report.totals].sort((a, b) => Number(b[0].startsWith("accuracy")) - Number(a[0].startsWith("accuracy")));
  const byName = other ? new Map(other.report.totals.map((row) => [row[0], row])) : null;
  for (const [name, before, after] of rows) {
    const exact = (value) => (Number.isInteger(value) ? whole(value) : String(value));
    const text = (value) => shown(name, value).join(THIN);
    const title = TITLES[name] ?? name;
    if (other) {
      const theirs = byName.get(name);
      if (!theirs) continue;
      const [mine, other_] = [after ?? before, theirs[2] ?? theirs[1]];
      const pair = h("span", { class: "pair" }, h("span", {}, text(mine)), h("span", { class: "arrow" }, " → "), h("span", {}, text(other_)));
      cards.push(card(title, pair, "", change(name, mine, other_), `${exact(mine)} and ${exact(other_)}`));
    } else if (after === null) cards.push(card(title, ...shown(name, before), "", exact(before)));
    else cards.push(card(title, ...shown(name, after), `from ${text(before)}, ${change(name, before, after)}`, exact(after)));
  }
  const last = model.report.stages.at(-1);
  if (last && !other) {
    const extra = [];
    if (last.same !== null) extra.push(card("equal predictions", fixed(100 * last.same, 1), "%", "with the float model's, on a few inputs"));
    extra.push(card("divergence", significant(last.divergence, 2), "", "from the float model's outputs"));
    cards.splice(rows.length && rows[0][0].startsWith("accuracy") ? 1 : 0, 0, ...extra);
  }
  return h("section", { id: "summary", class: other ? "cards pairs" : "cards", "aria-label": "summary" }, cards);
}

// -- warnings ---------------------------------------------------------------------------------------------------------

function warningPanel(model) {
  const rules = new Map();
  for (const warning of model.report.warnings) rules.set(warning.rule, [...(rules.get(warning.rule) ?? []), warning]);
  if (!rules.size) return [];
  const items = [...rules].map(([rule, found]) =>
    h(
      "details",
      { open: rules.size === 1 && found.length <= 5 },
      h("summary", {}, h("b", {}, rule), h("span", { class: "count" }, ` ${whole(found.length)}`), h("span", { class: "first" }, ` ${found[0].where}: ${found[0].text}`)),
      h("ul", {}, found.map((warning) => h("li", {}, h("code", {}, warning.where), ` ${warning.text}`))),
    ),
  );
  return [section("warnings", "Warnings", null, h("div", { class: "warnings" }, items))];
}

// -- stages -----------------------------------------------------------------------------------------------------------

function stageTable(model) {
  const { stages, accuracy } = model.report;
  const most = Math.max(1e-300, ...stages.map((row) => row.divergence));
  let before = 0;
  const line = (name, row, metric) => {
    const [low, high] = row ? [Math.min(before, row.divergence), Math.max(before, row.divergence)] : [0, 0];
    const rises = row && row.divergence >= before;
    before = row ? row.divergence : before;
    const style = { left: `${(100 * low) / most}%`, width: `max(2px, ${(100 * (high - low)) / most}%)` };
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      h("td", { class: "fall" }, h("span", { class: "fall-track" }, row ? h("i", { class: rises ? "up" : "down", style }) : null)),
      h("td", { class: "number" }, row ? significant(row.divergence) : "0"),
      h("td", { class: "number" }, row ? (row.same === null ? "" : fixed(100 * row.same, 1)) : "100.0"),
      h("td", { class: "number" }, metric === null ? "" : fixed(metric, 2)),
      h("td", { class: "number" }, row ? seconds(row.seconds) : ""),
    );
  };
  const last = stages.length - 1;
  const lines = [line("float", null, accuracy ? accuracy[0] : null)];
  stages.forEach((row, i) => lines.push(line(row.name, row, i === last && accuracy && accuracy.length > 1 ? accuracy[1] : null)));
  const head = ["after", "", "divergence", "equal predictions %", accuracy ? "accuracy %" : "", "seconds"];
  const heads = head.map((text, i) => h("th", { scope: "col", class: i < 2 ? "text" : "number" }, text));
  return h("div", { class: "scroll" }, h("table", { class: "stages" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, lines)));
}

function stagePanel(models) {
  const told = models.filter((model) => model.report.stages.length);
  if (!told.length) return [];
  const note = "How far the outputs are from the float model's after each stage, on a few inputs; a bar spans what the stage added or took away.";
  const parts = told.flatMap((model) => [models.length > 1 ? h("h3", {}, `${"AB"[models.indexOf(model)]}: ${DATA.labels[models.indexOf(model)]}`) : null, stageTable(model)]);
  return [section("stages", "From float to static", note, ...parts)];
}

// -- precision --------------------------------------------------------------------------------------------------------

// Of each layer's input, the bitwidths of the layers that it comes from: {from: {to: count}}.
function transitions(model) {
  const from = model.steps.map(() => null);
  const counts = new Map();
  model.steps.forEach((step, i) => {
    const sources = new Set();
    for (const j of step.reads) if (!model.scalar[j]) for (const width of from[j]) sources.add(width);
    const row = model.layerOf.get(step.name);
    if (row) {
      const to = row.activation_bits;
      for (const width of sources) counts.set(`${width} ${to}`, (counts.get(`${width} ${to}`) ?? 0) + 1);
    }
    from[i] = row ? new Set([row.activation_bits]) : step.reads.length || step.operator !== "input" ? sources : new Set(["input"]);
  });
  return [...counts].map(([key, count]) => {
    const [a, b] = key.split(" ");
    return { from: a === "input" ? a : Number(a), to: Number(b), count };
  });
}

function precisionPanel(model, reveal) {
  if (!model.planned || !model.steps.length) return [];
  const pairs = transitions(model);
  const order = (value) => (value === "input" ? -1 : value);
  const rows = [...new Set(pairs.map((pair) => pair.from))].sort((a, b) => order(a) - order(b));
  const columns = [...new Set(pairs.map((pair) => pair.to))].sort((a, b) => a - b);
  const name = (value) => (value === "input" ? "input" : value > FLOAT_BITS ? bits(value) : `${bits(value)} bits`);
  const count = (a, b) => pairs.find((pair) => pair.from === a && pair.to === b)?.count ?? 0;
  const body = rows.map((a) =>
    h("tr", {}, h("th", { scope: "row" }, name(a)), columns.map((b) => h("td", { class: `number${a === b ? " same" : ""}` }, count(a, b) ? whole(count(a, b)) : "·"))),
  );
  const head = h("tr", {}, h("th", { scope: "col" }, "from ╲ to"), columns.map((b) => h("th", { scope: "col", class: "number" }, name(b))));
  const matrix = h("table", { class: "matrix" }, h("thead", {}, head), h("tbody", {}, body));
  const islands = model.layers.filter((row) => row.kind === "float" || Math.max(row.weight_bits, row.activation_bits) > FLOAT_BITS);
  const list = islands.length
    ? grid(
        [
          { label: "float island", left: true, value: (row) => row.name },
          { label: "kind", left: true, value: (row) => row.kind },
          { label: "w", unit: "bits", value: (row) => row.weight_bits, text: (row) => bits(row.weight_bits) },
          { label: "a", unit: "bits", value: (row) => row.activation_bits, text: (row) => bits(row.activation_bits) },
          { label: "share of BOPs", unit: "%", value: (row) => model.share(row), text: (row) => percent(model.share(row)) },
        ],
        islands,
        { press: (row) => reveal(row.node), caption: "float islands" },
      )
    : h("p", { class: "note" }, "No layer is computed in float.");
  const note = "Inputs of layers, counted by the bits at which the layers that they come from computed and the bits at which they are read.";
  return [section("precision", "Precision transitions", note, h("div", { class: "two" }, h("div", { class: "scroll" }, matrix), list))];
}

// -- groups, pins, provenance -----------------------------------------------------------------------------------------

function groupPanel(model, highlight) {
  const { groups, pins } = model.report;
  const parts = [];
  if (groups.length) {
    const columns = [
      { label: "channel group", left: true, value: (row) => row.name },
      { label: "kept", value: (row) => row.kept, text: (row) => whole(row.kept) },
      { label: "of", value: (row) => row.size, text: (row) => whole(row.size) },
      { label: "kept", unit: "%", value: (row) => row.kept / row.size, text: (row) => percent(row.kept / row.size, 0), show: (row) => shareBar(row.kept / row.size, percent(row.kept / row.size, 0)) },
      { label: "places", value: (row) => row.members, text: (row) => whole(row.members) },
      { label: "factor", left: true, value: (row) => (row.primary ? "" : "minor") },
    ];
    const press = model.steps.length ? (row) => highlight(row.name) : null;
    parts.push(grid(columns, groups, { filter: "filter groups", press, caption: "channel groups" }));
  }
  if (pins.length) {
    const columns = [
      { label: "pinned by", left: true, value: (row) => row.cause },
      { label: "channels", value: (row) => row.channels, text: (row) => whole(row.channels) },
      { label: "sides of layers", left: true, value: (row) => row.sides.join(", "), show: (row) => h("span", { class: "sides" }, row.sides.join(", ")) },
    ];
    parts.push(grid(columns, pins, { caption: "pins" }));
  }
  const share = `${percent(model.report.prunable_share)} % of the MACs of convolutions and linears have a side that can be pruned.`;
  return parts.length ? [section("groups", "Channel groups and pins", share, ...parts)] : [];
}

// Values of a file of JSON as text, without brackets around what has none inside.
function inWords(value) {
  if (Array.isArray(value)) return value.map(inWords).join(" ");
  if (value === null || typeof value !== "object") return String(value);
  return Object.entries(value).filter(([, inner]) => inner !== null && inWords(inner)).map(([name, inner]) => `${name} ${inWords(inner)}`).join(", ");
}

function provenancePanel(models) {
  const [model] = models;
  const { versions, seconds: spent, command } = model.report;
  const parts = [];
  const stages = Object.entries(spent);
  if (stages.length && models.length === 1) {
    const most = Math.max(...stages.map(([, value]) => value));
    const sum = stages.reduce((total, [, value]) => total + value, 0);
    const line = ([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "number" }, shareBar(value / Math.max(1e-9, most), seconds(value))));
    const total = h("tr", { class: "total" }, h("th", { scope: "row" }, "together"), h("td", { class: "number" }, seconds(sum)));
    parts.push(h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "stage"), h("th", { scope: "col", class: "number" }, "seconds"))), h("tbody", {}, stages.map(line), total)));
  }
  const elsewhere = ["format", "versions", "seconds"];
  const asked = Object.entries(DATA.run).filter(([name, value]) => !elsewhere.includes(name) && value !== null && value !== false);
  const lists = [facts(Object.entries(versions)), asked.length ? facts(asked.map(([name, value]) => [name.replaceAll("_", " "), inWords(value)])) : null];
  parts.push(...lists.filter((list) => list && list.children.length));
  const line = command ? h("pre", {}, h("code", {}, command)) : null;
  return parts.length || line ? [section("made", "How it was made", null, line, h("div", { class: "two" }, parts))] : [];
}
