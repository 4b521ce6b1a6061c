// Other budgets, solved in the page, and the plans that the search made and did not take.

const POSITIONS = 200; // of the slider
const DECADES = 6; // of losses that are drawn, below the largest

const FRAME = { width: 600, height: 260, left: 58, right: 14, top: 14, bottom: 40 };

// Losses over prices, both logarithmic; prices as multiples of the budget, `text` of one.
class TradeoffPlot {
  constructor(prices, losses, text) {
    const known = losses.filter((loss) => loss > 0);
    this.top = Math.max(1e-12, ...known) * 1.3;
    this.bottom = Math.max(this.top / 10 ** DECADES, Math.min(this.top, ...known) / 1.3);
    [this.low, this.high] = [Math.min(...prices, 1) / 1.1, Math.max(...prices, 1) * 1.1];
    this.curve = s("path", { class: "curve", stroke: "var(--line-1)" });
    this.here = s("circle", { r: 6, fill: "var(--line-1)", visibility: "hidden" });
    this.dots = s("g", {});
    const { width, height, left, right, top, bottom } = FRAME;
    const decades = [];
    for (let power = Math.ceil(Math.log10(this.bottom)); 10 ** power <= this.top; power++) decades.push(power);
    const ends = [this.low * 1.1, this.high / 1.1].filter((price) => Math.abs(this.x(price) - this.x(1)) > 80);
    const label = (price) => s("text", { class: "tick", x: this.x(price), y: height - 24, "text-anchor": price > 1 ? "end" : price < 1 ? "start" : "middle" }, text(price));
    this.element = s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "estimated loss over price" },
      decades.flatMap((power) => [
        s("line", { class: "rule", x1: left, x2: width - right, y1: this.y(10 ** power), y2: this.y(10 ** power) }),
        s("text", { class: "tick", x: left - 6, y: this.y(10 ** power) + 4, "text-anchor": "end" }, `10${superscript(power)}`),
      ]),
      s("line", { class: "curve dashed", x1: this.x(1), x2: this.x(1), y1: top, y2: height - bottom, stroke: "var(--quiet)" }),
      this.curve,
      this.dots,
      this.here,
      [...ends, 1].map(label),
      s("text", { class: "tick", x: width - right, y: height - 6, "text-anchor": "end" }, "price, logarithmic"),
    );
  }

  x(price) {
    return FRAME.left + (Math.log(price / this.low) / Math.log(this.high / this.low)) * (FRAME.width - FRAME.left - FRAME.right);
  }

  y(loss) {
    const share = Math.log(Math.max(loss, this.bottom) / this.bottom) / Math.log(this.top / this.bottom);
    return FRAME.height - FRAME.bottom - share * (FRAME.height - FRAME.top - FRAME.bottom);
  }

  draw(points) {
    this.curve.setAttribute("d", points.map(({ used, loss }, i) => `${i ? "L" : "M"}${this.x(used).toFixed(1)} ${this.y(loss).toFixed(1)}`).join(""));
  }

  dot(price, loss, taken, text) {
    const shape = { cx: this.x(price), cy: this.y(loss), r: taken ? 5 : 4, fill: taken ? "var(--line-2)" : "var(--paper)", stroke: "var(--line-2)", "stroke-width": 2 };
    this.dots.append(s("circle", { ...shape, tabindex: 0, role: "img", "aria-label": text }, s("title", {}, text)));
  }

  point(plan) {
    this.here.setAttribute("visibility", plan ? "visible" : "hidden");
    if (!plan) return;
    this.here.setAttribute("cx", this.x(plan.used));
    this.here.setAttribute("cy", this.y(plan.loss));
  }
}

