"use strict";

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/* The value a cell sorts by: a number, a text, or null where it has none. */
function valueOf(cell) {
  const value = cell.dataset.value ?? cell.textContent;
  if (value === "" || value === "–") return null;
  return cell.classList.contains("number") ? Number(value) : value;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [valueOf(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // last, either way
    return down ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head) sortBy(table, head.cellIndex);
  });
}

/* An element with text, and classes by name. */
function made(tag, text = "", classes = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (classes) element.className = classes;
  return element;
}

/* Figures are shown as large as they are, and back again. */
for (const image of document.querySelectorAll("figure > img")) {
  const button = made("button", "", "enlarge");
  button.type = "button";
  button.title = "Enlarge, or make small again";
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => button.parentElement.classList.toggle("large"));
}
