// The graph: steps as rows in the order in which they run, in a tree of modules; edges as arcs beside the rows.
//
// Only the rows in view are drawn, so that thousands of steps stay quick.

const ROW = 26; // px, as in the style
const LANES = 9; // of arcs side by side
const OPENED = 36; // rows that are shown without being asked for

// The graphs of two results, one at a time, so that a place is found again in the other.
function graphPair(models, labels) {
  const graphs = models.map((model) => (model.steps.length ? new Graph(model) : null));
  if (graphs.some((graph) => !graph)) return [];
  const place = h("div");
  const buttons = labels.map((label, i) => h("button", { type: "button", "aria-pressed": "false", click: () => show(i) }, `${"AB"[i]}: ${label}`));
  function show(i) {
    const before = graphs.find((graph) => graph.element.isConnected);
    const top = before ? before.view.scrollTop : 0;
    place.replaceChildren(graphs[i].element);
    graphs[i].layout();
    graphs[i].view.scrollTop = top;
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
  }
  requestAnimationFrame(() => show(1));
  const note = "Steps in the order in which they run, by module, of one result or of the other.";
  return [section("graph", "Graph", note, h("div", { class: "tools pick" }, buttons), place)];
}

class Graph {
  constructor(model) {
    this.model = model;
    this.roots = treeOf(model);
    this.users = model.steps.map(() => []);
    model.steps.forEach((step, i) => step.reads.forEach((j) => this.users[j].push(i)));
    this.group = "";
    this.members = new Set();
    this.selected = null;
    this.openSome();
    this.make();
    this.layout();
  }

  openSome() {
    let level = this.roots;
    let shown = level.length;
    while (level.length) {
      const inner = level.filter((node) => node.children.length);
      const added = inner.reduce((sum, node) => sum + node.children.length, 0);
      if (!inner.length || shown + added > OPENED) return;
      inner.forEach((node) => (node.open = true));
      shown += added;
      level = inner.flatMap((node) => node.children);
    }
  }

  make() {
    const { model } = this;
    const groups = [...new Set(model.steps.flatMap((step) => step.groups))];
    const options = groups.map((name) => h("option", { value: name }, name));
    this.pick = h("select", { "aria-label": "channel group", change: (event) => this.highlight(event.target.value) }, h("option", { value: "" }, "none"), options);
    this.count = h("span", { class: "count", role: "status" });
    this.arcs = s("svg", { class: "arcs", "aria-hidden": "true" });
    this.lines = h("div", { class: "lines" });
    this.space = h("div", { class: "space" }, this.arcs, this.lines);
    this.view = h(
      "div",
      { class: "graph-view", tabindex: 0, role: "tree", "aria-label": "steps by module", scroll: () => this.later(), keydown: (event) => this.key(event) },
      this.space,
    );
    this.details = h("aside", { class: "details", "aria-label": "details", "aria-live": "polite" });
    this.describe();
    const tools = h(
      "div",
      { class: "tools" },
      h("button", { type: "button", click: () => this.openAll(false) }, "collapse all"),
      h("button", { type: "button", click: () => this.openAll(true) }, "expand all"),
      groups.length ? h("label", {}, "channel group ", this.pick) : null,
      this.count,
    );
    const heads = ["bits w/a", "kept", "BOPs"].map((text) => h("span", { class: text.slice(0, 4).trim().toLowerCase() }, text));
    const head = h("div", { class: "line head", "aria-hidden": "true" }, heads);
    this.element = h("div", {}, tools, h("div", { class: "graph" }, h("div", {}, head, this.view), this.details));
    chosen.followers.push(() => this.draw());
    new ResizeObserver(() => this.later()).observe(this.view);
  }

