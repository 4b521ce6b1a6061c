// The strip of layers in the order in which they run, and the table of layers.

const STRIP = { shares: 110, gap: 6, kept: 26 };

// One bar a layer: upwards its share of BOPs, downwards the share of channels that stay.
function strip(model, title, press) {
  const count = model.layers.length;
  const height = STRIP.shares + STRIP.gap + STRIP.kept;
  const inset = count > 300 ? 0 : 0.08;
  const bars = model.layers.map((row, i) => {
    const tall = Math.max(1.5, (STRIP.shares * model.share(row)) / model.most.share);
    const kept = model.kept(row);
    const down = kept === null ? 0 : STRIP.kept * kept;
    return s(
      "g",
      {},
      s("rect", { class: "bar", x: i + inset, y: STRIP.shares - tall, width: 1 - 2 * inset, height: tall }),
      kept === null ? null : s("rect", { class: "whole", x: i + inset, y: STRIP.shares + STRIP.gap, width: 1 - 2 * inset, height: STRIP.kept }),
      s("rect", { class: "kept", x: i + inset, y: STRIP.shares + STRIP.gap, width: 1 - 2 * inset, height: down }),
    );
  });
  const drawing = s("svg", { viewBox: `0 0 ${count} ${height}`, preserveAspectRatio: "none", height, "aria-hidden": "true" }, bars);
  drawing.style.setProperty("min-width", `${3 * count}px`);
  drawing.style.setProperty("max-width", `${56 * count}px`);
  const says = h("p", { class: "says", role: "status" });
  const hint = `Point at a bar, or use the arrow keys${press ? "; Enter shows the layer in the graph" : ""}.`;
  let current = -1;

  function point(i) {
    if (current >= 0) bars[current].classList.remove("current");
    current = Math.min(count - 1, Math.max(-1, i));
    if (current < 0) {
      says.textContent = hint;
      return;
    }
    bars[current].classList.add("current");
    const [name, ...rest] = told(model, model.layers[current]);
    says.replaceChildren(h("b", {}, name), ` · ${rest.join(" · ")}`);
  }

  const at = (event) => {
    const box = drawing.getBoundingClientRect();
    return Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * count)));
  };
  const moves = { ArrowLeft: () => current - 1, ArrowRight: () => current + 1, Home: () => 0, End: () => count - 1 };
  const key = (event) => {
    if (event.key === "Enter" && current >= 0 && press) press(model.layers[current]);
    if (!(event.key in moves)) return;
    event.preventDefault();
    point(Math.max(0, moves[event.key]()));
    const wide = drawing.getBoundingClientRect().width / count;
    if (wide * current < holder.scrollLeft || wide * (current + 1) > holder.scrollLeft + holder.clientWidth) {
      holder.scrollLeft = wide * current - holder.clientWidth / 2;
    }
  };
  const holder = h(
    "div",
    {
      class: "strip-scroll",
      tabindex: 0,
      role: "group",
      "aria-label": `${title}: ${plural(count, "layer")} in the order in which they run; arrow keys move`,
      keydown: key,
      focus: () => current < 0 && point(0),
    },
    drawing,
  );
  drawing.addEventListener("mousemove", (event) => point(at(event)));
  drawing.addEventListener("mouseleave", () => document.activeElement === holder || point(-1));
  drawing.addEventListener("click", (event) => press && press(model.layers[at(event)]));

  const paint = (kind) => bars.forEach((bar, i) => (bar.style.color = colourOf(kind, model, model.layers[i])));
  chosen.followers.push(paint);
  paint(chosen.kind);
  point(-1);
  const axis = h(
    "div",
    { class: "axis", "aria-hidden": "true" },
    h("span", {}, `${percent(model.most.share)} %`),
    h("span", {}, "0"),
    h("span", {}, "kept"),
  );
  return h("div", { class: "strip" }, h("div", { class: "strip-body" }, axis, holder), says);
}

