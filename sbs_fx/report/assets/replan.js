// Plans for other budgets, from the table of losses that a search measured; nothing of it is measured or built.
//
// `rows` of the table; `tradeoff` with the prices as sums of products over them; `limits` {measure: share of the float
// model}. A plan is an array with the place of a choice for each row. Prices are exact. The least loss is sought where
// loss + rate * price is least, for many rates, each found by changing one decision at a time; what is left of a budget
// is then spent where that gains most.

const FLOAT = 32;
const RATES = 48;
const STARTS = 6;
const ROUNDED = 1 - 1e-12; // of sums of prices, so that what fits by them fits exactly

class Replanner {
  constructor(rows, tradeoff, limits) {
    this.rows = rows;
    this.limits = limits;
    this.measures = Object.keys(limits);
    this.terms = tradeoff.terms;
    this.whole = tradeoff.whole;
    this.most = rows.map((row) => row.choices.indexOf(Math.max(...row.choices)));
    this.least = rows.map((row) => row.choices.indexOf(Math.min(...row.choices)));
    // Of each row the products that it is in, as shares of the limits: the measure, what stands beside it, and what each
    // of its choices multiplies that by.
    this.parts = rows.map(() => []);
    for (const [m, measure] of this.measures.entries()) {
      for (const [value, ...places] of this.terms[measure]) {
        for (const i of new Set(places.map((place) => place % rows.length))) {
          const own = places.filter((place) => place % rows.length === i);
          const times = rows[i].choices.map((_, k) => own.reduce((product, place) => product * this.factor(place, k), 1));
          const beside = places.filter((place) => place % rows.length !== i);
          this.parts[i].push({ m, value: value / (this.whole[measure] * limits[measure]), beside, times });
        }
      }
    }
  }

  factor(place, choice) {
    const chosen = this.rows[place % this.rows.length].choices[choice];
    return place < this.rows.length ? chosen : Number(chosen < FLOAT);
  }

  // Values of the factors under a plan.
  factors(plan) {
    return Float64Array.from({ length: 2 * plan.length }, (_, place) => this.factor(place, plan[place % plan.length]));
  }

  // What a plan costs of a measure, in its own units.
  price(measure, plan) {
    const factors = this.factors(plan);
    return this.terms[measure].reduce((sum, [value, ...places]) => sum + places.reduce((product, place) => product * factors[place], value), 0);
  }

  share(measure, plan) {
    return this.price(measure, plan) / this.whole[measure];
  }

  // Price over limit, the largest of all measures.
  used(plan) {
    return Math.max(...this.measures.map((measure) => this.share(measure, plan) / this.limits[measure]));
  }

  loss(plan) {
    return this.rows.reduce((sum, row, i) => sum + row.losses[plan[i]], 0);
  }

  // Of each measure the prices of the choices of a row, but for a constant, as shares of the limits.
  prices(i, factors) {
    const prices = this.measures.map(() => new Float64Array(this.rows[i].choices.length));
    for (const { m, value, beside, times } of this.parts[i]) {
      let product = value;
      for (const place of beside) product *= factors[place];
      for (let k = 0; k < times.length; k++) prices[m][k] += product * times[k];
    }
    return prices;
  }

  set(plan, factors, i, k) {
    plan[i] = k;
    factors[i] = this.factor(i, k);
    factors[i + plan.length] = this.factor(i + plan.length, k);
  }

  // One decision after the other at the choice of least loss + rate * price, in place, until nothing changes.
  descend(plan, factors, rate) {
    for (let changed = true, sweep = 0; changed && sweep < 20; sweep++) {
      changed = false;
      for (const [i, row] of this.rows.entries()) {
        const prices = this.prices(i, factors);
        const value = (k) => prices.reduce((sum, of) => sum + rate * of[k], row.losses[k]);
        let best = plan[i];
        let least = value(best);
        for (let k = 0; k < row.losses.length; k++) if (value(k) < least - 1e-12 * Math.abs(least)) [best, least] = [k, value(k)];
        if (best === plan[i]) continue;
        this.set(plan, factors, i, best);
        changed = true;
      }
    }
  }

  // Plans from the dearest to the cheapest, {plan, used, loss}, none of them beaten by another.
  get path() {
    if (this.found) return this.found;
    const plans = [this.most, this.least];
    const most = this.rows.reduce((sum, row) => sum + Math.max(...row.losses), 0);
    const rates = Array.from({ length: RATES }, (_, j) => (most / this.used(this.most)) * 10 ** (-4 + (10 * j) / (RATES - 1)));
    for (const [start, order] of [[this.most, rates], [this.least, [...rates].reverse()]]) {
      const [plan, factors] = [[...start], this.factors(start)];
      for (const rate of most > 0 ? order : []) {
        this.descend(plan, factors, rate);
        plans.push([...plan]);
      }
    }
    const points = plans.map((plan) => ({ plan, used: this.used(plan), loss: this.loss(plan) }));
    points.sort((a, b) => a.used - b.used || a.loss - b.loss);
    let lowest = Infinity;
    this.found = points.filter((point) => point.loss < lowest && ((lowest = point.loss), true)).reverse();
    return this.found;
  }

  fits(plan, limits) {
    return this.measures.every((measure) => this.share(measure, plan) <= limits[measure]);
  }

  // The plan of least loss that is found within limits; null if none is.
  solve(limits) {
    const within = this.path.filter((point) => this.fits(point.plan, limits)).slice(0, STARTS);
    const plans = within.map((point) => this.spent([...point.plan], limits));
    return plans.reduce((best, plan) => (best === null || plan.loss < best.loss ? plan : best), null);
  }

  // A plan within limits, with what it leaves of them spent.
  spent(plan, limits) {
    const factors = this.factors(plan);
    const room = this.measures.map((measure) => (limits[measure] * ROUNDED - this.share(measure, plan)) / this.limits[measure]);
    for (let changed = true, pass = 0; changed && pass < 4; pass++) {
      changed = false;
      const moves = [];
      for (const [i, { losses }] of this.rows.entries()) {
        const prices = this.prices(i, factors);
        for (const [k, loss] of losses.entries()) {
          if (loss >= losses[plan[i]]) continue;
          const more = prices.reduce((sum, of) => sum + of[k] - of[plan[i]], 0);
          moves.push({ i, k, rate: (losses[plan[i]] - loss) / Math.max(more, 1e-300) });
        }
      }
      for (const { i, k } of moves.sort((a, b) => b.rate - a.rate)) {
        if (this.rows[i].losses[k] >= this.rows[i].losses[plan[i]]) continue;
        const more = this.prices(i, factors).map((of) => of[k] - of[plan[i]]);
        if (more.some((price, m) => price > room[m])) continue;
        more.forEach((price, m) => (room[m] -= price));
        this.set(plan, factors, i, k);
        changed = true;
      }
    }
    return { plan, used: this.used(plan), loss: this.loss(plan) };
  }
}