  // Rows that are not folded away, where each step is, and the edges between those rows.
  layout() {
    const rows = [];
    this.at = new Int32Array(this.model.steps.length);
    const walk = (node) => {
      const here = rows.push(node) - 1;
      node.row = here;
      if (node.open) node.children.forEach(walk);
      else this.at.fill(here, node.first, node.end);
    };
    this.roots.forEach(walk);
    this.rows = rows;
    const nth = new Int32Array(rows.length);
    let running = 0;
    rows.forEach((node, i) => (nth[i] = node.open ? -1 : running++));
    const edges = new Map();
    this.model.steps.forEach((step, i) => {
      for (const j of step.reads) {
        const [from, to] = [this.at[j], this.at[i]];
        if (from === to || this.model.scalar[j]) continue;
        edges.set(from * rows.length + to, { from, to, skips: nth[to] - nth[from] > 1, lane: 0 });
      }
    });
    this.edges = [...edges.values()];
    this.lanes();
    this.space.style.height = `${rows.length * ROW}px`;
    this.view.style.height = `min(var(--tall), ${rows.length * ROW + 4}px)`;
    this.draw();
  }

  // Short arcs inside, long ones outside; what finds no free lane shares the last.
  lanes() {
    const taken = Array.from({ length: LANES }, () => new Uint8Array(this.rows.length));
    const skips = this.edges.filter((edge) => edge.skips).sort((a, b) => a.to - a.from - (b.to - b.from));
    let used = 0;
    for (const edge of skips) {
      let lane = 0;
      if (edge.to - edge.from > 400) lane = LANES - 1;
      while (lane < LANES - 1 && taken[lane].subarray(edge.from, edge.to).includes(1)) lane += 1;
      taken[lane].fill(1, edge.from, edge.to);
      edge.lane = lane;
      used = Math.max(used, lane + 1);
    }
    this.gutter = 22 + 7 * used;
    this.space.style.setProperty("--gutter", `${this.gutter}px`);
  }