function layerColumns(model) {
  const tensor = (row) => model.tensor(row);
  const stored = model.layers.some((row) => row.stored_bits > 0);
  return [
    { label: "layer", left: true, value: (row) => row.name, show: (row) => named(model, row) },
    { label: "kind", left: true, value: (row) => row.kind },
    { label: "w", unit: "bits", value: (row) => row.weight_bits, text: (row) => bits(row.weight_bits) },
    { label: "a", unit: "bits", value: (row) => row.activation_bits, text: (row) => bits(row.activation_bits) },
    { label: "channels", value: (row) => row.channels, text: (row) => (row.channels === null ? "" : whole(row.channels)) },
    { label: "of", value: (row) => row.channels_before, text: (row) => (row.channels === null ? "" : whole(row.channels_before)) },
    { label: "MACs", value: (row) => row.macs, text: (row) => whole(row.macs) },
    { label: "BOPs", value: (row) => row.bops, text: (row) => whole(row.bops) },
    {
      label: "share",
      unit: "%",
      value: (row) => model.share(row),
      text: (row) => percent(model.share(row)),
      show: (row) => shareBar(model.share(row) / model.most.share, percent(model.share(row))),
    },
    { label: "size", unit: "kB", value: (row) => (stored ? row.stored_bits / 8e3 : null), text: (row) => fixed(row.stored_bits / 8e3, 1) },
    { label: "time", unit: "ms", value: (row) => (model.timed ? 1e3 * row.seconds : null), text: (row) => fixed(1e3 * row.seconds, 3) },
    { label: "SQNR w", unit: "dB", value: (row) => row.weight_sqnr, text: (row) => (row.weight_sqnr === null ? "" : fixed(row.weight_sqnr, 1)) },
    { label: "SQNR", unit: "dB", value: (row) => model.sqnr(row), text: (row) => (model.sqnr(row) === null ? "" : fixed(model.sqnr(row), 1)) },
    { label: "clipped", unit: "%", value: (row) => tensor(row)?.clipped ?? null, text: (row) => (tensor(row) ? percent(tensor(row).clipped, 2) : "") },
  ];
}

function named(model, row) {
  const swatch = h("span", { class: "swatch" });
  const paint = (kind) => (swatch.style.background = colourOf(kind, model, row));
  swatch.dataset.node = row.node;
  paint(chosen.kind);
  return h("span", { class: "named" }, swatch, h("span", {}, row.name));
}

function layerPanel(model, reveal) {
  if (!model.layers.length) return [];
  const press = model.steps.length ? (row) => reveal(row.node) : null;
  const table = grid(layerColumns(model), model.layers, { filter: "filter layers", csv: "layers.csv", press, caption: "layers" });
  chosen.followers.push((kind) => {
    for (const swatch of table.querySelectorAll(".swatch")) {
      swatch.style.background = colourOf(kind, model, model.layerOf.get(swatch.dataset.node));
    }
  });
  const order = model.steps.length ? "In the order in which they run" : "Those with most BOPs first";
  const note = `${order}: upwards the share of BOPs, downwards the share of channels that stay.`;
  return [
    section("strip", "Layers", note, chooser(model), strip(model, "layers", press)),
    section("layers", "Layer table", "SQNR w is of the weight; SQNR and clipped share are of the tensor that the layer reads.", table),
  ];
}

// -- two reports ------------------------------------------------------------------------------------------------------

function changeColumns() {
  const pair = (label, part, text, rest = {}) => [
    { label, unit: "A", value: (row) => (row.a ? part(row.a) : null), text: (row) => (row.a ? text(row.a) : ""), ...rest },
    { label, unit: "B", value: (row) => (row.b ? part(row.b) : null), text: (row) => (row.b ? text(row.b) : ""), ...rest },
  ];
  const factor = (row) => (row.a && row.b && row.a.bops ? row.b.bops / row.a.bops - 1 : null);
  return [
    { label: "layer", left: true, value: (row) => (row.a || row.b).name },
    ...pair("bits w/a", (r) => r.weight_bits * 100 + r.activation_bits, bitPair),
    ...pair("channels", (r) => r.channels, (r) => (r.channels === null ? "" : whole(r.channels))),
    ...pair("BOPs", (r) => r.bops, (r) => whole(r.bops)),
    { label: "change", unit: "%", value: factor, text: (row) => (factor(row) === null ? "" : signed(100 * factor(row), 1)) },
  ];
}

function signed(value, digits) {
  return `${value > 0 ? "+" : value < 0 ? "−" : "±"}${fixed(Math.abs(value), digits)}`;
}

function changePanel(first, second, labels) {
  const names = new Set([...first.layers, ...second.layers].map((row) => row.name));
  const of = (model) => new Map(model.layers.map((row) => [row.name, row]));
  const [a, b] = [of(first), of(second)];
  const rows = [...names].map((name) => ({ a: a.get(name), b: b.get(name) }));
  const strips = [first, second].map((model, i) => [h("h3", {}, `${"AB"[i]}: ${labels[i]}`), strip(model, labels[i], null)]);
  return [
    section("strip", "Layers", "Both in the order in which they run, each to its own scale.", chooser(first), ...strips.flat()),
    section("layers", "Layer table", null, grid(changeColumns(), rows, { filter: "filter layers", csv: "difference.csv", caption: "layers of both" })),
  ];
}
