/** A map as it is: for kinds of layers whose arithmetic the page does not show. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { operand } from "../operands.js";
import { number } from "../parts.js";

/** @param {import("../detail.js").Context} context */
export async function plain(context) {
  const { layer, index, tensors } = context;
  if (layer.shape.length !== 3 && layer.shape.length !== 1)
    return make("p", {}, "These values have no picture.");
  const own = await operand(tensors, layer, index);
  const shown = make("p", { role: "status" });
  const tell = (row, column) =>
    shown.replaceChildren("The value here: ", number(own.values[row * own.size[1] + column], "result"));
  const why =
    !layer.direct &&
    make("p", { class: "soft" }, "It reads parts of the layers before, or reads them in another order.");
  if (layer.shape.length === 1) {
    tell(0, 0);
    return [why, shown].filter(Boolean);
  }
  const map = make("div", { class: "row" }, chooser(context, { name: "this map", ...own }, tell));
  return [why, map, shown].filter(Boolean);
}
