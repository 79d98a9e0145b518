/** Many terms of which the largest are shown, each with a bar, and the rest as one. */

import { make, setStyles } from "../dom.js";
import { figure } from "../numbers.js";

/** Terms that have a line of their own. */
const LINES = 10;

/**
 * The places of the terms that are largest, and of one that is shown in any case.
 * @param {ArrayLike<number>} sizes
 * @param {number} [kept]
 */
export function leading(sizes, kept) {
  const places = Array.from(sizes, (_, at) => at).sort(
    (one, other) => Math.abs(sizes[other]) - Math.abs(sizes[one]),
  );
  const shown = places.slice(0, LINES);
  if (kept !== undefined && !shown.includes(kept)) shown.splice(-1, 1, kept);
  return shown;
}

/**
 * A table with a bar in each line.
 * @param {string} name
 * @param {(string | Node)[]} headings one for each column; the last is of the term that the bar shows
 * @param {{name: string, numbers: (number | null)[], kind?: string, link?: Node}[]} lines
 */
export function ranking(name, headings, lines) {
  const values = lines.map(({ numbers }) => numbers[numbers.length - 1]);
  const size = Math.max(...values.map(Math.abs), Number.MIN_VALUE);
  const signed = values.some((value) => value < 0);
  return make(
    "table",
    { class: signed ? "ranking signed" : "ranking", "aria-label": name },
    make(
      "thead",
      {},
      make("tr", {}, ...headings.map((heading) => make("th", { scope: "col" }, heading)), make("td", {})),
    ),
    make("tbody", {}, ...lines.map((line) => row(line, size))),
  );
}

function row({ name, numbers, kind = "term", link }, size) {
  const value = numbers[numbers.length - 1];
  const bar = make("span", { class: value < 0 ? "bar below" : "bar" });
  setStyles(bar, { "--share": Math.abs(value) / size });
  return make(
    "tr",
    { class: kind, data: { value } },
    make("th", { scope: "row" }, link ?? name),
    ...numbers.map((one) =>
      make("td", one === null ? {} : { data: { value: one } }, one === null ? "" : figure(one)),
    ),
    make("td", { class: "bars-cell", "aria-hidden": "true" }, bar),
  );
}
