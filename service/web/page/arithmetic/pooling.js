/** Pooling: a window slides over a map, and its largest value stays, or its mean. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { mapLink, titled } from "../maplink.js";
import { MapView } from "../mapview.js";
import { operand, withOneScale } from "../operands.js";
import { formula, grid, line, result, sign } from "../parts.js";
import { middleOfWindow, patchAt, windowAt } from "./window.js";

/** @param {import("../detail.js").Context} context */
export async function pooling(context) {
  const { layer, index, sources, tensors } = context;
  const maps = [operand(tensors, sources[0], index), operand(tensors, layer, index)];
  const [given, made] = withOneScale(await Promise.all(maps));
  const spot = () => middleOfWindow(layer, context.spot, given.size);
  const link = titled("before: ", mapLink(context, sources[0], index, { own: given, spot }));
  const input = new MapView({ name: "before", link, ...given, padding: layer.padding });
  const worked = make("div", { class: "row" });
  const show = (row, column) => {
    const patch = patchAt(layer, given.values, given.size, row, column);
    input.mark(...windowAt(layer, row, column));
    const { value, chosen } = layer.kind === "MaxPool" ? greatest(patch) : mean(patch, layer);
    worked.replaceChildren(
      grid("what the window covers", patch.values, layer.kernel[1], given.scale, { ...patch, chosen }),
      line(value, made.values[row * made.size[1] + column], sign("→"), result(value, "out", "")),
    );
  };
  return [
    formula(
      layer.kind === "MaxPool" ? "y = the largest x under the window" : "y = the mean of x under the window",
    ),
    make("div", { class: "row" }, input.element, worked, chooser(context, { name: "after", ...made }, show)),
  ];
}

/** Padding is never the largest. @param {import("./window.js").Patch} patch */
function greatest({ values, outside }) {
  let chosen = -1;
  values.forEach((value, at) => {
    if (!outside[at] && (chosen < 0 || value > values[chosen])) chosen = at;
  });
  return { value: values[chosen], chosen };
}

/** Padding counts where the layer says so. @param {import("./window.js").Patch} patch */
function mean({ values, outside }, { attributes }) {
  const counted = attributes.count_include_pad ? values.length : outside.filter((out) => !out).length;
  return { value: values.reduce((sum, value) => sum + value, 0) / counted, chosen: -1 };
}
