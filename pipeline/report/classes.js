// Search and order of the tables of classes. Without it they are whole, in the order of the run's classes.

function valueOf(cell) {
  const text = cell.textContent.trim();
  if (text === "\u2013") return null;
  const number = Number(text.replaceAll(",", ""));
  return Number.isNaN(number) ? text : number;
}

function compare(one, other, ascending) {
  // What has no number is last in both orders.
  if (one === null || other === null) return (one === null) - (other === null);
  const order = typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(other);
  return ascending ? order : -order;
}

function sort(heads, column, rows) {
  const head = heads[column];
  const values = new Map(rows.map((row) => [row, column ? valueOf(row.cells[column]) : row.cells[0].textContent]));
  const numbers = [...values.values()].some((value) => typeof value === "number");
  const before = head.getAttribute("aria-sort");
  // Of numbers the highest are asked for first.
  const ascending = before ? before === "descending" : !numbers;
  for (const one of heads) one.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const sorted = [...rows].sort((a, b) => compare(values.get(a), values.get(b), ascending));
  rows[0].parentElement.append(...sorted);
}

for (const place of document.querySelectorAll(".searchable")) {
  const table = place.querySelector("table");
  const rows = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells];
  if (!rows.length) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(heads, column, rows));
    head.append(button);
  });
  const field = place.querySelector("input");
  const count = place.querySelector("output");
  const search = () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} classes`;
  };
  field.addEventListener("input", search);
  search();
  place.querySelector(".search").hidden = false;
}
