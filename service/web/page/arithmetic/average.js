/** The mean of a whole map. */

import { make } from "../dom.js";
import { MapView } from "../mapview.js";
import { figure, whole } from "../numbers.js";
import { operand } from "../operands.js";
import { formula } from "../parts.js";
import { plain } from "./plain.js";

/** @param {import("../detail.js").Context} context */
export async function average(context) {
  const { layer, index, sources, tensors, point } = context;
  if (sources[0].shape.length !== 3) return plain(context);
  const [given, made] = await Promise.all([operand(tensors, sources[0], index), operand(tensors, layer, index)]);
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
  const part = (kind, value, text, of) =>
    make("span", { class: `summand ${kind}`, data: { value } }, make("span", { class: "amount" }, text), make("span", { class: "of" }, of));
  const sign = (text) => make("span", { class: "summand" }, make("span", { class: "amount" }, text));
  return make(
    "p",
    { class: "equation", data: { total: sum / count, shown } },
    part("term", sum, figure(sum), "sum of all values"),
    sign("/"),
    part("count", count, whole(count), "values"),
    sign("="),
    part("result", sum / count, figure(sum / count), "the mean"),
  );
}
