/** Normalisations: with mean and variance as they were in training, or as they are over all maps at one place. */

import { chooser } from "../chooser.js";
import { make } from "../dom.js";
import { mapLink, originLink, titled } from "../maplink.js";
import { MapView } from "../mapview.js";
import { figure } from "../numbers.js";
import { operand } from "../operands.js";
import { formula, number, step } from "../parts.js";
import { plain } from "./plain.js";

/** ONNX's own, where a node does not say. */
const EPSILON = 1e-5;

/** Batch normalisation: four numbers for each map. @param {import("../detail.js").Context} context */
export async function normalisation(context) {
  const { layer, index, tensors } = context;
  const part = async (name) => (await tensors.weights(layer.tensor, name, index, 1)).values[0];
  const [scale, shift, mean, variance] = await Promise.all(["scale", "bias", "mean", "variance"].map(part));
  return worked(context, "", () => ({ scale, shift, mean, variance }));
}

/** Layer normalisation: two numbers for each map, two for each place. @param {import("../detail.js").Context} context */
export async function layerNormalisation(context) {
  const { layer, index, sources, tensors } = context;
  const [scales, shifts, maps] = await Promise.all([
    tensors.weights(layer.tensor, "scale", 0, 0),
    layer.weights.includes("bias") ? tensors.weights(layer.tensor, "bias", 0, 0) : null,
    tensors.maps(sources[0].tensor),
  ]);
  const [count] = layer.shape;
  if (scales.values.length !== count) return plain(context); // it goes along a row, not over the maps
  const size = maps.values.length / count;
  return worked(context, ", mean and variance of all maps at this place", (at) => ({
    scale: scales.values[index],
    shift: shifts ? shifts.values[index] : 0,
    ...moments(Array.from({ length: count }, (_, map) => maps.values[map * size + at])),
  }));
}

function moments(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length;
  return { mean, variance };
}

/**
 * The arithmetic of one pixel after another.
 * @param {import("../detail.js").Context} context
 * @param {string} remark what is to be said of the formula
 * @param {(at: number) => {scale: number, shift: number, mean: number, variance: number}} numbersAt a pixel
 */
async function worked(context, remark, numbersAt) {
  const { layer, index, sources, tensors } = context;
  const [given, made] = await Promise.all([
    operand(tensors, sources[0], index),
    operand(tensors, layer, index),
  ]);
  const epsilon = Number(layer.attributes.epsilon ?? EPSILON);
  const isVector = layer.shape.length === 1;
  const link = isVector
    ? originLink(context, sources[0], index)
    : mapLink(context, sources[0], index, { own: given, spot: () => context.spot });
  const input = new MapView({ name: "before", link: isVector ? undefined : titled("before: ", link), ...given });
  const facts = make("dl", { class: "facts" });
  const equation = make("div", {});
  const show = (row, column) => {
    const at = row * given.size[1] + column;
    const numbers = numbersAt(at);
    const { scale, shift, mean, variance } = numbers;
    const value = (scale * (given.values[at] - mean)) / Math.sqrt(variance + epsilon) + shift;
    input.mark(row, column);
    facts.replaceChildren(...Object.entries(numbers).map(fact));
    equation.replaceChildren(step(given.values[at], value, made.values[at], isVector ? link : undefined));
  };
  const text = `y = scale · (x − mean) / √(variance + ${figure(epsilon, 2)}) + shift${remark}`;
  if (isVector) {
    show(0, 0);
    return [formula(text), facts, equation];
  }
  return [
    formula(text),
    facts,
    equation,
    make("div", { class: "row" }, input.element, chooser(context, { name: "after", ...made }, show)),
  ];
}

function fact([name, value]) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, number(value)));
}
