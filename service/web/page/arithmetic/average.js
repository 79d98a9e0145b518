/** The mean of a whole map, or its largest value. */

import { make } from "../dom.js";
import { mapLink, titled } from "../maplink.js";
import { MapView } from "../mapview.js";
import { whole } from "../numbers.js";
import { operand } from "../operands.js";
import { formula, line, result, sign, summand } from "../parts.js";
import { plain } from "./plain.js";

/** @param {import("../detail.js").Context} context */
export async function average(context) {
  return ofWholeMap(context, "y = Σ x / n", "the map that is averaged", division);
}

/** @param {import("../detail.js").Context} context */
export async function maximum(context) {
  return ofWholeMap(context, "y = the largest x of the map", "the map that is searched", selection);
}

/**
 * One number of a map.
 * @param {import("../detail.js").Context} context
 * @param {string} text the formula
 * @param {string} name of the map
 * @param {(values: Float32Array, shown: number, mark: (at: number) => void) => Node} work write the arithmetic
 */
async function ofWholeMap(context, text, name, work) {
  const { layer, index, sources, tensors, point } = context;
  if (sources[0].shape.length !== 3) return plain(context);
  const [given, made] = await Promise.all([
    operand(tensors, sources[0], index),
    operand(tensors, layer, index),
  ]);
  const pick = (row, column) => {
    view.mark(row, column);
    point(sources[0], row, column);
  };
  const link = mapLink(context, sources[0], index, { own: given });
  const view = new MapView({ name, link: titled(`${name}: `, link), ...given, pick });
  const [, across] = given.size;
  const mark = (at) => pick(Math.floor(at / across), at % across);
  return [
    formula(text),
    make("div", { class: "row" }, view.element, work(given.values, made.values[0], mark)),
  ];
}

function division(values, shown) {
  const count = values.length;
  const sum = values.reduce((total, value) => total + value, 0);
  return line(
    sum / count,
    shown,
    summand({ name: "sum of all values", value: sum }),
    sign("/"),
    summand({ name: "values", value: count, text: whole(count) }),
    result(sum / count, "the mean"),
  );
}

function selection(values, shown, mark) {
  const at = values.reduce((best, value, place) => (value > values[best] ? place : best), 0);
  mark(at);
  return line(values[at], shown, result(values[at], "the largest", ""));
}
