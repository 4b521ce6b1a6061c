// Tables that sort, filter and can be taken away as CSV.
//
// A column: `label`, `value` of a row (what is sorted by), `text` of a row (what is shown), and maybe `unit`, `left`
// (text, not a number), `show` (an element in place of the text), `wide`.

const MOST_ROWS = 100; // drawn before somebody asks for all

function compared(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1; // unknown last, whichever way
  if (b === null || b === undefined) return -1;
  return a < b ? -1 : 1;
}

function cell(column, row) {
  const shown = column.show ? column.show(row) : column.text ? column.text(row) : String(column.value(row) ?? "");
  return h("td", { class: column.left ? "text" : "number" }, shown);
}

// Text that a spreadsheet takes as text: what would be a formula is quoted.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(columns, rows) {
  const head = columns.map((column) => csvCell(column.label + (column.unit ? ` (${column.unit})` : "")));
  return [head, ...rows.map((row) => columns.map((column) => csvCell(column.value(row))))].map((r) => r.join(",")).join("\n");
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/* options: filter (a placeholder), csv (a file's name), press (called with a row), caption, key (an id of a row). */
function grid(columns, rows, options = {}) {
  columns = columns.filter((column) => column.always || rows.some((row) => ![null, undefined, ""].includes(column.value(row))));
  let order = rows;
  let sorted = null;
  let all = false;
  let words = "";
  const body = h("tbody");
  const heads = columns.map((column, i) => {
    const unit = column.unit ? h("span", { class: "unit" }, ` ${column.unit}`) : null;
    const button = h("button", { type: "button", click: () => sort(i) }, column.label, unit);
    return h("th", { scope: "col", class: column.left ? "text" : "number", "aria-sort": "none" }, button);
  });
  const more = h("button", { type: "button", class: "more", click: () => ((all = true), draw()) });
  const count = h("span", { class: "count", role: "status" });

  function matching() {
    if (!words) return order;
    const parts = words.toLowerCase().split(/\s+/).filter(Boolean);
    return order.filter((row) => {
      const text = columns.map((column) => String(column.text ? column.text(row) : column.value(row))).join(" ").toLowerCase();
      return parts.every((part) => text.includes(part));
    });
  }

  function draw() {
    const found = matching();
    const shown = all ? found : found.slice(0, MOST_ROWS);
    body.replaceChildren(
      ...shown.map((row) => {
        const line = h("tr", {}, ...columns.map((column) => cell(column, row)));
        if (options.press) {
          filled(line, { tabindex: 0, class: "pressable", click: () => options.press(row) }, []);
          line.addEventListener("keydown", (event) => event.key === "Enter" && options.press(row));
        }
        return line;
      }),
    );
    more.hidden = shown.length === found.length;
    more.textContent = `show all ${whole(found.length)} rows`;
    count.textContent = words ? `${whole(found.length)} of ${whole(rows.length)}` : "";
  }

  function sort(i) {
    const descending = sorted && sorted.column === i ? !sorted.descending : !columns[i].left;
    sorted = { column: i, descending };
    const value = columns[i].value;
    order = rows
      .map((row) => [value(row), row])
      .sort(([a], [b]) => (descending && ![a, b].some((x) => x === null || x === undefined) ? compared(b, a) : compared(a, b)))
      .map(([, row]) => row);
    heads.forEach((head, j) => head.setAttribute("aria-sort", j === i ? (descending ? "descending" : "ascending") : "none"));
    draw();
  }

  const tools = [];
  if (options.filter && rows.length > 8) {
    const input = (event) => ((words = event.target.value), draw());
    tools.push(h("input", { type: "search", placeholder: options.filter, "aria-label": options.filter, input }), count);
  }
  if (options.csv) {
    tools.push(h("button", { type: "button", click: () => download(options.csv, csv(columns, matching())) }, "download CSV"));
  }
  addEventListener("beforeprint", () => ((all = true), draw()));
  draw();
  const table = h("table", {}, h("thead", {}, h("tr", {}, heads)), body);
  const scroll = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": options.caption || "table" }, table);
  return h("div", { class: "grid" }, tools.length ? h("div", { class: "tools" }, tools) : null, scroll, more);
}

// A share as a small bar with its number.
function shareBar(share, text) {
  const width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return h("span", { class: "share" }, h("span", { class: "share-bar" }, h("i", { style: { width } })), text);
}
