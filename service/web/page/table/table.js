/** All photos as a table, and as a CSV file. */

import { byId, make } from "../dom.js";
import { percent } from "../numbers.js";

/** @typedef {import("../gallery.js").Photo} Photo */

const panel = byId("table");
const body = make("tbody", {});
/** @type {Map<number, HTMLTableRowElement>} by photo */
const rows = new Map();
/** What is shown, or would be. @type {{photos: Photo[], model: import("../api.js").Model | null, open: (photo: Photo) => void}} */
let shown = { photos: [], model: null, open: () => {} };
let isPlanned = false;

const HEADINGS = ["Photo", "Label", "Probability", "Next", "", "Known"];

panel.append(
  make(
    "div",
    { class: "heading" },
    make("h2", { id: "table-title" }, "All photos"),
    make("button", { type: "button", id: "save-csv", on: { click: save } }, "Save as CSV"),
  ),
  make(
    "div",
    { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Table of all photos" },
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, ...HEADINGS.map((text) => make(text ? "th" : "td", text ? { scope: "col" } : {}, text)))),
      body,
    ),
  ),
);

/**
 * Keep the table as the photos are.
 * @param {Photo[]} photos
 * @param {import("../api.js").Model | null} model
 * @param {(photo: Photo) => void} open
 */
export function showTable(photos, model, open) {
  shown = { photos, model, open };
  plan();
}

/** Hundreds of photos may change at the same time. */
function plan() {
  if (isPlanned) return;
  isPlanned = true;
  requestAnimationFrame(() => {
    isPlanned = false;
    update();
  });
}

function update() {
  const { photos, open } = shown;
  for (const [id, row] of rows) {
    if (photos.some((photo) => photo.id === id)) continue;
    row.remove();
    rows.delete(id);
  }
  if (panel.hidden) return;
  for (const photo of photos) {
    if (!rows.has(photo.id)) {
      rows.set(photo.id, rowOf(photo, open));
      body.append(rows.get(photo.id));
    }
    fill(rows.get(photo.id), photo);
  }
}

function rowOf(photo, open) {
  const name = make("button", { type: "button", class: "plain-link", on: { click: () => open(photo) } }, photo.name);
  return make(
    "tr",
    { data: { photo: photo.name } },
    make("th", { scope: "row" }, name),
    ...Array.from({ length: HEADINGS.length - 1 }, () => make("td", {})),
  );
}

/** @param {HTMLTableRowElement} row @param {Photo} photo */
function fill(row, { answer, error }) {
  const [best, next] = answer?.predictions ?? [];
  const texts = error
    ? [error.message, "", "", "", ""]
    : [best?.label, best && percent(best.probability), next?.label, next && percent(next.probability), knownWord(answer)];
  texts.forEach((text, at) => (row.cells[at + 1].textContent = text ?? (answer ? "" : "…")));
  row.classList.toggle("refused", Boolean(error));
}

/** "yes", "no", or nothing where the model does not tell. */
function knownWord(answer) {
  return { true: "yes", false: "no" }[answer?.known] ?? "";
}

function save() {
  const url = URL.createObjectURL(new Blob([csvOf(shown.photos, shown.model)], { type: "text/csv" }));
  make("a", { href: url, download: "fovea.csv" }).click();
  window.setTimeout(() => URL.revokeObjectURL(url), 10_000); // the browser reads it meanwhile
}

/**
 * One line for each photo, and a column for each label that is among the most probable ones of any photo.
 * @param {Photo[]} photos
 * @param {import("../api.js").Model} model
 */
export function csvOf(photos, model) {
  const labels = new Map();
  for (const { answer } of photos) for (const { index, label } of answer?.predictions ?? []) labels.set(index, label);
  const columns = [...labels.keys()].sort((one, other) => one - other);
  const hasSelection = photos.some(({ answer }) => answer?.predictions.some(({ selected }) => selected !== undefined));
  const head = ["name", "model", "version", "label", "probability", ...(hasSelection ? ["selected"] : [])];
  const line = ({ name, answer, error }) => {
    const predictions = answer?.predictions ?? [];
    const probabilities = new Map(predictions.map(({ index, probability }) => [index, probability]));
    const chosen = predictions.filter(({ selected }) => selected).map(({ label }) => label);
    return [
      name,
      model.name,
      model.version,
      predictions[0]?.label,
      predictions[0]?.probability,
      ...(hasSelection ? [chosen.join("; ")] : []),
      answer?.known,
      answer?.known_score,
      error?.message,
      ...columns.map((index) => probabilities.get(index)),
    ];
  };
  const heading = [...head, "known", "known_score", "error", ...columns.map((index) => `p(${labels.get(index)})`)];
  return [heading, ...photos.map(line)].map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

/** A cell by RFC 4180. A spreadsheet would take text that begins like a formula for one, so that it gets a quote. */
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "string") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
