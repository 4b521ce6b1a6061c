// Elements, numbers, colours and the index of a report. All text goes through text nodes, nothing through markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("glyphs").namespaceURI;
const THIN = "\u202f";
const FLOAT_BITS = 8; // more than these are computed in float

// -- elements ---------------------------------------------------------------------------------------------------------

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function s(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function section(id, title, note, ...children) {
  const head = h("h2", {}, h("a", { href: `#${id}` }, title));
  return h("section", { id, "aria-label": title }, head, note ? h("p", { class: "note" }, note) : null, ...children);
}

function plural(count, word) {
  return `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
}

// -- numbers ----------------------------------------------------------------------------------------------------------

function whole(value) {
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, THIN);
}

function fixed(value, digits) {
  const [integer, rest] = Math.abs(value).toFixed(digits).split(".");
  return (value < 0 ? "−" : "") + whole(Number(integer)) + (rest ? `.${rest}` : "");
}

function percent(share, digits = 1) {
  if (share === null || share === undefined || Number.isNaN(share)) return "";
  const value = 100 * share;
  return value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits ? `<${THIN}${10 ** -digits}` : value.toFixed(digits);
}

function superscript(exponent) {
  return String(exponent).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]));
}

// Three significant digits; powers of ten where there would be many zeros.
function significant(value, digits = 3) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const power = Math.floor(Math.log10(Math.abs(value)));
  if (power >= -3 && power < 6) return String(Number(value.toPrecision(digits)));
  return `${(value / 10 ** power).toFixed(digits - 1)}${THIN}×${THIN}10${superscript(power)}`;
}

// [number, prefix] such as ["4.54", "G"].
function scaled(value) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let step = 0;
  while (Math.abs(value) >= 999.5 && step < prefixes.length - 1) [value, step] = [value / 1000, step + 1];
  return [step === 0 ? String(value) : String(Number(value.toPrecision(3))), prefixes[step]];
}

function seconds(value) {
  return value < 0.095 ? fixed(value, 3) : value < 100 ? fixed(value, 1) : fixed(value, 0);
}

function bits(value) {
  return value > FLOAT_BITS ? (value === 32 ? "float" : `float${THIN}${value}`) : String(Number(value.toFixed(2)));
}

function bitPair(row) {
  return `${Number(row.weight_bits.toFixed(2))}/${Number(row.activation_bits.toFixed(2))}`;
}

// -- the index of a report --------------------------------------------------------------------------------------------

class Model {
  constructor(report) {
    this.report = report;
    this.steps = report.steps;
    this.place = new Map(report.steps.map((step, i) => [step.name, i]));
    this.planned = report.method !== null;
    const order = (row) => this.place.get(row.node) ?? Infinity;
    this.layers = [...report.layers].sort((a, b) => (order(a) === order(b) ? 0 : order(a) - order(b)));
    this.layerOf = new Map(this.layers.map((row) => [row.node, row]));
    this.bops = this.layers.reduce((sum, row) => sum + row.bops, 0);
    this.readBy = new Map(report.tensors.map((row) => [row.reader, row]));
    this.named = new Map(report.tensors.map((row) => [row.name, row]));
    this.most = {
      share: Math.max(1e-12, ...this.layers.map((row) => this.share(row))),
      seconds: Math.max(0, ...this.layers.map((row) => row.seconds)),
    };
    this.timed = this.most.seconds > 0;
    this.scalar = []; // which steps give sizes, not tensors
    this.steps.forEach((step, i) => {
      const sized = step.operator.startsWith("sym_") || (step.reads.length > 0 && step.reads.every((j) => this.scalar[j]));
      this.scalar[i] = sized && step.shape.length === 0;
    });
  }

  share(row) {
    return row.bops / Math.max(1, this.bops);
  }

  // The quantised tensor that a layer reads.
  tensor(row) {
    const own = this.readBy.get(row.node);
    if (own) return own;
    const step = this.steps[this.place.get(row.node)];
    for (const i of step ? step.reads : []) {
      const found = this.named.get(this.steps[i].name);
      if (found) return found;
    }
    return null;
  }

  kept(row) {
    return row.channels === null ? null : row.channels / Math.max(1, row.channels_before);
  }

  sqnr(row) {
    const tensor = this.tensor(row);
    return tensor ? tensor.sqnr : null;
  }
}

const MODELS = DATA.reports.map((report) => new Model(report));

// -- colours ----------------------------------------------------------------------------------------------------------

function mixed(share, from, to) {
  const part = Math.round(100 * Math.min(1, Math.max(0, share)));
  return `color-mix(in oklab, var(${to}) ${part}%, var(${from}))`;
}

const bitColour = (value) => (value > FLOAT_BITS ? "var(--float)" : mixed((value - 1) / 7, "--ramp-low", "--ramp-high"));

// What bars and rows can be coloured by: the value of a layer, its colour, its text.
const COLOURS = {
  weight: { label: "bits of weights", value: (m, row) => row.weight_bits, colour: bitColour, text: bits },
  activation: { label: "bits of the input", value: (m, row) => row.activation_bits, colour: bitColour, text: bits },
  kept: {
    label: "channels kept",
    value: (m, row) => m.kept(row),
    colour: (value) => mixed(value, "--ramp-low", "--ramp-high"),
    ends: () => [0, 1],
    text: (value) => `${percent(value, 0)} %`,
  },
  share: {
    label: "share of BOPs",
    value: (m, row) => m.share(row),
    colour: (value, m) => mixed(value / m.most.share, "--ramp-low", "--ramp-high"),
    ends: (m) => [0, m.most.share],
    text: (value) => `${percent(value)} %`,
  },
  sqnr: {
    label: "SQNR of the tensor it reads",
    value: (m, row) => m.sqnr(row),
    colour: (value) => mixed((value - 5) / 40, "--noisy", "--ramp-high"),
    ends: () => [5, 45],
    text: (value) => `${fixed(value, 1)} dB`,
  },
  time: {
    label: "time",
    value: (m, row) => (m.timed ? row.seconds : null),
    colour: (value, m) => mixed(value / m.most.seconds, "--ramp-low", "--ramp-high"),
    ends: (m) => [0, m.most.seconds],
    text: (value) => `${fixed(1e3 * value, 3)} ms`,
  },
};

function colourOf(kind, model, row) {
  const value = COLOURS[kind].value(model, row);
  return value === null || value === undefined ? "var(--nothing)" : COLOURS[kind].colour(value, model);
}

function coloursOf(model) {
  return Object.keys(COLOURS).filter((kind) => model.layers.some((row) => COLOURS[kind].value(model, row) !== null));
}

function legend(kind, model) {
  const entry = COLOURS[kind];
  if (entry.ends) {
    const [low, high] = entry.ends(model);
    const stops = [0, 0.25, 0.5, 0.75, 1].map((t) => entry.colour(low + t * (high - low), model));
    const bar = h("span", { class: "gradient", style: { background: `linear-gradient(to right, ${stops.join(", ")})` } });
    return h("span", { class: "legend" }, entry.text(low), bar, entry.text(high));
  }
  const layers = MODELS.flatMap((each) => each.layers);
  const values = [...new Set(layers.map((row) => Math.round(entry.value(model, row))))].sort((a, b) => a - b);
  const swatches = values.map((value) => [
    h("span", { class: "swatch", style: { background: entry.colour(value, model) } }),
    h("span", {}, entry.text(value)),
  ]);
  return h("span", { class: "legend" }, ...swatches.flat());
}

// One choice of colour for all that shows layers.
const chosen = { kind: "weight", followers: [] };

function chooser(model) {
  const options = coloursOf(model).map((kind) => h("option", { value: kind }, COLOURS[kind].label));
  const key = h("span", {}, legend(chosen.kind, model));
  const select = h("select", { "aria-label": "colour by", change: (event) => recolour(event.target.value) }, options);
  chosen.followers.push((kind) => {
    select.value = kind;
    key.replaceChildren(legend(kind, model));
  });
  return h("div", { class: "tools" }, h("label", {}, "colour by ", select), key);
}

function recolour(kind) {
  chosen.kind = kind;
  for (const follow of chosen.followers) follow(kind);
}

// What a layer's bar says when it is pointed at.
function told(model, row) {
  const sqnr = model.sqnr(row);
  return [
    row.name,
    row.kind,
    `${bitPair(row)} bits`,
    row.channels === null ? "" : `${whole(row.channels)} of ${whole(row.channels_before)} channels`,
    `${percent(model.share(row))} % of BOPs`,
    sqnr === null ? "" : `${fixed(sqnr, 1)} dB`,
    row.seconds ? `${fixed(1e3 * row.seconds, 3)} ms` : "",
  ].filter(Boolean);
}
