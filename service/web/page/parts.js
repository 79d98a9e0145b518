/** What sums and formulas on the page are made of. Every number is also in `data-value`, with all its digits. */

import { colourOf, css, inkOn } from "./colours.js";
import { make, setStyles } from "./dom.js";
import { brief, figure } from "./numbers.js";

/** Columns up to which the numbers of a table have room. */
const LEGIBLE = 5;

/** A formula on a line of its own. @param {...(string | Node)} text */
export function formula(...text) {
  return make("p", { class: "formula" }, ...text);
}

/** A number with a name before it. @param {string} [role] what tests and styles know it by */
export function number(value, role = "number") {
  return make("span", { class: `value ${role}`, data: { value } }, figure(value));
}

/**
 * A small table of numbers as coloured cells.
 * @param {string} name for those who cannot see it
 * @param {ArrayLike<number>} values row by row
 * @param {number} across cells in a row
 * @param {import("./colours.js").Scale} scale
 * @param {{outside?: boolean[], chosen?: number, role?: string}} [marks] which cells lie in the padding, which one was chosen,
 *   and what styles know the table by
 */
export function grid(name, values, across, scale, { outside = [], chosen = -1, role = "" } = {}) {
  const rows = Array.from({ length: Math.ceil(values.length / across) }, (_, row) =>
    make(
      "tr",
      {},
      ...Array.from({ length: across }, (_, column) => {
        const at = row * across + column;
        const element = cell(values[at], scale, outside[at], at === chosen);
        setStyles(element, { "--at": at / values.length }); // when its turn comes in a map that grows
        return element;
      }),
    ),
  );
  return make(
    "table",
    { class: `grid ${role} ${across > LEGIBLE ? "dense" : ""}`, "aria-label": name },
    make("tbody", {}, ...rows),
  );
}

function cell(value, scale, outside, chosen) {
  const kind = ["cell", outside && "outside", chosen && "chosen"].filter(Boolean).join(" ");
  const colour = colourOf(scale, value);
  const element = make(
    "td",
    { class: kind, title: outside ? "padding: counts as 0" : figure(value, 6), data: { value } },
    brief(value),
  );
  if (!outside) setStyles(element, { background: css(colour), color: inkOn(colour) });
  return element;
}

/**
 * A sum, written out: its terms, and what they come to beside the value that the map has.
 * @param {{name: string, value: number, kind?: string, link?: Node}[]} terms
 * @param {number} shown the value in the map
 */
export function equation(terms, shown) {
  const total = terms.reduce((sum, { value }) => sum + value, 0);
  const summands = terms.map(({ name, value, kind, link }, at) =>
    summand({ name, value, kind, link, sign: value < 0 ? "−" : at ? "+" : "", text: figure(Math.abs(value)) }),
  );
  return line(total, shown, ...summands, result(total, nameOf(total, shown)));
}

/** What goes in and what comes out. @param {Node} [link] to where the value comes from */
export function step(from, to, shown, link) {
  return line(to, shown, summand({ name: "in", value: from, link }), sign("→"), result(to, "out", ""));
}

/**
 * One line of arithmetic.
 * @param {number} total what it comes to @param {number} shown the value in the map
 * @param {...Node} parts of `summand`, `sign` and `result`
 */
export function line(total, shown, ...parts) {
  const rounded = isRounded(total, shown) ? [result(shown, "after the model's rounding", "≈")] : [];
  return make("p", { class: "equation", data: { total, shown } }, ...parts, ...rounded);
}

/** What a line comes to, in words. */
export function nameOf(total, shown) {
  return isRounded(total, shown) ? "the sum" : "the value in the map";
}

/** Whether a model has rounded, as int8 models do; the rounding of float32 is far smaller. */
function isRounded(total, shown) {
  return Math.abs(total - shown) > 1e-3 * Math.max(1, Math.abs(shown));
}

/**
 * A number with its name below it, or with a link to where it comes from.
 * @param {{name: string, value: number, kind?: string, sign?: string, text?: string, link?: Node}} one
 */
export function summand({ name, value, kind = "term", sign: before = "", text = figure(value), link }) {
  return make(
    "span",
    { class: `summand ${kind}`, data: { value, name } },
    make("span", { class: "sign" }, before),
    make("span", { class: "amount" }, text),
    make("span", { class: "of" }, link ?? name),
  );
}

/** What a line comes to. */
export function result(value, name, before = "=", text = figure(value)) {
  return summand({ name, value, kind: "result", sign: before, text });
}

/** A sign between two numbers. */
export function sign(text) {
  return make("span", { class: "summand" }, make("span", { class: "amount" }, text));
}