// How many decisions of a kind have each choice, in words; of channels the share that stays.
function decided(rows, plan) {
  const of = (kind) => rows.map((row, i) => [row, row.choices[plan[i]]]).filter(([row]) => row.kind === kind);
  const widths = (kind) => {
    const chosen = of(kind).map(([, value]) => value);
    const counts = [...new Set(chosen)].sort((a, b) => a - b).map((value) => `${whole(chosen.filter((each) => each === value).length)} at ${bits(value)}`);
    return counts.join(", ");
  };
  const channels = of("channels");
  const [kept, all] = channels.reduce(([a, b], [row, value]) => [a + value, b + Math.max(...row.choices)], [0, 0]);
  return [
    ["bits of weights", widths("weight")],
    ["bits of tensors", widths("activation")],
    ["channels kept", channels.length ? `${whole(kept)} of ${whole(all)}` : ""],
  ].filter(([, text]) => text);
}

const TOTALS = { bops: "BOPs", macs: "MACs", params: "parameters", size: "stored bytes", latency: "latency ms" };
const UNITS = { size: 1 / 8, latency: 1e3 }; // of a price, in what totals count

function sliderPanel(replanner, report) {
  const { limits, measures } = replanner;
  const { tradeoff, totals } = report;
  const used = (plan) => Math.max(...measures.map((measure) => (plan.shares[measure] ?? 0) / limits[measure]));
  const ends = [replanner.used(replanner.least), replanner.used(replanner.most)];
  const text = (price) => (measures.length > 1 ? `${significant(price, 2)} × budget` : `${significant(100 * price * limits[measures[0]], 2)} %`);
  const losses = [replanner.loss(replanner.least), replanner.loss(replanner.most), ...tradeoff.plans.map((plan) => plan.estimated)];
  const plot = new TradeoffPlot([...ends, ...tradeoff.plans.map(used)], losses, text);
  for (const plan of [...tradeoff.plans].sort((a, b) => Number(!a.reason) - Number(!b.reason))) plot.dot(used(plan), plan.estimated, !plan.reason, `${plan.name}: ${plan.reason || "taken"}`);

  // As `sbs-fx replan` reads them: percentages of three digits; at first those that were asked for.
  const asked = (price) => Object.fromEntries(measures.map((measure) => [measure, price === 1 ? limits[measure] : Number((100 * limits[measure] * price).toPrecision(3)) / 100]));
  const written = (shares) => measures.map((measure) => `${measure}=${Number((100 * shares[measure]).toPrecision(6))}%`).join(",");
  const position = (price) => Math.round((POSITIONS * Math.log(price / ends[0])) / Math.log(ends[1] / ends[0]));
  const price = (place) => ends[0] * (ends[1] / ends[0]) ** (place / POSITIONS);

  const output = h("output", { class: "budget-now" });
  const command = h("code", {});
  const answer = h("div", { "aria-live": "polite" });
  let solved = null;
  let waiting = null;

  function row(measure) {
    const [, before, after] = totals.find(([name]) => name === TOTALS[measure]);
    const value = replanner.price(measure, solved.plan) * (UNITS[measure] ?? 1);
    const cells = [before, after, value].map((amount) => h("td", { class: "number", title: String(amount) }, shown(TOTALS[measure], amount).join(THIN)));
    return h("tr", { "data-measure": measure }, h("th", { scope: "row" }, MEASURE[measure]), cells, h("td", { class: "number" }, percent(replanner.share(measure, solved.plan), 2)));
  }

  function solve(shares) {
    solved = replanner.solve(shares);
    plot.point(solved);
    take.disabled = !solved;
    if (!solved) return answer.replaceChildren(h("p", { class: "alarm" }, "Out of reach: the fewest bits and channels cost more."));
    const heads = ["", "float", "this result", "predicted", "% of float"].map((name, i) => h("th", { scope: "col", class: i ? "number" : "text" }, name));
    const lines = Object.keys(tradeoff.terms).filter((measure) => replanner.whole[measure]).map(row);
    const facts_ = facts([["estimated loss", `${significant(solved.loss)} nats an image`], ...decided(replanner.rows, solved.plan)]);
    return answer.replaceChildren(h("div", { class: "two" }, h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, lines))), facts_));
  }

  function show(at) {
    const shares = asked(at);
    output.textContent = written(shares);
    slider.setAttribute("aria-valuetext", written(shares));
    command.textContent = `sbs-fx replan DIR --budget ${written(shares)}`;
    clearTimeout(waiting);
    waiting = setTimeout(() => solve(shares), 20); // reason: a moved slider asks more often than large tables are solved
  }

  const slider = h("input", { type: "range", min: 0, max: POSITIONS, value: position(1), "aria-label": "budget", input: () => show(price(Number(slider.value))) });
  const columns = [
    { label: "kind", value: (i) => replanner.rows[i].kind },
    { label: "decision", value: (i) => replanner.rows[i].name },
    { label: "choice", value: (i) => replanner.rows[i].choices[solved.plan[i]] },
    { label: "loss", value: (i) => replanner.rows[i].losses[solved.plan[i]] },
  ];
  const take = h("button", { type: "button", disabled: true, click: () => download("predicted.csv", csv(columns, replanner.rows.map((_, i) => i))) }, "download CSV");

  const names = [["var(--line-1)", "predicted, for any budget"], ["var(--line-2)", "plans of the search, filled: the one taken"]];
  const key = names.map(([colour, name]) => h("span", {}, h("span", { class: "swatch", style: { background: colour } }), ` ${name}`));
  const figure = h("figure", { class: "wide" }, h("figcaption", {}, h("b", {}, "estimated loss, nats"), h("span", { class: "legend spread" }, key, h("span", {}, "dashed: the budget"))), plot.element);
  const tools = h("div", { class: "tools budget-tools" }, h("label", {}, "budget ", slider), output, take);
  // reason: of a thousand layers it takes a second, which nobody waits for who does not look at it
  const begin = () => replanner.found || (plot.draw(replanner.path), show(1));
  const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && (seen.disconnect(), begin()));
  seen.observe(figure);
  addEventListener("beforeprint", begin);
  return [figure, tools, answer, h("p", { class: "note spaced" }, "The exact solver makes that plan, from the same table: ", command)];
}

