/** The mean of a whole map. */

import { make } from "../dom.js";
import { MapView } from "../mapview.js";
import { whole } from "../numbers.js";
import { operand } from "../operands.js";
import { formula, line, result, sign, summand } from "../parts.js";
import { plain } from "./plain.js";

/** @param {import("../detail.js").Context} context */
export async function average(context) {
  const { layer, index, sources, tensors, point } = context;
  if (sources[0].shape.length !== 3) return plain(context);
  const [given, made] = await Promise.all([
    operand(tensors, sources[0], index),
    operand(tensors, layer, index),
  ]);
  const view = new MapView({
    name: "the map that is averaged",
    ...given,
    pick: (row, column) => {
      view.mark(row, column);
      point(sources[0], row, column);
    },
  });
  const count = given.values.length;
  const sum = given.values.reduce((total, value) => total + value, 0);
  return [
    formula("y = Σ x / n"),
    make("div", { class: "row" }, view.element, division(sum, count, made.values[0])),
  ];
}

function division(sum, count, shown) {
  return line(
    sum / count,
    shown,
    summand({ name: "sum of all values", value: sum }),
    sign("/"),
    summand({ name: "values", value: count, text: whole(count) }),
    result(sum / count, "the mean"),
  );
}
