/** A function of each value by itself: ReLU and its kin, the sigmoid, the division by a temperature. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { mapLink, originLink, titled } from "../maplink.js";
import { MapView } from "../mapview.js";
import { counterpart, operand, withOneScale } from "../operands.js";
import { formula, step } from "../parts.js";
import { keepsValues } from "../scales.js";
import { Curve } from "./curve.js";
import { functionOf } from "./functions.js";

/** @param {import("../detail.js").Context} context */
export async function elementwise(context) {
  const { layer, index, sources, tensors } = context;
  const { formula: text, of } = functionOf(layer);
  const [own, after, whole] = await Promise.all([
    operand(tensors, sources[0], counterpart(sources[0], index)),
    operand(tensors, layer, index),
    tensors.maps(sources[0].tensor, 0, 1), // for the ends of the whole layer's values
  ]);
  const [given, made] = keepsValues(layer) ? withOneScale([own, after]) : [own, after];
  const curve = new Curve(of, whole.lowest, whole.highest);
  const worked = make("div", {});
  const place = counterpart(sources[0], index);
  const isVector = layer.shape.length === 1;
  const link = isVector
    ? originLink(context, sources[0], place)
    : mapLink(context, sources[0], place, { own: given, spot: () => context.spot });
  const input = new MapView({ name: "before", link: isVector ? undefined : titled("before: ", link), ...given });
  const show = (row, column) => {
    const at = row * given.size[1] + column;
    input.mark(row, column);
    curve.point(given.values[at]);
    worked.replaceChildren(step(given.values[at], of(given.values[at]), made.values[at], isVector ? link : undefined));
  };
  if (isVector) {
    show(0, 0);
    return [formula(text), worked, curve.element];
  }
  return [
    formula(text),
    worked,
    make(
      "div",
      { class: "row" },
      input.element,
      curve.element,
      chooser(context, { name: "after", ...made }, show),
    ),
  ];
}
