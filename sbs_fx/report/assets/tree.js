// Steps filed in a tree of modules, in the order in which they run: a node is the steps from `first` to before `end`.

// The path of modules by which each step is filed. A step of an outer module between two of an inner one is filed with
// them: additions of a residual network would otherwise cut its blocks apart.
function filed(steps) {
  const paths = steps.map((step) => (step.module ? step.module.split(".") : []));
  const inner = paths.map((path) => path);
  const begins = (path, prefix) => prefix.every((part, i) => path[i] === part);
  for (let i = 0; i < paths.length; ) {
    let j = i + 1;
    while (j < paths.length && steps[j].module === steps[i].module) j += 1;
    const [before, after] = [inner[i - 1], paths[j]];
    if (before && after) {
      let depth = 0;
      while (depth < Math.min(before.length, after.length) && before[depth] === after[depth]) depth += 1;
      const shared = before.slice(0, depth);
      if (depth > paths[i].length && begins(shared, paths[i])) inner.fill(shared, i, j);
    }
    i = j;
  }
  return inner;
}

function totals(model, first, end) {
  const total = { layers: 0, bops: 0, before: 0, channels: 0, seconds: 0, low: Infinity, high: -Infinity };
  const weighed = { weight: 0, activation: 0 };
  let sqnr = null;
  for (let i = first; i < end; i += 1) {
    const row = model.layerOf.get(model.steps[i].name);
    if (!row) continue;
    total.layers += 1;
    total.bops += row.bops;
    total.seconds += row.seconds;
    total.channels += row.channels ?? 0;
    total.before += row.channels_before ?? 0;
    total.low = Math.min(total.low, row.weight_bits);
    total.high = Math.max(total.high, row.weight_bits);
    weighed.weight += row.bops * row.weight_bits;
    weighed.activation += row.bops * row.activation_bits;
    const own = model.sqnr(row);
    if (own !== null) sqnr = sqnr === null ? own : Math.min(sqnr, own);
  }
  const over = Math.max(1, total.bops);
  return { ...total, weight: weighed.weight / over, activation: weighed.activation / over, sqnr };
}

function treeOf(model) {
  const paths = filed(model.steps);
  const leaf = (i, depth, prefix) => ({ first: i, end: i + 1, depth, label: prefix, children: [] });
  function build(first, end, level, depth) {
    const nodes = [];
    for (let i = first; i < end; ) {
      const name = paths[i][level];
      if (name === undefined) {
        nodes.push(leaf(i, depth, ""));
        i += 1;
        continue;
      }
      let j = i + 1;
      while (j < end && paths[j][level] === name) j += 1;
      const node = { first: i, end: j, depth, label: name, children: build(i, j, level + 1, depth + 1), open: false };
      const [only] = node.children;
      if (node.children.length > 1) nodes.push(node);
      else nodes.push(raised(only, name));
      i = j;
    }
    return nodes;
  }
  // A module of one row is that row, with the name of both.
  function raised(node, name) {
    const sink = (inner) => ((inner.depth -= 1), inner.children.forEach(sink));
    sink(node);
    node.label = node.label ? `${name}.${node.label}` : name;
    return node;
  }
  const roots = build(0, model.steps.length, 0, 0);
  const link = (node, parent) => ((node.parent = parent), (node.total = totals(model, node.first, node.end)), node.children.forEach((child) => link(child, node)));
  roots.forEach((root) => link(root, null));
  return roots;
}
