/** Layers that compute nothing: where each value comes from. */

import { make } from "../dom.js";
import { linked, placeOf } from "../links.js";
import { mapLink } from "../maplink.js";
import { MapView } from "../mapview.js";
import { operand } from "../operands.js";
import { formula, step } from "../parts.js";
import { plain } from "./plain.js";

/** @param {import("../detail.js").Context} context */
export async function rearrangement(context) {
  const { layer, index, sources } = context;
  if (layer.order) return flattened(context);
  const found = sources
    .map((source) => ({ source, range: linked(layer, index, source, sources) }))
    .find(({ range }) => range);
  return [copied(context, found), ...[await plain(context)].flat()];
}

/** Maps that were written into one row. @param {import("../detail.js").Context} context */
async function flattened(context) {
  const { layer, index, sources: [source], tensors, point } = context;
  const { map, row, column } = placeOf(layer.order, index, source.shape);
  const [given, made] = await Promise.all([operand(tensors, source, map), operand(tensors, layer, index)]);
  const value = given.values[row * given.size[1] + column];
  const link = mapLink(context, source, map, { own: given, spot: () => ({ row, column }) });
  const view = new MapView({ name: `map ${map + 1}`, link, ...given });
  view.mark(row, column);
  point(source, row, column);
  return [
    formula(placeFormula(layer.order, source.shape)),
    make("p", {}, `Value ${index + 1} is that of map ${map + 1} in row ${row}, column ${column}.`),
    make("p", { class: "soft" }, "The formula counts places and maps from 0."),
    make(
      "div",
      { class: "row" },
      view.element,
      step(value, value, made.values[0]),
    ),
  ];
}

/** How the place in the row follows from the place in the maps. */
function placeFormula(order, [maps, height, width]) {
  return order === "HWC"
    ? `place = row · ${width * maps} + column · ${maps} + map`
    : `place = map · ${height * width} + row · ${width} + column`;
}

/** @param {import("../detail.js").Context} context @param {{source: import("../api.js").Layer, range: [number, number] | null} | undefined} found */
function copied(context, found) {
  if (!found) return make("p", {}, "The same values, arranged otherwise.");
  const link = mapLink(context, found.source, found.range[0], { spot: () => context.spot });
  return make("p", {}, "A copy of ", link, ` of ${found.source.name}.`);
}