  later() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => ((this.due = 0), this.draw()));
  }

  draw() {
    const tall = this.view.clientHeight || 560;
    const first = Math.max(0, Math.floor(this.view.scrollTop / ROW) - 8);
    const end = Math.min(this.rows.length, Math.ceil((this.view.scrollTop + tall) / ROW) + 8);
    this.lines.replaceChildren(...this.rows.slice(first, end).map((node, i) => this.line(node, first + i)));
    this.view.setAttribute("aria-activedescendant", this.selected ? `row-${this.selected.row}` : "");
    this.drawArcs(first, end);
  }

  drawArcs(first, end) {
    const spine = this.gutter - 9;
    const y = (row) => row * ROW + ROW / 2;
    const here = this.selected ? this.selected.row : -1;
    const paths = [];
    for (const edge of this.edges) {
      if (edge.to < first || edge.from >= end) continue;
      const [a, b] = [y(edge.from), y(edge.to)];
      const out = spine - 7 - 7 * edge.lane;
      const d = edge.skips
        ? `M${spine} ${a}C${out} ${a} ${out} ${a} ${out} ${a + 9}L${out} ${b - 9}C${out} ${b} ${out} ${b} ${spine} ${b}`
        : `M${spine} ${a}L${spine} ${b}`;
      const touches = edge.from === here || edge.to === here;
      paths.push(s("path", { d, class: `${edge.skips ? "skip" : "next"}${touches ? " touched" : ""}` }));
    }
    for (let row = first; row < end; row += 1) {
      if (!this.rows[row].open) paths.push(s("circle", { cx: spine, cy: y(row), r: 2.5 }));
    }
    this.arcs.setAttribute("width", this.gutter);
    this.arcs.setAttribute("height", this.rows.length * ROW);
    this.arcs.replaceChildren(...paths);
  }

  line(node, i) {
    const { model } = this;
    const folder = node.children.length > 0;
    const step = model.steps[node.first];
    const { total } = node;
    const label = folder ? node.label : node.label ? `${node.label}` : step.operator;
    const spread = total.low === total.high ? bits(total.low) : `${bits(total.low)}–${bits(total.high)}`;
    const row = model.layerOf.get(step.name);
    const member = this.group && !node.open && this.has(node);
    const classes = ["line", folder ? "folder" : "", node === this.selected ? "selected" : "", member ? "member" : "", this.model.scalar[node.first] && !folder ? "scalar" : ""];
    const children = [
      h("span", { class: "fold" }, folder ? (node.open ? "▾" : "▸") : ""),
      h("span", { class: "swatch", style: { background: this.colour(node) } }),
      h("span", { class: "label" }, label),
      h("span", { class: "operator" }, folder ? (node.open ? "" : plural(node.end - node.first, "step")) : node.label ? step.operator : ""),
      h("span", { class: "shape" }, folder ? "" : shapeOf(step)),
      h("span", { class: "bits" }, !total.layers || node.open ? "" : folder ? spread : `${bitPair(row)}`),
      h("span", { class: "kept" }, !total.before || node.open ? "" : `${percent(total.channels / total.before, 0)} %`),
      h("span", { class: "bops" }, !total.layers || node.open ? "" : `${percent(total.bops / Math.max(1, model.bops))} %`),
    ];
    return h(
      "div",
      {
        id: `row-${i}`,
        class: classes.filter(Boolean).join(" "),
        role: "treeitem",
        "aria-level": node.depth + 1,
        "aria-expanded": folder ? String(node.open) : null,
        "aria-selected": String(node === this.selected),
        style: { top: `${i * ROW}px`, "--depth": node.depth },
        click: () => this.press(node),
      },
      children,
    );
  }

  colour(node) {
    const { total, open } = node;
    if (!total.layers || open) return "transparent";
    const row = {
      weight_bits: total.weight,
      activation_bits: total.activation,
      channels: total.before ? total.channels : null,
      channels_before: total.before,
      bops: total.bops,
      seconds: total.seconds,
    };
    if (chosen.kind === "sqnr") return total.sqnr === null ? "var(--nothing)" : COLOURS.sqnr.colour(total.sqnr, this.model);
    return colourOf(chosen.kind, this.model, row);
  }

  has(node) {
    for (let i = node.first; i < node.end; i += 1) if (this.members.has(i)) return true;
    return false;
  }

  press(node) {
    const again = this.selected === node;
    this.selected = node;
    if (node.children.length && (again || !node.open)) {
      node.open = !node.open;
      this.layout();
    } else this.draw();
    this.describe();
  }

  openAll(open) {
    const set = (node) => ((node.open = open && node.children.length > 0), node.children.forEach(set));
    this.roots.forEach(set);
    this.selected = null;
    this.layout();
    this.describe();
  }

  highlight(name) {
    this.group = name;
    this.pick.value = name;
    this.members = new Set(this.model.steps.flatMap((step, i) => (step.groups.includes(name) ? [i] : [])));
    const group = this.model.report.groups.find((row) => row.name === name);
    const kept = group ? `, ${whole(group.kept)} of ${whole(group.size)} channels stay, ${plural(group.members, "place")} of parameters` : "";
    this.count.textContent = name ? `in ${plural(this.members.size, "step")}${kept}` : "";
    const first = this.rows.findIndex((node) => !node.open && this.has(node));
    if (first >= 0) this.scrollTo(first);
    this.draw();
  }

  // Unfold what hides a step, select it and bring it into view.
  reveal(name) {
    const i = this.model.place.get(name);
    if (i === undefined) return;
    let [nodes, leaf] = [this.roots, null];
    while (nodes.length) {
      leaf = nodes.find((node) => node.first <= i && i < node.end);
      if (leaf.children.length) leaf.open = true;
      nodes = leaf.children;
    }
    this.selected = leaf;
    this.layout();
    this.scrollTo(leaf.row);
    this.describe();
    this.element.scrollIntoView({ block: "nearest" });
  }

  scrollTo(row) {
    const [top, bottom] = [this.view.scrollTop, this.view.scrollTop + this.view.clientHeight];
    if (row * ROW < top || (row + 1) * ROW > bottom) this.view.scrollTop = (row - 4) * ROW;
  }

  key(event) {
    const node = this.selected;
    const to = (row) => {
      this.selected = this.rows[Math.min(this.rows.length - 1, Math.max(0, row))];
      this.scrollTo(this.selected.row);
      this.draw();
      this.describe();
    };
    const row = node ? node.row : -1;
    const moves = {
      ArrowDown: () => to(row + 1),
      ArrowUp: () => to(row - 1),
      Home: () => to(0),
      End: () => to(this.rows.length - 1),
      ArrowRight: () => node && (node.children.length && !node.open ? this.press(node) : to(row + 1)),
      ArrowLeft: () => node && (node.open ? ((node.open = false), this.layout()) : node.parent && to(node.parent.row)),
      Enter: () => node && this.press(node),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
  }

  describe() {
    const node = this.selected;
    if (!node) {
      this.details.replaceChildren(h("p", { class: "note" }, "Choose a row to see its operator, source, shape, channel groups and pins."));
      return;
    }
    this.details.replaceChildren(...(node.children.length ? this.ofModule(node) : this.ofStep(node.first)));
  }

  ofModule(node) {
    const { total } = node;
    return [
      h("h3", {}, node.label),
      facts([
        ["steps", whole(node.end - node.first)],
        ["layers", whole(total.layers)],
        ["share of BOPs", total.layers ? `${percent(total.bops / Math.max(1, this.model.bops))} %` : ""],
        ["bits of weights", total.layers ? (total.low === total.high ? bits(total.low) : `${bits(total.low)} to ${bits(total.high)}`) : ""],
        ["channels kept", total.before ? `${whole(total.channels)} of ${whole(total.before)}` : ""],
        ["lowest SQNR", total.sqnr === null ? "" : `${fixed(total.sqnr, 1)} dB`],
        ["time", total.seconds ? `${fixed(1e3 * total.seconds, 3)} ms` : ""],
      ]),
    ];
  }

  ofStep(i) {
    const { model } = this;
    const step = model.steps[i];
    const row = model.layerOf.get(step.name);
    const link = (j) => h("button", { type: "button", class: "link", click: () => this.reveal(model.steps[j].name) }, model.steps[j].name);
    const group = (name) => h("button", { type: "button", class: "link", click: () => this.highlight(name) }, name);
    const read = row ? model.tensor(row) : null;
    const given = model.named.get(step.name);
    const tensors = [["reads", read], ["gives", given]].filter(([, tensor]) => tensor);
    return [
      h("h3", {}, step.name),
      facts([
        ["operator", step.operator],
        ["module", step.module || "the model itself"],
        ["source", step.source],
        ["shape", shapeOf(step)],
        ["bits w/a", row ? bitPair(row) : ""],
        ["channels kept", row && row.channels !== null ? `${whole(row.channels)} of ${whole(row.channels_before)}` : ""],
        ["MACs", row ? whole(row.macs) : ""],
        ["BOPs", row ? `${whole(row.bops)} (${percent(model.share(row))} %)` : ""],
        ["takes", step.reads.map(link)],
        ["read by", this.users[i].slice(0, 12).map(link)],
        ["channel groups", step.groups.map(group)],
        ["pinned by", step.pinned.map((why) => h("span", { class: "block" }, why))],
      ]),
      ...tensors.flatMap(([verb, tensor]) => [h("h4", {}, `Tensor that it ${verb}: ${tensor.name}`), facts(tensorFacts(tensor))]),
    ];
  }
}

function shapeOf(step) {
  return step.shape.map((size) => (size === 0 ? "N" : size)).join(" × ");
}

function tensorFacts(tensor) {
  return [
    ["bits", bits(tensor.bits)],
    ["range", `${significant(tensor.low)} to ${significant(tensor.high)}`],
    ["step", significant(tensor.step)],
    ["SQNR", tensor.sqnr === null ? "" : `${fixed(tensor.sqnr, 1)} dB`],
    ["clipped", `${percent(tensor.clipped, 2)} %`],
    ["channel spread", tensor.spread === null ? "" : `${significant(tensor.spread)} to 1`],
    ["dead channels", tensor.dead ? `${whole(tensor.dead)} of ${whole(tensor.channels)}` : ""],
  ];
}

// Names and values, those without a value left out.
function facts(pairs) {
  const told = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined && value.length !== 0);
  return h("dl", {}, told.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
