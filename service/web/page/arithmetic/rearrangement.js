/** Layers that compute nothing: where each value comes from. */

import { make } from "../dom.js";
import { linked } from "../links.js";
import { MapView } from "../mapview.js";
import { operand } from "../operands.js";
import { formula, step } from "../parts.js";
import { plain } from "./plain.js";

/** @param {import("../detail.js").Context} context */
export async function rearrangement(context) {
  const { layer, index, sources, tensors, point } = context;
  const found = sources
    .map((source) => ({ source, range: linked(layer, index, source, sources) }))
    .find(({ range }) => range);
  if (!found || layer.shape.length === found.source.shape.length)
    return [copied(found), ...[await plain(context)].flat()];
  const { source, range } = found;
  const [, height, width] = source.shape;
  const place = index - range[0] * height * width;
  const [row, column] = [Math.floor(place / width), place % width];
  const [given, made] = await Promise.all([
    operand(tensors, source, range[0]),
    operand(tensors, layer, index),
  ]);
  const view = new MapView({ name: `map ${range[0] + 1}`, ...given });
  view.mark(row, column);
  point(source, row, column);
  return [
    formula(`place = map · ${height * width} + row · ${width} + column`),
    make("p", {}, `Value ${index + 1} is that of map ${range[0] + 1} in row ${row}, column ${column}.`),
    make(
      "div",
      { class: "row" },
      view.element,
      step(given.values[place], given.values[place], made.values[0]),
    ),
  ];
}

/** @param {{source: import("../api.js").Layer, range: [number, number] | null} | undefined} found */
function copied(found) {
  if (!found) return make("p", {}, "The same values, arranged otherwise.");
  return make("p", {}, `A copy of map ${found.range[0] + 1} of ${found.source.name}.`);
}