function rejectedPlans(report) {
  const { plans } = report.tradeoff;
  if (!plans.length) return null;
  const measures = report.limits.map((row) => row.measure);
  const columns = [
    { label: "plan", left: true, value: (row) => row.name },
    { label: "estimated loss", value: (row) => row.estimated, text: (row) => significant(row.estimated) },
    { label: "judged loss", value: (row) => row.judged, text: (row) => significant(row.judged) },
    ...measures.map((measure) => ({ label: MEASURE[measure] ?? measure, unit: "%", value: (row) => row.shares[measure], text: (row) => percent(row.shares[measure], 2) })),
    { label: "why not", left: true, value: (row) => row.reason, show: (row) => (row.reason ? h("span", { class: "sides" }, row.reason) : h("b", { class: "fine" }, "taken")) },
  ];
  return h("div", {}, h("h3", {}, "Plans of the search"), grid(columns, plans, { csv: "plans.csv", caption: "plans of the search" }));
}

function tradeoffPanel(model) {
  const { report } = model;
  const { tradeoff, limits } = report;
  const shares = Object.fromEntries(limits.map((row) => [row.measure, row.limit]));
  const rows = DATA.sensitivity;
  const solvable = rows.length && limits.length && limits.every(({ measure }) => tradeoff.terms[measure]);
  const parts = [...(solvable ? sliderPanel(new Replanner(rows, tradeoff, shares), report) : []), rejectedPlans(report)].filter(Boolean);
  const note = "Predicted from the measured losses, which are added up as if decisions did not touch one another; nothing is measured or built here.";
  return parts.length ? [section("tradeoff", "Other budgets and plans", solvable ? note : null, ...parts)] : [];
}
