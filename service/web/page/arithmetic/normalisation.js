/** Batch normalisation: four numbers for each map. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { MapView } from "../mapview.js";
import { figure } from "../numbers.js";
import { operand } from "../operands.js";
import { formula, number, step } from "../parts.js";

/** ONNX's own, where a node does not say. */
const EPSILON = 1e-5;

/** @param {import("../detail.js").Context} context */
export async function normalisation(context) {
  const { layer, index, sources, tensors } = context;
  const part = async (name) => (await tensors.weights(layer.tensor, name, index, 1)).values[0];
  const [given, made, scale, bias, mean, variance] = await Promise.all([
    operand(tensors, sources[0], index),
    operand(tensors, layer, index),
    ...["scale", "bias", "mean", "variance"].map(part),
  ]);
  const epsilon = Number(layer.attributes.epsilon ?? EPSILON);
  const of = (x) => (scale * (x - mean)) / Math.sqrt(variance + epsilon) + bias;
  const input = new MapView({ name: "before", ...given });
  const worked = make("div", {});
  const show = (row, column) => {
    const at = row * given.size[1] + column;
    input.mark(row, column);
    worked.replaceChildren(step(given.values[at], of(given.values[at]), made.values[at]));
  };
  const numbers = make(
    "dl",
    { class: "facts" },
    ...Object.entries({ scale, shift: bias, mean, variance }).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, number(value))),
    ),
  );
  const text = formula(`y = scale · (x − mean) / √(variance + ${figure(epsilon, 2)}) + shift`);
  if (layer.shape.length === 1) {
    show(0, 0);
    return [text, numbers, worked];
  }
  return [
    text,
    numbers,
    worked,
    make("div", { class: "row" }, input.element, chooser(context, { name: "after", ...made }, show)),
  ];
}
